"""What a run watches itself for: bad steps, ranks that drift apart, hangs."""

from __future__ import annotations

from dataclasses import dataclass

from moect.moe_config import option


@dataclass
class HealthConfig:
    """When a step is skipped, a run sent back, and silence taken for a failure."""

    __pydantic_config__ = {"extra": "forbid"}
    sigma: float | None = option(
        6.0, "skip a step whose loss or gradient norm lies so many standard deviations above the mean; null: never"
    )
    window: int = option(128, "steps that mean and deviation are taken over; judged once half of them are there")
    max_skips: int = option(10, "steps skipped in a row before the run goes back to its last good checkpoint")
    max_rollbacks: int = option(3, "times that it goes back so before the run ends")
    check_ranks_every: int = option(
        100, "steps between comparisons of all ranks' parameters, bit by bit; 0: never. Also at each checkpoint"
    )
    hang_minutes: float = option(10.0, "without a step for so long, every rank prints where it stands; 0: never")
    timeout_minutes: float = option(30.0, "so long ranks wait for one another before a lost one ends the run")


def check_health(health: HealthConfig) -> None:
    """ValueError for values that make no sense."""
    if health.sigma is not None and not health.sigma > 0:
        raise ValueError(f"`health.sigma` is {health.sigma}: it must be positive, or null for never")
    for key, least in (("window", 2), ("max_skips", 1), ("max_rollbacks", 0), ("check_ranks_every", 0)):
        if getattr(health, key) < least:
            raise ValueError(f"`health.{key}` is {getattr(health, key)}: it must be at least {least}")
    if not 0 <= health.hang_minutes < 1e6:
        raise ValueError(f"`health.hang_minutes` is {health.hang_minutes}: it cannot be negative")
    if not 0 < health.timeout_minutes < 1e6:
        raise ValueError(f"`health.timeout_minutes` is {health.timeout_minutes}: it must be positive")
