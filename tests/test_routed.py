"""Fusion `routed`: the frozen FFN is expert 0 of those that the router chooses from, the form of MoE-LPR."""

import copy

import pytest
import torch
from small_runs import launch, losses
from tiny import disturb, logits, tiny_model, tokens
from torch.nn.functional import silu

from moect.errors import ConfigError
from moect.model import ForwardRecord, MoeConfig, append_moe, modules_of
from moect.model.build import parameter_counts
from moect.train.loop import train

ROUTED = {"fusion": "routed", "experts": 4, "top_k": 2}


def by_hand(moe, ffn, r_TD, u_TD):
    """One token after the other, in float64, as the paper has it."""
    out = []
    for r, u in zip(r_TD.double(), u_TD.double(), strict=True):
        scores = (moe.router.weight.double() @ u).softmax(0)
        best = scores.topk(moe.config.top_k)
        total = torch.zeros_like(r)
        for weight, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            if expert == 0:
                y = ffn.double()(u)
            else:
                gate, up = (moe.experts.gate_up_proj[expert - 1].double() @ u).chunk(2)
                y = moe.experts.down_proj[expert - 1].double() @ (silu(gate) * up)
            total += weight * y
        out.append(r + total)
    return torch.stack(out)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_block_computes_the_sum_over_chosen_experts_with_the_ffn_as_one_of_them(top_k):
    model = append_moe(tiny_model(), MoeConfig(**{**ROUTED, "top_k": top_k}))
    disturb(model, scale=0.3)
    block = model.model.layers[1].eval()
    r, u = (torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    record = ForwardRecord()
    with torch.no_grad():
        got = block.moe(r, u, block.mlp(u), record)[0]
        wanted = by_hand(block.moe, copy.deepcopy(block.mlp), r[0], u[0])
    assert (got - wanted).abs().max() < 1e-5
    indices, share = record.blocks[1].indices_TK, record.blocks[1].frozen_share_T
    assert set(indices.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(share > 0, (indices == 0).any(1)) and 0 < share.mean() < 1


def test_experts_that_no_token_chose_get_a_gradient_of_exactly_zero():
    model = append_moe(tiny_model(), MoeConfig(**{**ROUTED, "top_k": 1, "balance": "bias"})).train()
    for moe in modules_of(model):
        with torch.no_grad():
            moe.router.selection_bias[0] = 9  # expert 0 wins always
    model(tokens(), labels=tokens()).loss.backward()
    for moe in modules_of(model):
        for parameter in moe.experts.parameters():
            assert parameter.grad is not None and not parameter.grad.any()


def test_a_token_whose_weight_lies_on_the_ffn_alone_gets_the_base_s_output():
    base = tiny_model()
    model = append_moe(copy.deepcopy(base), MoeConfig(**{**ROUTED, "top_k": 1, "balance": "bias"}))
    disturb(model, scale=0.3)
    for moe in modules_of(model):
        with torch.no_grad():
            moe.router.selection_bias[0] = 9
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_only_the_experts_that_train_have_parameters():
    model = append_moe(tiny_model(), MoeConfig(**ROUTED))
    assert modules_of(model)[0].experts.down_proj.shape[0] == 3 and modules_of(model)[0].router.weight.shape[0] == 4
    counts = parameter_counts(model)
    per_expert = 3 * 32 * 64
    assert counts["trainable"] == 3 * (3 * per_expert + 4 * 32)
    assert counts["active"] == counts["total"] - 3 * per_expert  # of three that train, a token meets two at most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 1, "top_k": 1}, "the frozen FFN being one of them"),
        ({"renormalise": False}, "begins as the base only with copies whose weights sum to 1"),
        ({"routed_scale": 2.0}, "begins as the base only with copies"),
        ({"init": "zero"}, "begins as the base only with copies"),
        ({"language_gate": True}, "needs moe.fusion: add"),
    ],
)
def test_what_would_not_begin_as_the_base_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MoeConfig(**{**ROUTED, **changes})


def test_experts_of_another_width_are_refused():
    with pytest.raises(
        ConfigError, match=r"moe\.fusion: routed needs experts as wide as the base's FFN \(64\), not 32"
    ):
        append_moe(tiny_model(), MoeConfig(**ROUTED, width=32))


@pytest.mark.slow
def test_two_ranks_under_zero_3_learn_as_one_under_zero_2(place):
    settings = {"steps": 3, "micro_batch": 2}
    sections = {"moe": {"fusion": "routed"}, "loss": {"balance": 0.05}}
    path = place.write(
        place.config("two", **sections, train={**settings, "zero_stage": 3, "activation_checkpointing": True})
    )
    launch(path, 2)
    alone = train(place.config("one", **sections, train={**settings, "zero_stage": 2}))
    assert losses(place.output / "two") == pytest.approx(losses(alone), abs=1e-4)
