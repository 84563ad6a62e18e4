"""The trained model as training itself builds it: by transformers, peft and the trainer's own reading of a checkpoint.

Nothing of the exporter's reading and merging is in it, so that it can be held against both.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from moect.config import RunConfig
from moect.data.vocabulary.extended_tokenizer import Extension
from moect.model.append import modules_of
from moect.model.build import DTYPES, build_model, merge_lora
from moect.train.checkpoints.reading import load_module
from moect.train.token_rows import kept_rows


def live_model(config: RunConfig, checkpoint: Path, dtype: str, extension: Extension | None = None) -> nn.Module:
    """The model of a checkpoint with weights as they are exported, computing in fp32 as `assemble`'s does.

    The checkpoint's fp32 tensors are rounded to `dtype` once, low-rank updates after they were added to the weights.

    Args:
        config: the run.
        checkpoint: its folder.
        dtype: `fp32` or `bf16`.
        extension: tokens that were added to the base's.

    Raises:
        CheckpointError: the checkpoint is not of this model.
        ConfigError: the base cannot be loaded.
    """
    merges = config.method == "lora"
    config = replace(
        config,
        model=replace(config.model, attention="eager"),
        train=replace(config.train, precision="fp32" if merges else dtype, zero_stage=0),
    )
    model = build_model(config, rows=kept_rows(checkpoint), extension=extension).eval()
    load_module(model, checkpoint)
    if merges:
        merge_lora(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
    for moe in modules_of(model):
        moe.experts.backend = "reference"
    return model.requires_grad_(False)
