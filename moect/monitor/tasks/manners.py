"""lm-eval inside a training: it must neither talk nor change what it finds.

As a command it seeds every generator, shows bars and warns of much that only the author of a task can use.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
from collections.abc import Iterator
from functools import cache
from unittest import mock

from moect.errors import ConfigError

log = logging.getLogger("moect.monitor")


@contextlib.contextmanager
def calm(tell: bool) -> Iterator[None]:
    """Inside, lm-eval shows bars only where transformers does, writes no log, and loads no code from the hub; it leaves
    environment variables as they were.

    Args:
        tell: pass its warnings on afterwards, one of each kind, with their number; else drop them.
    """
    environment = dict(os.environ)
    library, heard = logging.getLogger("lm_eval"), _Heard()
    propagates = library.propagate
    library.addHandler(heard)
    library.propagate = False
    try:
        with contextlib.ExitStack() as stack:
            _hide_bars(stack)
            stack.enter_context(mock.patch("evaluate.load", _refuse))
            yield
    finally:
        library.removeHandler(heard)
        library.propagate = propagates
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    if tell:
        for kind, messages in heard.by_kind.items():
            _tell_once(kind, f"lm-eval: {messages[0]}" + f" ({len(messages)} times)" * (len(messages) > 1))


@contextlib.contextmanager
def own_seeds() -> Iterator[None]:
    """Inside, Python, NumPy and torch are seeded as the `lm_eval` command seeds them; afterwards they are as before."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.default_generator.manual_seed(DEFAULT_OTHER_SEED)  # torch.manual_seed is for all devices
            if devices:
                torch.cuda.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _Heard(logging.Handler):
    """Keeps warnings, by what they say apart from the numbers in it."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.by_kind: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        self.by_kind.setdefault(re.sub(r"\d+", "#", message), []).append(message)


def _hide_bars(stack: contextlib.ExitStack) -> None:
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    if transformers_logging.is_progress_bar_enabled():
        return
    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        stack.enter_context(mock.patch.object(module, "tqdm", lambda *a, **k: tqdm(*a, **{**k, "disable": True})))
    if datasets.are_progress_bars_disabled():
        return
    datasets.disable_progress_bars()
    stack.callback(datasets.enable_progress_bars)


def _refuse(path: str, *args, **kwargs):
    raise ConfigError(f"the metric {path!r} would be code from the hub, which is never run")


@cache
def _tell_once(kind: str, text: str) -> None:
    log.warning(text)
