"""Build a model whose parameters are divided among the ranks from the start: no rank ever holds it whole (ZeRO-3).

A divided parameter is empty. DeepSpeed keeps this rank's piece of it in `ds_tensor` and its full shape in `ds_shape`,
and gathers it where a forward pass needs it. The settings are DeepSpeed's, with the engine's thresholds, which decide
what stays whole in use. Every rank makes the same calls in the same order.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape, divided or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def loading_divided(settings: dict):
    """Inside, transformers divides every parameter of a model as it makes it, and reads the weights tensor by tensor.

    What tells it to is global to the process: it ends here, and later models are loaded whole.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(settings)  # transformers refers to it weakly
    try:
        yield alive
    finally:
        unset_hf_deepspeed_config()


def divide(model: nn.Module, settings: dict) -> None:
    """Divide a model that every rank holds whole, with the same values."""
    from deepspeed import zero

    zero.Init(module=model, config_dict_or_path=settings)


@contextmanager
def dividing(ffn: nn.Module, module: nn.Module):
    """Inside, the divided `ffn` is whole, to be read. Afterwards `module`, whole till then, is divided too."""
    from deepspeed import zero

    with zero.GatheredParameters(ffn.parameters()):
        yield
    next(ffn.parameters()).convert_to_zero_parameters(param_list=list(module.parameters()))


@contextmanager
def writing(parameters: list[nn.Parameter]):
    """Inside, divided parameters are whole; what the first rank writes into them counts."""
    from deepspeed import zero

    with zero.GatheredParameters(parameters, modifier_rank=0):
        yield
