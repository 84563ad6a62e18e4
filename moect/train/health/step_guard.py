"""An optimizer that can be told to leave a step out.

DeepSpeed calls the optimizer inside its own step, when gradients are reduced, their norm is known and, mostly, clipped:
once, or once for each group of parameters. What it does around that copies masters to where they came from, so that an
optimizer that does nothing leaves everything as it was: weights, moments and its count of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class StepGuard:
    """Stands before the `step` of an optimizer. (Not a subclass: DeepSpeed looks at the type.)

    Args:
        optimizer: torch's, inside DeepSpeed's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._plain_step = optimizer.step
        self._judge: Callable[[], bool] | None = None
        self._answer: bool | None = None
        optimizer.step = self._step

    @contextmanager
    def judged(self, judge: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
        """Inside, one optimizer step over all groups is taken only if `judge` says so; it is asked once, at the first
        group. What is given tells whether it was: DeepSpeed may leave the step out by itself."""
        self._judge, self._answer = judge, None
        try:
            yield lambda: self._answer is not None
        finally:
            self._judge = None

    def _step(self, closure=None):
        if self._judge is not None:
            if self._answer is None:
                self._answer = self._judge()
            if not self._answer:
                return None
        return self._plain_step(closure)
