"""The compiled kernels: loaded once a process, built before that where they are not there yet.

    $MOECT_KERNELS/moect_cpu-KEY.so    default: ~/.cache/moect/kernels

KEY is a digest of the sources, the compiler's flags and torch's version, so that one folder serves several checkouts
and machines.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from moect.dispatch.build import CSRC, SOURCES, BuildError, build, flags

_definitions: list[Callable[[], None]] = []
_LOADING = threading.Lock()  # of the threads of one process; processes wait for one another at a file


@torch.compiler.assume_constant_result  # not to be traced, only called
def load(device: str) -> str | None:
    """Load the kernels for `cpu` or `cuda`, after building them if need be.

    Returns:
        None, or in one line why there are none: no compiler, a build that failed, a folder that cannot be written.
    """
    with _LOADING:
        return _load(device)


@functools.cache
def _load(device: str) -> str | None:
    if device == "cuda" and (reason := _load("cpu")):  # it holds the operators' signatures
        return reason
    path = library(device)
    try:
        # a build loads what it has built
        built = False if path.is_file() else build(device, path)
        if not built:
            torch.ops.load_library(path)
    except BuildError as error:
        return str(error)
    except OSError as error:
        if error.strerror is None:
            return f"it cannot be loaded: {error.__cause__ or error}; remove it, and it is built again"
        where = error.filename or path.parent
        return f"{error.strerror} ({where}); set MOECT_KERNELS to a folder that can be written"
    if device == "cpu":  # it has the signatures of all operators, for either device
        for define in _definitions:
            define()
    return None


def when_loaded(define: Callable[[], None]) -> None:
    """Have `define` called as soon as the operators are there: what torch must know of them besides their code."""
    _definitions.append(define)


def folder() -> Path:
    """Where built kernels are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("MOECT_KERNELS") or Path(cache) / "moect" / "kernels"
    return Path(chosen).expanduser().absolute()


def library(device: str) -> Path:
    """Where the kernels of this checkout, for this torch and kind of machine, are or will be."""
    digest = hashlib.sha256(repr((torch.__version__, flags(device))).encode())
    for path in sorted([*(CSRC / name for name in SOURCES[device]), *CSRC.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return folder() / f"moect_{device}-{digest.hexdigest()[:16]}.so"
