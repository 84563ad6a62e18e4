"""The appended module against the base model it is appended to."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, disturb, logits, tiny_model, tokens
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moect.errors import ConfigError, MoectError, UnsupportedModelError
from moect.model import ForwardRecord, MoeConfig, append_moe, base_only, module_state, modules_of, remove_moe
from moect.model.losses import balance_loss, score_sums

COUNTED = ("selection_bias", "of_token", "of_pair")  # tensors of a module that no gradient moves
VARIANTS = {
    "gate": {"fusion": "gate"},
    "discrete": {"fusion": "discrete"},
    "fixed": {"fusion": "fixed", "fixed_weight": 0.3},
    "gate-sigmoid": {"fusion": "gate", "router": "sigmoid"},
    "gate-narrow": {"fusion": "gate", "width": 16},
    "discrete-narrow": {"fusion": "discrete", "width": 16},
    "fixed-narrow": {"fusion": "fixed", "width": 16},
    "gate-wide": {"fusion": "gate", "width": 128},
    "gate-unnormalised": {"fusion": "gate", "renormalise": False},
    "routed": {"fusion": "routed"},
    "add": {"fusion": "add"},
    "add-sigmoid": {"fusion": "add", "router": "sigmoid", "renormalise": False, "balance": "bias"},
    "language-gate": {"fusion": "add", "language_gate": True, "width": 24},
    "counting-gate": {"fusion": "add", "language_gate": True, "gate_sees": "pairs", "width": 24},
}


def train_steps(model, steps=3, lr=0.02, seed=0):
    """Plain torch training, in anybody's own loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        ids = tokens(seed=seed + step)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_appended_model_computes_the_base_function_before_training(family, variant):
    base = tiny_model(family)
    ids = tokens()
    expected = logits(base, ids)
    model = append_moe(copy.deepcopy(base), MoeConfig(**VARIANTS[variant]))
    got = logits(model, ids)
    if modules_of(model)[0].copies:
        assert (got - expected).abs().max() < 1e-5
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("variant", ["gate-narrow", "add"])
def test_silent_experts_are_bitwise_the_base_in_bf16_too(variant):
    base = tiny_model("qwen3", dtype=torch.bfloat16)
    expected = logits(base, tokens())
    assert torch.equal(logits(append_moe(base, MoeConfig(**VARIANTS[variant])), tokens()), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_module_tensors_only(variant):
    base = tiny_model("qwen3")
    model = append_moe(copy.deepcopy(base), MoeConfig(**VARIANTS[variant]))
    before = {name: tensor.clone() for name, tensor in module_state(model).items()}
    # experts that are all copies of one FFN leave router and fusion without gradient until they differ
    train_steps(model, steps=4)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    still = [n for n, t in module_state(model).items() if torch.equal(t, before[n]) and not n.endswith(COUNTED)]
    assert still == []


@pytest.mark.parametrize("variant", ["gate", "discrete", "gate-narrow"])
def test_forcing_the_frozen_share_to_one_restores_the_base_bitwise(variant):
    base = tiny_model("llama")
    model = append_moe(copy.deepcopy(base), MoeConfig(**VARIANTS[variant]))
    disturb(model)
    assert not torch.equal(logits(model, tokens()), logits(base, tokens()))
    for moe in modules_of(model):
        nn.init.constant_(moe.fusion.out_proj.bias, 1e4)  # sigmoid is exactly 1 in fp32
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_base_only_and_remove_give_the_base_back_exactly(family, variant):
    base = tiny_model(family)
    ids = tokens()
    expected = logits(base, ids)
    model = append_moe(copy.deepcopy(base), MoeConfig(**VARIANTS[variant], layers=[0, 2]))
    disturb(model)
    changed = logits(model, ids)
    with base_only(model):
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), changed)
    remove_moe(model)
    assert torch.equal(logits(model, ids), expected)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert [type(b) for b in model.model.layers] == [type(b) for b in base.model.layers]


