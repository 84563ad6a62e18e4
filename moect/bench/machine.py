"""Where a measurement was made: software and machine, for whoever reads the numbers later."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import torch
    import transformers

    import moect

    return {
        "moect": moect.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
    }


def machine(device: str) -> dict[str, str | int]:
    """The processor, its instructions as PyTorch uses them, the threads, and the GPU where one is used.

    Also what decides who gets large pages: the system's mode (`always`, `madvise`: who asks for them, `never`; empty
    where there is none), and the variable by which PyTorch's allocator asks for them (empty: unset, it does not).
    """
    import torch

    found: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "transparent hugepages": _bracketed(LARGE_PAGES),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", ""),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["gpu bytes"] = properties.total_memory
    return found


def _cpu_model() -> str:
    names = re.findall(r"^model name\s*: *(.+)$", _read(CPUINFO), re.MULTILINE)
    return names[0] if names else platform.machine()  # an Arm machine gives no name there


def _bracketed(path: Path) -> str:
    """The word that is chosen, as in `always [madvise] never`."""
    found = re.search(r"\[(\w+)\]", _read(path))
    return found[1] if found else ""


def _read(path: Path) -> str:
    """Empty where there is no such file: not every system is Linux."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
