"""What a block's attention reads where it looks at everything it may see equally: the mean of the values.

The language gate takes it as its context: times the number of tokens seen, it is their sum. The attention kernel of one
block is called a second time, with queries of zero, on the keys, values and mask of its first call: so packed
documents, padding, sliding windows and caches count as they do for the base, under every kernel and in serving engines,
nothing has to be kept between calls, and the base's own call is what it was.

B batch, S sequence, H heads, d their width, C = H·d + 1
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moect.errors import UnsupportedModelError
from moect.model.record import RECORD, ForwardRecord

PREFIX = "moect|"
_LISTENS = ContextVar("moect_listens", default=False)  # of this thread's pass
IN_FP32 = ("eager", "sdpa")  # kernels that take it; a mean that others have rounded is multiplied by n all the same
ENOUGH = 256  # tokens; after so many, the mean counts as that of so many


class Listening:
    """A block's attention config: the base's own, but that inside `listening` the kernel is one that listens.

    Outside it nothing may look different: serving engines tell by the kernel's name which modules they have to serve.
    """

    def __init__(self, config):
        self.config = config

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)

    @property
    def _attn_implementation(self) -> str:
        if not _LISTENS.get():
            return self.config._attn_implementation
        kernel = self.config._attn_implementation or "eager"
        name = PREFIX + kernel
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, partial(_attend_and_listen, kernel))
        return name


def listen(attention: nn.Module) -> None:
    """Let an attention module leave its even attention in the record that it is given by the keyword `RECORD`, if it is
    given one."""
    attention.config = Listening(attention.config)


def stop_listening(attention: nn.Module) -> None:
    """Undo `listen`, where it was called."""
    if isinstance(attention.config, Listening):
        attention.config = attention.config.config


@contextmanager
def listening(do: bool = True) -> Iterator[None]:
    """Inside, the attention modules that `listen` was called on do; or do not, where something outer lets them."""
    before = _LISTENS.set(do)
    try:
        yield
    finally:
        _LISTENS.reset(before)


@torch.no_grad()
def context_of(record: ForwardRecord, position_ids_BS: Tensor) -> Tensor:
    """The values of the tokens seen, added up, and their number n: (Σ v, n) / ENOUGH.

    Args:
        record: that an attention module was given which listens.
        position_ids_BS: int64, from 0 in each text; also (1, S).

    Returns:
        (B, S, C) fp32. Where more than ENOUGH tokens are seen, the mean of all of them counts ENOUGH times; with a
        sliding window shorter than that, n goes on to ENOUGH all the same.
    """
    mean_BSC, record.heard_BSHd = record.heard_BSHd.flatten(2).float(), None
    mean_BSC = nn.functional.pad(mean_BSC, (0, 1), value=1.0)
    return mean_BSC * ((position_ids_BS + 1).clamp(1, ENOUGH)[..., None] / ENOUGH)


def context_width(base_config) -> int:
    """C, of a base with this Hugging Face config."""
    heads = base_config.num_attention_heads
    return heads * (getattr(base_config, "head_dim", None) or base_config.hidden_size // heads) + 1


def _attend_and_listen(kernel: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    """An attention function of transformers: that of the name `kernel`, and with a record once more, evenly."""
    record, attend = kwargs.pop(RECORD, None), _kernel(kernel, module)
    with listening(False):  # some kernels look their own name up
        result = attend(module, query, key, value, *args, **kwargs)
        if record is None:
            return result
        if kwargs.get("cache") is not None:  # the kernel would put keys and values into it again
            raise UnsupportedModelError(
                "the language gate's context cannot be had from a paged cache of transformers; use generate(), or vLLM"
            )
        with torch.no_grad():
            if kernel in IN_FP32:
                query, key, value = query.float(), key.float(), value.float()
            even, _ = attend(module, torch.zeros_like(query), key, value, *args, **{**kwargs, "dropout": 0.0})
    B, S = query.shape[0], query.shape[2]
    record.heard_BSHd = even.reshape(B, S, query.shape[1], -1)
    return result


def _kernel(name: str, module: nn.Module) -> Callable:
    if name == "eager":  # each family has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
