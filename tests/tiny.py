"""Tiny random models of every family, for tests."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moect.model import ForwardRecord, modules_of
from moect.model.even_attention import ENOUGH
from moect.model.language_gate import LIMIT

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(family: str = "llama", **changes):
    """A Hugging Face config of a family, small enough for milliseconds."""
    return AutoConfig.for_model(family, **{**SHAPE, **changes})


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A causal LM with random weights; `seed` decides them."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype).eval()


def tokens(batch: int = 2, length: int = 17, seed: int = 0, vocab: int = SHAPE["vocab_size"]) -> torch.Tensor:
    """Random token ids (batch, length), above the special ones."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """Logits without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


def disturb(model, scale: float = 0.1, seed: int = 1) -> None:
    """Move every tensor that trains, so that the module does something and experts differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        for name, parameter in model.named_parameters():
            if name.endswith("language_gate.evidence.weight"):  # its inputs are sums of few tokens, by ENOUGH
                parameter.mul_(ENOUGH)
        for name, buffer in model.named_buffers():
            if name.endswith((".of_token", ".of_pair")):  # what a gate counts in text
                buffer.copy_(4 * torch.randn(buffer.shape, generator=generator))


@torch.no_grad()
def open_by_half(model, ids: torch.Tensor) -> None:
    """Move the bias of the language gate, so that half of those tokens pass."""
    record = ForwardRecord()
    logits(model, ids, moect_record=record)
    middle = record.gate_logit_T.median() / LIMIT
    modules_of(model)[0].language_gate.evidence.bias -= LIMIT * middle.atanh()
