"""How much memory can still be had, so that a shape that cannot fit is refused before it is measured."""

from __future__ import annotations

import os
from math import inf
from pathlib import Path

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# controller in /proc/self/cgroup, its folder, limit, use, and what the kernel drops of the use when memory is short
VERSIONS = (
    ("", "", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: str) -> float:
    """Bytes that can still be had on `cpu` or `cuda`; infinity where the system does not say.

    On a GPU that is what the driver has left and what PyTorch's caching allocator holds without using it. On a CPU it
    is what the machine has available, or what the control groups of this process leave of it: the least of these.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(_available(), _left_by_control_groups())


def _available() -> float:
    meminfo = _table(PROC / "meminfo", ":")
    if "MemAvailable" in meminfo:
        return 1024 * int(meminfo["MemAvailable"].split()[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # a system without the function, or without this number
        return inf


def _left_by_control_groups() -> float:
    """A group is bound by the limits of those around it. In a container, the innermost that is seen is the root."""
    left = inf
    own = [line.split(":", 2) for line in _read(PROC / "self" / "cgroup").splitlines()]
    for controller, folder, limit, used, dropped in VERSIONS:
        paths = [path for _, controllers, path in own if controller in controllers.split(",")] or ["/"]
        root = CGROUPS / folder
        innermost = root / paths[0].lstrip("/")
        for group in (innermost, *innermost.parents):
            if not group.is_relative_to(root):
                break
            most, now = _read(group / limit).strip(), _read(group / used).strip()
            if most.isdigit() and now.isdigit():  # "max" is none
                cache = int(_table(group / "memory.stat", " ").get(dropped, 0))
                left = min(left, max(0, int(most) - int(now) + cache))
    return left


def _table(path: Path, separator: str) -> dict[str, str]:
    lines = (line.partition(separator) for line in _read(path).splitlines())
    return {key: value for key, _, value in lines}


def _read(path: Path) -> str:
    """What is not there on this system says nothing."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
