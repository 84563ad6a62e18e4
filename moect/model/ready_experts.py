"""Experts that begin as the FFNs of a model that was trained further already ("MoE-CT from CT", arXiv 2407.00875).

That model, made from the same base by training everything, has learned the new languages and forgotten some of the old;
its FFNs become the experts beside the base's own, which stay frozen.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
from torch import nn

from moect.config import ModelConfig, RunConfig
from moect.errors import ConfigError
from moect.model.append import modules_of
from moect.model.build import base_fingerprint, load_base, load_base_config
from moect.model.families import blocks_of
from moect.model.partition import writing

SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")


def check_source(config: RunConfig) -> None:
    """Whether experts can begin as the FFNs of `model.experts_from`, as far as configurations tell.

    Raises:
        ConfigError: it cannot be found, is of another family or shape, or the experts are no copies of an FFN.
    """
    source, base = load_base_config(_source(config), "model.experts_from"), load_base_config(config.model)
    shapes = [{name: getattr(of, name) for name in SHAPE} for of in (source, base)]
    if shapes[0] != shapes[1]:
        told = next(
            f"{name} {shapes[0][name]}, the base {shapes[1][name]}"
            for name in SHAPE
            if shapes[0][name] != shapes[1][name]
        )
        raise ConfigError(
            f"model.experts_from {config.model.experts_from!r} has {told}: give a model that was trained from this "
            "base, `method: full`, exported"
        )
    if not config.moe.starts_as_copies(base.intermediate_size):
        raise ConfigError(
            "model.experts_from needs experts as wide as the base's FFN whose weights sum to 1: `moe.width: null`, "
            "`moe.renormalise: true`, `moe.routed_scale: 1.0`"
        )


def source_digest(config: RunConfig) -> str | None:
    """A digest of the model in `model.experts_from`; None: there is none, or it is not at hand any more."""
    if not config.model.experts_from or not os.path.isdir(config.model.experts_from):
        return None
    return base_fingerprint(_source(config))


@torch.no_grad()
def take_experts(model: nn.Module, config: RunConfig) -> None:
    """Make every expert a copy of its block's FFN in `model.experts_from`, in place.

    Every rank reads that model whole, into host memory, and calls this; its embeddings and attention are not taken.

    Args:
        model: as `build_model` makes it, also divided among ranks.
        config: the run.

    Raises:
        ConfigError: as `check_source`, or the model cannot be loaded.
    """
    check_source(config)
    trained = load_base(_source(config), modules_of(model)[0].experts.down_proj.dtype)
    ffns = [block.mlp for block in blocks_of(trained)]
    divided = config.train.zero_stage == 3
    for moe in modules_of(model):
        with writing(list(moe.experts.parameters())) if divided else nullcontext():
            moe.experts.copy_from(ffns[moe.index])


def _source(config: RunConfig) -> ModelConfig:
    return ModelConfig(base=config.model.experts_from)
