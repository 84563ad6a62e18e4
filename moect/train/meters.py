"""Speed: tokens a second, time left, and the share of the machine's arithmetic that is used (MFU)."""

from __future__ import annotations

import time
from collections import deque

import torch

# dense bf16 peaks in FLOP/s from the makers' data sheets, by a part of the device's name; the longest match wins
BF16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak matrix-product rate of one rank's device in FLOP/s, and where the figure comes from.

    From the data sheet for known GPUs in bf16, else measured: the best of thirty square products.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [part for part in BF16_PEAKS if part in name]
        if known:
            return BF16_PEAKS[max(known, key=len)], f"data sheet, {name}"
    n = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(30):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, "measured at the start"


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
        self._start = 0.0

    def start_step(self) -> None:
        """Call before a step."""
        self._start = time.perf_counter()

    def end_step(self) -> None:
        """Call after a step."""
        self.seconds.append(time.perf_counter() - self._start)

    def read(self, steps_left: int) -> dict[str, float]:
        """tokens_per_second, mfu (0 to 1), step_seconds and eta_seconds."""
        mean = sum(self.seconds) / len(self.seconds)
        return {
            "tokens_per_second": self.tokens_per_step / mean,
            "mfu": self.flops_per_step / mean / self.peak,
            "step_seconds": mean,
            "eta_seconds": mean * steps_left,
        }


def duration(seconds: float) -> str:
    """Seconds as `1d 3h`, `2h 05m`, `3m 20s` or `12s`."""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400}d {seconds % 86400 // 3600}h"
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
