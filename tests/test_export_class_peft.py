"""Low-rank updates of peft on top of the exported class, on attention and on the experts' stacked parameters."""

import pytest
import torch
from export_helpers import exported, extended
from peft import LoraConfig, PeftModel, get_peft_model
from test_append import VARIANTS
from tiny import logits, tokens
from transformers import AutoModelForCausalLM

EXPERTS = ["moe.experts.gate_up_proj", "moe.experts.down_proj"]


@pytest.fixture(params=["gate", "language-gate"])
def folder(request, tmp_path):
    return exported(extended("llama", VARIANTS[request.param]), tmp_path / "export")


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # from a file's mapping products round differently
    return model


def with_updates(folder):
    """The model with low-rank updates that three steps have trained."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(load(folder), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    return model.eval()


def test_updates_of_attention_and_experts_train_are_kept_and_merged(folder, tmp_path):
    plain = logits(load(folder), tokens())
    model = with_updates(folder)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {".self_attn.q_proj." in n or ".moe.experts." in n or ".self_attn.v_proj." in n for n in trained} == {True}
    assert not any(torch.equal(p, torch.zeros_like(p)) for n, p in model.named_parameters() if ".lora_B" in n)
    changed = logits(model, tokens())
    assert (changed - plain).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), plain)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, tokens()), changed)

    merged = again.merge_and_unload()
    assert type(merged).__name__ == "MoectForCausalLM"
    assert (logits(merged, tokens()) - changed).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), tokens()), logits(merged, tokens()))


def test_gradients_of_updates_are_the_same_with_recomputed_activations(folder):
    model = with_updates(folder).train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
