"""Experts that begin as the FFNs of a model that was trained further already ("MoE-CT from CT", arXiv 2407.00875).

That model, made from the same base by training everything, has learned the new languages and forgotten some of the old;
its FFNs become the experts beside the base's own, which stay frozen.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from moect.config import ModelConfig, RunConfig
from moect.errors import ConfigError
from moect.model.append import modules_of
from moect.model.build import load_base
from moect.model.families import blocks_of
from moect.model.partition import writing


@torch.no_grad()
def take_experts(model: nn.Module, config: RunConfig) -> None:
    """Make every expert a copy of its block's FFN in `model.experts_from`, in place.

    Every rank reads that model whole, into host memory, and calls this; its embeddings and attention are not taken.

    Args:
        model: as `build_model` makes it, also divided among ranks.
        config: the run, whose experts start as copies.

    Raises:
        ConfigError: the model cannot be loaded, or is of another shape.
    """
    source = ModelConfig(base=config.model.experts_from)
    trained = load_base(source, modules_of(model)[0].experts.down_proj.dtype)
    ffns = [block.mlp for block in blocks_of(trained)]
    shape, of_base = ((len(blocks_of(m)), m.config.hidden_size, m.config.intermediate_size) for m in (trained, model))
    if shape != of_base:
        raise ConfigError(
            f"model.experts_from {config.model.experts_from!r} has (blocks, width, FFN width) {shape}, the base "
            f"{of_base}: give a model that was trained from this base, `method: full`, exported"
        )
    if not modules_of(model)[0].copies:
        raise ConfigError(
            "model.experts_from needs experts as wide as the base's FFN whose weights sum to 1: `moe.width: null`, "
            "`moe.renormalise: true`, `moe.routed_scale: 1.0`"
        )
    divided = config.train.zero_stage == 3
    for moe in modules_of(model):
        ffn = ffns[moe.index]
        with writing(list(moe.experts.parameters())) if divided else nullcontext():
            moe.experts.copy_from(ffn)
