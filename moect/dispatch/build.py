"""Build the kernels of `csrc/`, by torch's cpp_extension: at first use, or before it by `moect kernels`.

A library is built beside its place and moved there, under a lock that ends with its process: ranks of a node wait for
one another, and a build that was killed leaves nothing that the next one trips over.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moect.locks import locked

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


class BuildError(Exception):
    """Why there is no library, in one line."""


def flags(device: str) -> dict[str, list[str]]:
    """What the compilers are told, besides what torch tells them; part of a library's name."""
    cpp = list(CPP_FLAGS)
    if torch.backends.openmp.is_available():
        cpp.append("-fopenmp")
    if flag := VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability()):
        cpp.append(flag)
    return {"extra_cflags": cpp, **({"extra_cuda_cflags": list(NVCC_FLAGS)} if device == "cuda" else {})}


def build(device: str, path: Path) -> bool:
    """Build a library, which loads it too.

    Args:
        device: `cpu` or `cuda`.
        path: where it is to be.

    Returns:
        False if another process has built it meanwhile; then it is not loaded.

    Raises:
        BuildError: no compiler, or one that failed.
        OSError: the folder cannot be written.
    """
    compiler = _compiler(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if path.is_file():
            return False
        _log.warning(f"compiling the expert kernels for {device}, once, into {path}")
        began = time.monotonic()
        for left in path.parent.glob(f"build-{path.stem}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"build-{path.stem}-", dir=path.parent) as place:
            _compile(device, compiler, Path(place), path.with_suffix(".log"))
            (built,) = Path(place).glob("*.so")  # torch numbers the name if this process has tried before
            os.replace(built, path)
        path.with_suffix(".log").unlink(missing_ok=True)
        _log.info(f"compiled in {time.monotonic() - began:.0f} s")
    return True


def _compiler(device: str) -> str:
    """The C++ compiler's command."""
    given = os.environ.get("CXX")
    command = given or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if command is None or not shutil.which(command):
        if given and shutil.which(given.split()[0]):
            raise BuildError(f"CXX is `{given}`, and torch takes a compiler without options there")
        raise BuildError(f"there is no C++ compiler ({given or 'c++, g++ or clang++'}) to build it with")
    if device == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME

        if torch.version.cuda is None:
            raise BuildError("this torch has no CUDA")
        if CUDA_HOME is None:
            raise BuildError("there is no CUDA compiler (nvcc; set CUDA_HOME) to build it with")
    return command


def _compile(device: str, compiler: str, place: Path, log: Path) -> None:
    from torch.utils import cpp_extension

    sources = [str(CSRC / name) for name in SOURCES[device]]
    # ninja is a package beside this python, which need not be on the PATH
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    try:
        with _environment(PATH=path, CXX=compiler):
            cpp_extension.load(
                f"moect_{device}", sources, build_directory=str(place), is_python_module=False, **flags(device)
            )
    except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
        log.write_text(str(error), encoding="utf-8")
        raise BuildError(f"compiling it failed: {_cause(str(error))}; see {log}") from error


def _cause(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    found = re.search(r"(?:fatal )?error ?: .*|nvcc fatal .*|.*not found.*|.*cannot find .*", output)
    lines = [line for line in output.splitlines() if line.strip()] or ["it said nothing"]
    return found[0].strip() if found else lines[-1].strip()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