def test_router_and_fusion_receive_gradient_when_every_expert_is_chosen():
    model = append_moe(tiny_model(), MoeConfig(experts=2, top_k=2, fusion="gate"))
    train_steps(model)
    model.train()
    ids = tokens(seed=9)
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for moe in modules_of(model):
        assert moe.router.weight.grad.abs().max() > 0
        for parameter in moe.fusion.parameters():
            assert parameter.grad.abs().max() > 0


def test_an_expert_without_tokens_gets_an_exactly_zero_gradient():
    model = append_moe(tiny_model(), MoeConfig(experts=4, top_k=1, fusion="add", router="sigmoid", balance="bias"))
    disturb(model)
    moe = modules_of(model)[1]
    moe.router.selection_bias.copy_(torch.tensor([0.0, 0.0, 0.0, -10.0]))
    model.train()
    ids = tokens()
    record = ForwardRecord()
    model(ids, labels=ids, use_cache=False, moect_record=record).loss.backward()
    assert (record.blocks[1].indices_TK != 3).all()
    for grad in (moe.experts.gate_up_proj.grad, moe.experts.down_proj.grad):
        assert (grad[3] == 0).all() and grad[:3].abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "around"),
    [(kind, around) for kind in ("gate", "discrete", "fixed") for around in (True, False)] + [("add", True)],
    ids=str,
)
def test_block_output_follows_the_written_formula(kind, around):
    """One block in float64, against the formulas of the paper written out for one token at a time."""
    config = MoeConfig(fusion=kind, experts=3, top_k=2, width=16 if around else None, fixed_weight=0.3)
    model = append_moe(tiny_model().double(), config)
    disturb(model, scale=0.3)
    moe, ffn = modules_of(model)[0], model.model.layers[0].mlp
    r_BSD, u_BSD = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        got = moe(r_BSD, u_BSD, ffn(u_BSD), ForwardRecord())[0]
        for t in range(5):
            r, u, f = r_BSD[0, t], u_BSD[0, t], ffn(u_BSD[0, t])
            scores = (moe.router.weight.float() @ u.float()).softmax(0)
            best = scores.argsort(descending=True)[:2]
            total = scores[best].sum()
            e = torch.zeros(32, dtype=torch.float64)
            for k in best:
                gate, up = (moe.experts.gate_up_proj[k] @ u).chunk(2)
                e += scores[k] / total * (moe.experts.down_proj[k] @ (nn.functional.silu(gate) * up))
            m = f + e if around else e
            if kind == "add":
                expected = r + f + e
            else:
                if kind == "fixed":
                    p = 0.3
                else:
                    fusion = moe.fusion
                    z = torch.tanh(fusion.frozen_proj(r + f) + fusion.mixture_proj(r + m))
                    p = torch.sigmoid(fusion.out_proj(z))
                    p = (p >= 0.5).double() if kind == "discrete" else p
                expected = r + p * f + (1 - p) * m
            assert torch.allclose(got[t], expected, atol=1e-6), (t, (got[t] - expected).abs().max())


def test_discrete_gate_passes_its_gradient_straight_through():
    """The gradient at the gate's parameters is that of the soft gate with the same downstream gradient."""
    model = append_moe(tiny_model(), MoeConfig(fusion="discrete"))
    disturb(model)
    fusion = modules_of(model)[0].fusion
    r, f, e, downstream = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(3))
    fusion(r, f, e)[0].backward(downstream)
    got = fusion.out_proj.weight.grad.clone()
    fusion.zero_grad()
    p = fusion._gate(r + f, r + e)
    (p * ((f - e) * downstream).sum(1, keepdim=True)).sum().backward()
    assert torch.allclose(got, fusion.out_proj.weight.grad, atol=1e-5) and got.abs().max() > 0


