"""The compiled kernels: built from `csrc/` at first use, or before it by `moect kernels`; loaded once.

    $MOECT_KERNELS/moect_cpu-KEY.so    default: ~/.cache/moect/kernels

KEY is a digest of the sources, the compiler's flags and torch's version, so that one folder serves several checkouts
and machines. A library is built beside its place and moved there, under a lock that ends with its process: ranks of a
node wait for one another, and a build that was killed leaves nothing that the next one trips over.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = {"cpu": ("ops.cpp", "cpu_experts.cpp", "cpu_kernels.cpp"), "cuda": ("cuda.cpp", "kernels.cu")}
CSRC = Path(__file__).parent / "csrc"
# no errno and no traps: without them the loops over rows become vector instructions
CPP_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math")
VECTOR_FLAGS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
NVCC_FLAGS = (
    "-O3",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",  # for newer ones, compiled by the driver
)

_log = logging.getLogger("moect.dispatch")


@torch.compiler.assume_constant_result  # not to be traced, only called
def load(device: str) -> str | None:
    """Load the kernels for `cpu` or `cuda`, after building them if need be.

    Returns:
        None, or in one line why there are none: no compiler, a build that failed, a folder that cannot be written.
    """
    return _load(device)


@functools.cache
def _load(device: str) -> str | None:
    if device == "cuda" and (reason := load("cpu")):  # it holds the operators' signatures
        return reason
    built = False
    try:
        path = library(device)
        if not path.is_file():
            if reason := _no_compiler(device):
                return reason
            built = _build(device, path)
        if not built:
            torch.ops.load_library(path)
    except OSError as error:
        if error.strerror:
            return f"{error.strerror} ({error.filename})"
        return f"it cannot be loaded: {error.__cause__ or error}; remove it, and it is built again"
    except RuntimeError as error:
        return str(error)
    _define(device)
    return None


def _define(device: str) -> None:
    from moect.dispatch import cuda, experts_op, kernel_ops

    if device == "cpu":  # this library has the signatures of all operators, for either device
        experts_op.define("experts")
        kernel_ops.define()
        cuda.define()


def folder() -> Path:
    """Where built kernels are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "moect" / "kernels"
    return Path(os.environ.get("MOECT_KERNELS") or default).expanduser()


def library(device: str) -> Path:
    """Where the kernels of this checkout, for this torch and kind of machine, are or will be."""
    digest = hashlib.sha256(repr((torch.__version__, _flags(device))).encode())
    for path in sorted([*(CSRC / name for name in SOURCES[device]), *CSRC.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return folder() / f"moect_{device}-{digest.hexdigest()[:16]}.so"


def _flags(device: str) -> dict[str, list[str]]:
    cpp = list(CPP_FLAGS)
    if torch.backends.openmp.is_available():
        cpp.append("-fopenmp")
    if flag := VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability()):
        cpp.append(flag)
    return {"extra_cflags": cpp, **({"extra_cuda_cflags": list(NVCC_FLAGS)} if device == "cuda" else {})}


def _no_compiler(device: str) -> str | None:
    compiler = os.environ.get("CXX", "g++" if sys.platform == "linux" else "c++")
    if not shutil.which(compiler):
        return f"there is no C++ compiler ({compiler}) to build it with"
    if device == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME

        if torch.version.cuda is None:
            return "this torch has no CUDA"
        if CUDA_HOME is None:
            return "there is no CUDA compiler (nvcc; set CUDA_HOME) to build it with"
    return None


def _build(device: str, path: Path) -> bool:
    """Build the library, and so load it; False where another process has built it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if path.is_file():
            return False
        _log.info(f"compiling the expert kernels for {device}, once, into {path}")
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as place:
            _compile(device, Path(place), path.with_suffix(".log"))
            os.replace(Path(place) / f"moect_{device}.so", path)
        _log.info(f"compiled in {time.monotonic() - began:.0f} s")
    return True


def _compile(device: str, place: Path, log: Path) -> None:
    from torch.utils import cpp_extension

    sources = [str(CSRC / name) for name in SOURCES[device]]
    try:
        with _ninja_on_path():
            cpp_extension.load(
                f"moect_{device}", sources, build_directory=str(place), is_python_module=False, **_flags(device)
            )
    except (RuntimeError, ImportError) as error:
        log.write_text(str(error))
        found = re.search(r"(?:fatal )?error: .*", str(error))
        raise RuntimeError(f"compiling it failed: {found[0] if found else error}; see {log}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja is a package beside this python, which need not be on the PATH."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
