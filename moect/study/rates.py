"""Each method's learning rate, by one rule for all: the best of a grid, which grows until the best is not at its end.

Judged by the mean bits per byte of the new languages on what the pilot runs are measured on, which should not be what
the study is measured on.
"""

from __future__ import annotations

import math

from moect.errors import DataError
from moect.monitor.reporting.figures import mean, role
from moect.monitor.reporting.run_files import read_run
from moect.study.plan import Study

FACTOR = 2.0  # between the grid's end and the next rate tried
MOST = 3  # rates that are tried beyond the grid


def outcome(study: Study, method: str, rate: float) -> float | None:
    """What a finished pilot run came to, in bits per byte, less being better; infinite for one that diverged; None: it
    is not finished.

    Raises:
        DataError: it was not measured.
    """
    job = study.pilot_job(method, rate)
    if (record := study.known(job)) is not None:
        return math.inf if record["bits_per_byte"] is None else record["bits_per_byte"]
    folder = study.folder / job.name
    if not study.ended(job):
        entries = read_run(folder).log.entries if (folder / "config.yaml").is_file() else []
        gave_up = entries and entries[-1].get("event") == "stop" and entries[-1].get("why")
        return math.inf if gave_up else None
    found = mean([row["bits_per_byte"] for row in role(read_run(folder).rows, "new") if row["step"] == job.steps])
    if found is None:
        raise DataError(
            f"{folder}: its end was not measured on new languages, so no learning rate can be chosen: look into "
            f"{study.folder}/logs, move the folder away and start again"
        )
    return found if math.isfinite(found) else math.inf


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


def tried_rates(study: Study, method: str) -> dict[float, float | None]:
    """The rates that a method was tried at, with their outcomes; None: that run is under way, or did not end well."""
    first = study.pilot.rates
    grid = {*first}
    for n in range(1, MOST + 1):
        grid |= {min(first) / FACTOR**n, max(first) * FACTOR**n}
    jobs = {rate: study.pilot_job(method, rate) for rate in sorted(grid)}
    begun = [rate for rate, job in jobs.items() if study.known(job) or (study.folder / job.name).is_dir()]
    return {rate: outcome(study, method, rate) for rate in begun}


def known_rates(study: Study) -> dict[str, float]:
    """The learning rates of methods and variants that are given, or chosen by now."""
    chosen = {}
    for method in study.methods.values():
        if method.has_pilots:
            tried = tried_rates(study, method.name)
            if tried and None not in tried.values() and not next_rates(tried, study.pilot.rates):
                chosen[method.name] = best_rate(tried)
    sources = {name: study.piloted(name) for name in (*study.methods, *study.variants)}
    known = {name: chosen.get(m.name) if m.rate is None else m.rate for name, m in sources.items()}
    return {name: rate for name, rate in known.items() if rate is not None}