@pytest.mark.parametrize("variant", ["gate", "add-sigmoid", "language-gate", "counting-gate"])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(variant):
    config = MoeConfig(**VARIANTS[variant])
    results = []
    for recompute in (False, True):
        model = append_moe(tiny_model(), config)
        disturb(model)
        model.train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        record = ForwardRecord()
        ids = tokens()
        loss = model(ids, labels=ids, use_cache=False, moect_record=record).loss
        scores = score_sums(record, config.router, torch.ones(ids.numel(), dtype=torch.bool))
        load = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
        loss = loss + balance_loss(load, scores / ids.numel())
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    (loss_a, grads_a), (loss_b, grads_b) = results
    assert torch.equal(loss_a, loss_b)
    assert all(torch.equal(a, b) for a, b in zip(grads_a, grads_b, strict=True))


def test_selection_bias_selects_but_does_not_weight():
    model = append_moe(tiny_model(), MoeConfig(fusion="add", balance="bias", top_k=2, renormalise=False))
    router = modules_of(model)[0].router
    u = torch.randn(50, 32)
    plain, _, logits_TE = router(u)
    router.selection_bias[1] = 10.0
    chosen, weights, _ = router(u)
    assert (chosen == 1).any(1).all() and not (plain == 1).any(1).all()
    assert torch.equal(weights, logits_TE.softmax(-1).gather(1, chosen))


def test_hard_language_gate_leaves_closed_tokens_to_the_base_bitwise():
    base = tiny_model()
    model = append_moe(copy.deepcopy(base), MoeConfig(fusion="add", language_gate=True))
    disturb(model)
    gate = modules_of(model)[0].language_gate
    ids = tokens(4, 12)
    record = ForwardRecord()
    logits(model, ids, moect_record=record)
    # close the gate for whole documents: then those are the base's, whatever the others do
    middle = record.gate_logit_T.view(4, 12).max(1).values.sort().values[1:3].mean()
    with torch.no_grad():
        gate.evidence.bias -= middle
    record = ForwardRecord()
    got, expected = logits(model, ids, moect_record=record), logits(base, ids)
    closed_B = (record.gate_logit_T.view(4, 12) <= 0).all(1)
    assert closed_B.sum() == 2
    assert torch.equal(got[closed_B], expected[closed_B])
    assert not torch.equal(got[~closed_B], expected[~closed_B])
    with torch.no_grad():
        gate.evidence.bias -= 1e6
    record = ForwardRecord()
    assert torch.equal(logits(model, ids, moect_record=record), expected)
    assert record.blocks == {}  # no token, no expert work


@pytest.mark.parametrize(
    ("backend", "sees"), [("cpu", "token"), ("cpu", "context"), ("cpu", "pairs"), ("segments", "context")]
)
def test_a_token_that_the_gate_has_closed_costs_no_expert_operation(backend, sees):
    D, F, E, K = 32, 24, 4, 2
    config = MoeConfig(fusion="add", language_gate=True, gate_sees=sees, width=F, experts=E, top_k=K, dispatch=backend)
    model = append_moe(tiny_model(), config)
    disturb(model)
    ids = tokens(4, 12)
    logits(model, ids)  # loads the kernels: a counter knows only operators that were there before it
    record = ForwardRecord()
    with FlopCounterMode(display=False) as counted:
        logits(model, ids, moect_record=record)
    with FlopCounterMode(display=False) as of_base, base_only(model):
        logits(model, ids)
    opened, blocks = (record.gate_logit_T > 0).sum().item(), 3
    assert 0 < opened < ids.numel()
    # attention's second call is not counted on CPUs
    gate = 2 * ids.numel() * {"token": D * D + D, "context": D + 1, "pairs": 0}[sees]
    appended = blocks * opened * 2 * (D * E + K * 3 * D * F)
    assert counted.get_total_flops() == of_base.get_total_flops() + gate + appended


