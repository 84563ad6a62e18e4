"""Speed and memory of a training: tokens a second, time left, the share of the machine's arithmetic that is used (MFU),
and the most memory that a rank took."""

from __future__ import annotations

import logging
import re
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from moect.errors import ConfigError

log = logging.getLogger("moect.train")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        flops: dense bf16 peak in FLOP/s, from the maker's data sheet.
        memory: GiB that a program can have, as drivers report them; less than the name says where ECC takes its part.
    """

    flops: float
    memory: float


# the words of a name must all be among those of the device's; the longest name wins
GPUS = {
    "B200": Gpu(2250e12, 178),
    "H200": Gpu(989e12, 139),
    "H100": Gpu(989e12, 79),
    "H100 PCIe": Gpu(756e12, 79),
    "H100 NVL": Gpu(835e12, 93),
    "H800": Gpu(989e12, 79),
    "A100 80GB": Gpu(312e12, 79),
    "A100 40GB": Gpu(312e12, 39),
    "A800": Gpu(312e12, 79),
    "L40S": Gpu(362e12, 44),
    "A40": Gpu(150e12, 44),
    "L4": Gpu(121e12, 22),
    "RTX 4090": Gpu(165e12, 23.6),
    "RTX 3090": Gpu(71e12, 23.6),
}


def find_gpu(name: str) -> tuple[str, Gpu]:
    """A GPU by its name in GPUS, capitals and small letters alike; the name as it stands there comes first.

    Raises:
        ConfigError: no such name.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return known, gpu
    raise ConfigError(f"--gpu {name!r}: not in the table; choose one of {', '.join(GPUS)}")


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak matrix-product rate of one rank's device in FLOP/s, and where the figure comes from.

    From the data sheet for known GPUs in bf16, else measured.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        words = set(re.split(r"[\s-]", name))
        known = [key for key in GPUS if words.issuperset(key.split())]
        if known:
            return GPUS[max(known, key=len)].flops, f"data sheet, {name}"
    return product_flops(device, dtype), "measured at the start"


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, the best of ten.

    Their size doubles for as long as the next ones take less than about half a second together: a CPU without bf16
    arithmetic takes fifty times as long for them as in fp32.
    """
    largest, n = 4096 if device.type == "cuda" else 1024, 128
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(10):
            _wait(device)
            start = time.perf_counter()
            a @ b
            _wait(device)
            best = min(best, time.perf_counter() - start)
        if n == largest or best * 8 > 0.05:
            return 2 * n**3 / best
        n *= 2


def slow_precision(device: torch.device, dtype: torch.dtype, peak: float) -> str | None:
    """What to say where a CPU is faster in fp32 than in the `dtype` of training, whose products reach `peak` FLOP/s."""
    if device.type != "cpu" or dtype == torch.float32:
        return None
    times = product_flops(device, torch.float32) / peak
    if times < 2:
        return None
    return f"this CPU has no fast bf16: products take {times:.0f} times as long as in fp32; see train.precision"


class Meter:
    """Tokens a second, time left and MFU over the last steps.

    Args:
        tokens_per_step: over all ranks.
        flops_per_token: of training.
        peak: FLOP/s of one rank's device.
        world_size: number of ranks.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: int, peak: float, world_size: int, window: int = 50):
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_token * tokens_per_step
        self.peak = peak * world_size
        self.seconds: deque[float] = deque(maxlen=window)
        self.total = 0.0  # seconds of all steps
        self._start = self._read = 0.0

    def start_step(self) -> None:
        """Call before a step."""
        self._start = time.perf_counter()

    def end_step(self) -> None:
        """Call after a step."""
        took = time.perf_counter() - self._start
        self.seconds.append(took)
        self.total += took

    def read(self, steps_left: int) -> dict[str, float]:
        """tokens_per_second, mfu (0 to 1), step_seconds and eta_seconds; and seconds, of all steps since it was read
        last."""
        mean = sum(self.seconds) / len(self.seconds)
        before, self._read = self._read, self.total
        return {
            "tokens_per_second": self.tokens_per_step / mean,
            "mfu": self.flops_per_step / mean / self.peak,
            "step_seconds": mean,
            "eta_seconds": mean * steps_left,
            "seconds": self.total - before,
        }


def reset_peak_memory(device: torch.device) -> None:
    """From here on `peak_memory` looks for the greatest moment anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak resident set is the present one again
    except OSError:
        _tell_of_no_reset()


def peak_memory(device: torch.device) -> int:
    """The most memory that this rank has taken since `reset_peak_memory`, in bytes.

    On a GPU what tensors took, without what CUDA and NCCL have for themselves. On a CPU the whole process: its resident
    set, with the libraries.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    except (OSError, TypeError):  # no Linux, or one that does not say it
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def greatest_peak_memory(device: torch.device) -> int:
    """`peak_memory` of the rank that took most. Every rank calls it."""
    peak = torch.tensor(peak_memory(device), device=device)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


def duration(seconds: float) -> str:
    """Seconds as `1d 3h`, `2h 05m`, `3m 20s` or `12s`."""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400}d {seconds % 86400 // 3600}h"
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


@cache
def _tell_of_no_reset() -> None:
    log.info("peak memory counts from the start of the process: /proc/self/clear_refs cannot be written here")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
