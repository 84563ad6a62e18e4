"""Our dispatch inside the stock mixture-of-experts models of transformers."""

import copy

import pytest
import torch
from export_helpers import python
from transformers import AutoConfig, AutoModelForCausalLM

import moect  # noqa: F401  registers
from moect.errors import DispatchError

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 41).view(2, 20)


def stock(kind: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE)).eval()


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "glm4_moe", "qwen2_moe", "olmoe"])
def test_a_stock_model_computes_the_same_logits_and_gradients_by_our_kernels(kind):
    eager = stock(kind)
    ours = copy.deepcopy(eager)
    eager.set_experts_implementation("eager")
    ours.set_experts_implementation("moect")
    logits = [model(IDS, use_cache=False).logits for model in (eager, ours)]
    assert (logits[0] - logits[1]).abs().max() < 1e-6
    for model_logits in logits:
        model_logits.square().mean().backward()
    for (name, a), b in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 2e-6 * a.grad.norm() + 1e-12, name


def test_our_kernels_are_what_is_called(monkeypatch):
    from moect.dispatch import transformers_experts

    calls = []
    monkeypatch.setattr(transformers_experts, "dispatch", lambda x, *rest: calls.append(x.shape) or torch.zeros_like(x))
    model = stock("qwen3_moe")
    model.set_experts_implementation("moect")
    model(IDS, use_cache=False)
    assert calls == [(40, 32)] * 2


def test_experts_that_our_kernels_do_not_compute_are_refused_by_name():
    model = stock("qwen3_moe")
    model.set_experts_implementation("moect")
    for change, reason in [
        ({"act_fn": torch.nn.GELU()}, "these use GELU"),
        ({"has_bias": True}, "these have biases"),
        ({"is_transposed": True}, "another layout"),
        ({"_is_expert_parallel": True}, "divided among devices"),
    ]:
        changed = copy.deepcopy(model)
        for name, value in change.items():
            setattr(changed.model.layers[0].mlp.experts, name, value)
        with pytest.raises(DispatchError, match=f"Qwen3MoeExperts: .*{reason}.*use `grouped_mm`"):
            changed(IDS)


def test_a_gate_of_its_own_is_seen_through_a_subclass():
    """FSDP replaces the class of a module by a subclass."""
    model = stock("qwen3_moe")
    model.set_experts_implementation("moect")
    experts = model.model.layers[0].mlp.experts
    own = type("Own", (type(experts),), {"_apply_gate": lambda self, gate_up: gate_up})
    experts.__class__ = type("FSDPOwn", (own,), {})
    with pytest.raises(DispatchError, match="FSDPOwn: .*a gate of their own"):
        model(IDS)


def test_gpt_oss_with_its_own_gate_is_refused():
    model = stock("gpt_oss")
    model.set_experts_implementation("moect")
    with pytest.raises(DispatchError, match="GptOssExperts"):
        model(IDS)


def test_importing_moect_makes_the_name_known_before_transformers_is_loaded(tmp_path):
    code = (
        "import moect\nfrom transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "print(ALL_EXPERTS_FUNCTIONS['moect'].__module__)"
    )
    assert python(code, cwd=tmp_path) == "moect.dispatch.transformers_experts"
