"""Each method's learning rate, by one rule for all: the best of a grid, which grows until the best is not at its end.

Judged by the mean bits per byte of the new languages on what the pilot runs are measured on, which should not be what
the study is measured on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moect.monitor.reporting.figures import mean, role
from moect.monitor.reporting.run_files import read_run
from moect.study.plan import Study

FACTOR = 2.0  # between the grid's end and the next rate tried
MOST = 3  # rates that are tried beyond the grid


def outcome(study: Study, method: str, rate: float) -> float | None:
    """What a finished pilot run came to, in bits per byte, less being better; infinite for one that came to nothing;
    None: it is not finished."""
    job = study.pilot_job(method, rate)
    if not study.done(job):
        return None
    rows = [row for row in read_run(study.folder / job.name).rows if row["step"] == job.steps]
    found = mean([row["bits_per_byte"] for row in role(rows, "new")])
    return math.inf if found is None or not math.isfinite(found) else found


def next_rates(tried: dict[float, float | None], first: list[float]) -> list[float]:
    """The learning rates that are still to be tried; empty: the best of those tried is the method's.

    Args:
        tried: outcome by rate; None: it is under way.
        first: the grid to begin with.
    """
    if missing := [rate for rate in first if rate not in tried]:
        return missing
    if None in tried.values():
        return []
    best, low, high = best_rate(tried), min(tried), max(tried)
    further = [high * FACTOR] if best == high else [low / FACTOR] if best == low else []
    return [rate for rate in further if len(tried) < len(first) + MOST]


def best_rate(tried: dict[float, float]) -> float:
    """The rate with the least; of equals the lowest."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def tried_rates(study: Study, method: str, started: Callable[[str], bool]) -> dict[float, float | None]:
    """The rates that a method was tried at, with their outcomes; None: that run is under way, or has failed.

    Args:
        study: whose method it is.
        method: its name.
        started: whether the run of this name was.
    """
    first = study.pilot.rates
    grid = {*first}
    for n in range(1, MOST + 1):
        grid |= {min(first) / FACTOR**n, max(first) * FACTOR**n}
    return {rate: outcome(study, method, rate) for rate in sorted(grid) if started(study.pilot_job(method, rate).name)}
