"""The base that a model is held against: inside it where the method keeps it, else loaded beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial

from torch import nn

from moect.config import RunConfig
from moect.distributed import is_main, together
from moect.model.build import DTYPES, base_view, holds_base, load_base
from moect.monitor.measuring.exactness import Base

log = logging.getLogger("moect.monitor")


@contextmanager
def base_of(model: nn.Module, config: RunConfig, wanted: bool = True) -> Iterator[Base | None]:
    """Inside, what makes the base of a model: call it for a context whose value computes what the base computes.

    Args:
        model: the causal LM.
        config: of its run.
        wanted: whether it is needed; if not, none is loaded.

    Yields:
        It; None where it is not wanted, or training everything with ZeRO-3 has left none: one that is whole on every
        rank may not fit beside the model.
    """
    if not wanted:
        yield None
    elif holds_base(model):
        yield lambda: base_view(model)
    elif config.train.zero_stage == 3:
        _say_once("the base is not held beside a model that is trained whole with ZeRO 3: logits are not compared")
        yield None
    else:
        device = next(model.parameters()).device
        load = partial(load_base, config.model, DTYPES[config.train.precision], config.seed)
        base = together(lambda: load().to(device))  # the step at which memory gives out
        yield lambda: nullcontext(base)


@cache
def _say_once(text: str) -> None:
    if is_main():
        log.warning(text)
