"""How much memory a call takes beyond what was alive before it, at its highest moment.

On a GPU the caching allocator keeps that count itself, in blocks of 512 bytes. On a CPU PyTorch's allocator is replaced
for the length of the call by one that counts (`counting_allocator.cpp`, compiled in a second or two at first use):
exact to the byte, on every thread and inside C++ operators. PyTorch's profiler would not do: it does not see what the
worker threads of a parallel loop allocate.

What is not counted on a CPU is what does not come from PyTorch's allocator: scratch of oneDNN and MKL, `std::vector`s,
Python objects. The call's results count, as they are alive at its end.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("moect.bench")

SOURCE = Path(__file__).with_name("counting_allocator.cpp")


def peak_extra_bytes(call: Callable[[], object], device: str) -> int | None:
    """Bytes of tensors on `device` that `call` adds at its highest moment; None where they cannot be counted.

    They cannot on a CPU without a C++ compiler, which is logged once.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak
    counter = _counter()
    if counter is None:
        return None
    counter.count_begin()
    try:
        result = call()
    finally:
        peak = counter.count_end()
    del result
    return peak


@cache
def _counter() -> ctypes.CDLL | None:
    """The counting allocator, compiled against the torch that runs."""
    from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

    with tempfile.TemporaryDirectory(prefix="moect-") as folder:
        library = Path(folder) / "counting_allocator.so"  # once loaded, the file is no longer needed
        options = ["-shared", "-fPIC", "-O1", "-std=c++20", *(f"-I{path}" for path in include_paths())]
        options += [str(SOURCE), "-o", str(library), *(f"-L{path}" for path in library_paths()), "-lc10"]
        try:
            # CXX may have options, as in `g++ -O1`, which torch gives as they are; set to nothing, it says nothing
            compiler = shlex.split(get_cxx_compiler()) or ["c++"]
            subprocess.run([*compiler, *options], check=True, capture_output=True, text=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            log.warning("peak memory is not measured: the C++ compiler cannot build %s: %s", SOURCE.name, said)
            return None
        counter = ctypes.CDLL(str(library))
    counter.count_end.restype = ctypes.c_int64
    return counter
