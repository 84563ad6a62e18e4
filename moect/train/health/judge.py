"""Whether a step is taken: by its loss and its gradient norm, against those of the steps before it."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, pstdev

import torch
from torch import Tensor

from moect.health_config import HealthConfig

HISTORY = "health"  # its name in a checkpoint


class Judge:
    """Knows the last steps that were taken, and how many were skipped since.

    All of it is part of a run's state. Given the same numbers on all ranks it says the same on all.

    Attributes:
        taken: optimizer steps that were taken, ever.
        skips_in_row: steps skipped since the last that was taken.
    """

    def __init__(self, health: HealthConfig):
        self.health = health
        self.taken = self.skips_in_row = 0
        self._past: deque[tuple[float, float]] = deque(maxlen=health.window)  # (loss, norm)

    def fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, by what it came to before the optimizer acts; None: nothing. It is counted."""
        fault = self._fault(loss, norm)
        if fault is None:
            self._past.append((loss, norm))
            self.taken += 1
            self.skips_in_row = 0
        else:
            self.skips_in_row += 1
        return fault

    def _fault(self, loss: float, norm: float) -> str | None:
        now = {"loss": loss, "norm": norm}
        for name, value in now.items():
            if not math.isfinite(value):
                return f"{name} {value}"
        if self.health.sigma is None or 2 * len(self._past) < self.health.window:
            return None
        for (name, value), past in zip(now.items(), zip(*self._past, strict=True), strict=True):
            spread = pstdev(past)
            most = fmean(past) + self.health.sigma * spread
            if value > most and spread > 0:
                return f"{name} {value:.6g} > {most:.6g}, the mean + {self.health.sigma:g} sigma"
        return None

    def forget(self) -> None:
        """Begin the history anew: what comes now cannot be compared with what was."""
        self._past.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Its history for a checkpoint: (2, n) fp64, losses and norms, oldest first."""
        return {HISTORY: torch.tensor(list(self._past), dtype=torch.float64).reshape(-1, 2).T.contiguous()}

    def values(self) -> dict[str, int]:
        """Its counts for a checkpoint."""
        return {"optimizer_steps": self.taken, "skips_in_row": self.skips_in_row}

    def load(self, tensors: dict[str, Tensor], info: dict) -> None:
        """Go on from a checkpoint; from one that knows nothing of this, as if no step was ever skipped."""
        self.taken, self.skips_in_row = steps_taken(info), info.get("skips_in_row", 0)
        self._past.clear()
        if HISTORY in tensors:
            self._past.extend((loss, norm) for loss, norm in tensors[HISTORY].T.tolist())


def steps_taken(info: dict) -> int:
    """Optimizer steps that were taken, by a checkpoint's plain values; the others were skipped."""
    return info.get("optimizer_steps", info["step"])
