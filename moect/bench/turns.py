"""Timing in turns: one round is every contestant once, so that whatever slows the machine slows them all alike.

The order is drawn anew in each round: who always came after the same one would find its caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from random import Random
from statistics import median
from time import perf_counter
from typing import TypeVar

import torch

from moect.bench.contestants import Contestant

Timer = Callable[[Callable[[], object]], float]
Taken = TypeVar("Taken")

SECONDS = 20.0  # of timing for one shape and dtype, unless the fewest rounds take longer
FEWEST, MOST = 5, 101  # rounds
SLOW = 8.0  # times the floor: who is slower takes part in a quarter of the rounds
WARM_UPS = {"cpu": 1, "cuda": 3}


@dataclass
class Times:
    """Milliseconds of one contestant, an entry a round that it took part in."""

    forward: list[float] = field(default_factory=list)
    forward_backward: list[float] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return len(self.forward)


def timer(device: str) -> Timer:
    """Milliseconds that a call takes: by events on a GPU, which is idle when it starts, else by the clock."""
    if device == "cuda":
        return _cuda_milliseconds
    return _milliseconds


def take_turns(
    contestants: list[Contestant],
    device: str,
    rounds: int | None = None,
    seconds: float = SECONDS,
    seed: int = 0,
    measure: Timer | None = None,
    tell: Callable[[int, int, float], None] = lambda number, rounds, seconds: None,
) -> dict[str, Times]:
    """Time all contestants, the floor first among them.

    Those that took more than `SLOW` times as long as the floor in the
    warm-up take part in a quarter of the rounds, evenly spread, but in `FEWEST` where there are as many.

    Args:
        contestants: the first is the floor.
        rounds: None: as many as `seconds` allow, from `FEWEST` to `MOST`.
        seed: of the order in each round.
        measure: for tests: what replaces the clock.
        tell: called after each round with its number, the number of all and the seconds that are left, estimated.
    """
    measure = measure or timer(device)
    warm = {}
    for _ in range(WARM_UPS[device]):
        warm = {c.name: sum(_turn(c, measure)) for c in contestants}
    floor = warm[contestants[0].name]
    slow = {name for name, cost in warm.items() if cost > SLOW * floor}
    cost = sum(ms / 4 if name in slow else ms for name, ms in warm.items()) / 1000
    rounds = rounds or _rounds_in(seconds, cost)
    few = min(rounds, max(FEWEST, ceil(rounds / 4)))

    times = {c.name: Times() for c in contestants}
    draw = Random(seed)
    for number in range(rounds):
        for contestant in draw.sample(contestants, len(contestants)):
            if contestant.name in slow and (number + 1) * few // rounds == number * few // rounds:
                continue
            forward, forward_backward = _turn(contestant, measure)
            times[contestant.name].forward.append(forward)
            times[contestant.name].forward_backward.append(forward_backward)
        tell(number + 1, rounds, cost * (rounds - number - 1))
    return times


def rounds_of(
    one_round: Callable[[Random], Taken],
    rounds: int | None = None,
    seconds: float = SECONDS,
    seed: int = 0,
    tell: Callable[[int, int, float], None] = lambda number, rounds, seconds: None,
) -> list[Taken]:
    """What each round returned, for rounds that time themselves; the first two are warm-up, and say how long one takes.

    Args:
        one_round: draws the order of its turns from what it is given.
        rounds, seconds, seed, tell: as in `take_turns`.
    """
    draw = Random(seed)
    one_round(draw)
    began = perf_counter()
    one_round(draw)
    cost = perf_counter() - began
    rounds = rounds or _rounds_in(seconds, cost)
    taken = []
    for number in range(rounds):
        taken.append(one_round(draw))
        tell(number + 1, rounds, cost * (rounds - number - 1))
    return taken


def dense_flops_per_second(device: str, size: int = 8192, rounds: int = 20) -> float:
    """The rate of one large square matrix product in bf16, median: what the machine can do at its best."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    measure = timer(device)
    taken = [measure(lambda: torch.mm(a, b, out=out)) for _ in range(rounds + WARM_UPS[device])]
    return 2 * size**3 / (median(taken[WARM_UPS[device] :]) / 1000)


def _rounds_in(seconds: float, cost: float) -> int:
    return max(FEWEST, int(min(MOST, seconds / cost)))


def _turn(contestant: Contestant, measure: Timer) -> tuple[float, float]:
    return measure(contestant.forward), measure(contestant.forward_backward)


def _milliseconds(call: Callable[[], object]) -> float:
    began = perf_counter()
    result = call()
    taken = perf_counter() - began
    del result  # to free it is not timed
    return 1000 * taken


def _cuda_milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end)
