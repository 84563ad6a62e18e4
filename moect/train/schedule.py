"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from moect.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of the optimizer step `step`, counted from 0.

    Linear warm-up to `lr` over `warmup` steps; then `cosine` down to `min_lr`·`lr`, or `constant`, or `wsd`: stable,
    and linearly down to `min_lr`·`lr` over the last `decay` share of all steps (arXiv 2403.08763, section 7, on
    schedules without a fixed budget).
    """
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    last = train.lr * train.min_lr
    if train.schedule == "cosine":
        done = (step - train.warmup) / max(1, train.steps - 1 - train.warmup)
        return last + (train.lr - last) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if train.schedule == "wsd":
        decay_steps = round(train.decay * train.steps)
        left = train.steps - 1 - step
        if left < decay_steps:
            return last + (train.lr - last) * max(left, 0) / decay_steps
    return train.lr