def test_language_gate_sees_frozen_features_and_the_past_only():
    model = append_moe(tiny_model(), MoeConfig(fusion="add", language_gate=True, layers=[1, 2]))
    disturb(model)
    ids = tokens(1, 10)
    first, second = ForwardRecord(), ForwardRecord()
    logits(model, ids, moect_record=first)
    other = ids.clone()
    other[0, 6:] = tokens(1, 4, seed=5)
    logits(model, other, moect_record=second)
    assert torch.equal(first.gate_logit_T[:6], second.gate_logit_T[:6])
    assert [moe.language_gate is not None for moe in modules_of(model)] == [True, False]
    expected = first.gate_logit_T
    for moe in modules_of(model):
        moe.experts.down_proj.data.mul_(7.0)
    third = ForwardRecord()
    logits(model, ids, moect_record=third)
    assert torch.equal(third.gate_logit_T, expected)


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1, 2]), ("every-2", [1]), ("every-3", [2]), ([2, 0], [0, 2])], ids=str
)
def test_layers_are_chosen_as_configured(layers, expected):
    model = append_moe(tiny_model(), MoeConfig(layers=layers))
    assert [moe.index for moe in modules_of(model)] == expected


def test_the_same_seed_gives_the_same_module_whatever_the_global_random_state():
    first = append_moe(tiny_model(), MoeConfig(fusion="add"), seed=3)
    base = tiny_model()
    torch.manual_seed(99)
    second = append_moe(base, MoeConfig(fusion="add"), seed=3)
    third = append_moe(tiny_model(), MoeConfig(fusion="add"), seed=4)
    a, b, c = (module_state(m)["model.layers.0.moe.experts.gate_up_proj"] for m in (first, second, third))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_families_that_cannot_be_served_are_refused_with_the_reason():
    def refuse(**config):
        with pytest.raises(UnsupportedModelError) as caught:
            append_moe(SimpleNamespace(config=SimpleNamespace(**config)), MoeConfig())
        return str(caught.value)

    assert "sandwich norms" in refuse(model_type="gemma2")
    assert "mixture of experts already" in refuse(model_type="mixtral")
    assert "not known to moect; served: llama, qwen2, qwen3, mistral" in refuse(model_type="rwkv")
    assert "hidden_act `gelu`" in refuse(model_type="llama", hidden_act="gelu")
    assert "mlp_bias" in refuse(model_type="llama", hidden_act="silu", mlp_bias=True)


def test_a_second_module_and_layers_that_are_not_there_are_refused():
    model = append_moe(tiny_model(), MoeConfig())
    with pytest.raises(UnsupportedModelError, match="call remove_moe first"):
        append_moe(model, MoeConfig())
    with pytest.raises(ConfigError, match="names block 3, the base has blocks 0 to 2"):
        append_moe(tiny_model(), MoeConfig(layers=[3]))
    with pytest.raises(ConfigError, match="has 3 blocks"):
        append_moe(tiny_model(), MoeConfig(layers="every-4"))
    with pytest.raises(UnsupportedModelError, match="no appended module"):
        remove_moe(tiny_model())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 5}, "top_k is 5 but there are only 4 experts"),
        ({"width": 12}, "multiple of 8"),
        ({"layers": "half"}, "use `all`, `every-N` or a list"),
        ({"fusion": "add", "init": "copy"}, "double the FFN"),
        ({"init": "copy", "renormalise": False}, "sum to 1"),
        ({"language_gate": True}, "needs moe.fusion: add"),
        ({"fixed_weight": 1.0}, "no expert counts"),
        ({"router": "softmx"}, "choose one of softmax, sigmoid"),
        ({"routed_scale": float("nan")}, "must be positive"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_values_that_describe_no_module_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MoeConfig(**values)


def test_a_record_is_for_one_forward_pass():
    model = append_moe(tiny_model(), MoeConfig())
    record = ForwardRecord()
    logits(model, tokens(), moect_record=record)
    with pytest.raises(ValueError, match="give each pass a new ForwardRecord"):
        logits(model, tokens(seed=1), moect_record=record)


def test_user_errors_are_one_family():
    assert issubclass(UnsupportedModelError, MoectError) and issubclass(ConfigError, MoectError)
