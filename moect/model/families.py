"""Where each Hugging Face family keeps its blocks and their parts, and why some families cannot be served."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from moect.errors import UnsupportedModelError

# Pre-norm blocks of the form  r = x + attn(norm1(x));  h' = r + mlp(norm2(r))  with a SwiGLU FFN, and all under these
# names: self_attn, mlp (gate_proj, up_proj, down_proj), input_layernorm, post_attention_layernorm.
SUPPORTED = ("llama", "qwen2", "qwen3", "mistral")

REFUSED = {
    "gemma": "its FFN is not SwiGLU (it uses GELU)",
    "gemma2": "it normalises the FFN's output before adding it (sandwich norms)",
    "gemma3": "it normalises the FFN's output before adding it (sandwich norms)",
    "gemma3_text": "it normalises the FFN's output before adding it (sandwich norms)",
    "phi3": "it fuses the FFN's gate and up projections in one matrix of another layout",
    "gpt2": "its FFN has no gate projection",
    "gpt_neox": "its FFN has no gate projection, and attention and FFN run in parallel",
    "bloom": "its FFN has no gate projection",
    "opt": "its FFN has no gate projection",
    "falcon": "its FFN has no gate projection",
    "mixtral": "its FFN is a mixture of experts already",
    "qwen2_moe": "its FFN is a mixture of experts already",
    "qwen3_moe": "its FFN is a mixture of experts already",
    "deepseek_v3": "its FFN is a mixture of experts already",
    "glm4_moe": "its FFN is a mixture of experts already",
    "moect": "it has an appended module already; extend its base, or call remove_moe first",
}


def check_config(config) -> None:
    """Refuse a Hugging Face config whose model the module cannot be appended to.

    Raises:
        UnsupportedModelError: says which family or option, and why.
    """
    family = config.model_type
    served = ", ".join(SUPPORTED)
    if family in REFUSED:
        raise UnsupportedModelError(f"model family `{family}`: {REFUSED[family]}; served: {served}")
    if family not in SUPPORTED:
        raise UnsupportedModelError(f"model family `{family}` is not known to moect; served: {served}")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"this {family} has hidden_act `{config.hidden_act}`; the experts are SwiGLU (silu)"
        )
    if getattr(config, "mlp_bias", False):
        raise UnsupportedModelError(f"this {family} has biases in its FFN (mlp_bias); the experts have none")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a supported causal LM."""
    return model.model.layers


def config_of_blocks(config, blocks: Sequence[int]):
    """A Hugging Face config of a model made of these blocks of another one, in this order."""
    some = copy.deepcopy(config)
    some.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None) is not None:
        some.layer_types = [config.layer_types[i] for i in blocks]
    if hasattr(config, "max_window_layers"):
        some.max_window_layers = len(blocks)  # layer_types says which
    if getattr(config, "mlp_only_layers", None):
        some.mlp_only_layers = [n for n, i in enumerate(blocks) if i in config.mlp_only_layers]
    return some
