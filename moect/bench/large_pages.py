"""Memory on large pages, as our own CPU kernels ask for it: a floor on small ones would lie above them.

A product into small pages waits for the translation of far more addresses. PyTorch's allocator asks for large ones only
where THP_MEM_ALLOC_ENABLE is set; `moect.bench.machine` records it, and the mode of the system.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes: of x86-64, and of 64-bit Arm with base pages of 4 KiB
ALIGNMENT = 64  # bytes: PyTorch's own


def zeros(like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Zeros in the dtype and on the device of `like`, whose memory has been written once.

    On a CPU under Linux they lie behind one another in one region that asks for large pages; a system that has none, or
    is told to give none, gives small ones.
    """
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [like.new_zeros(shape) for shape in shapes]
    counts = [prod(shape) for shape in shapes]
    sizes = [_up(count * like.itemsize, ALIGNMENT) for count in counts]
    # private: the mode of a shared region is another one, and off nearly everywhere
    region = mmap.mmap(-1, _up(sum(sizes), PAGE) + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a hint, which a kernel without large pages refuses
        region.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(region, dtype=torch.uint8)  # which keeps the region alive
    start = -raw.data_ptr() % PAGE
    raw[start:].zero_()
    made = []
    for shape, count, size in zip(shapes, counts, sizes, strict=True):
        made.append(raw[start : start + count * like.itemsize].view(like.dtype).view(shape))
        start += size
    return made


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
