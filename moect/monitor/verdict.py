"""What the measurements of a checkpoint mean: which languages lost more than they may, and which checkpoint is best."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from moect.config import RunConfig
from moect.data_config import KEPT
from moect.monitor.rows import Row
from moect.monitor_config import Limit, limit_of


@dataclass(frozen=True)
class Excess:
    """A text of an old language that lost more than it may.

    Attributes:
        lang, domain: of the text.
        delta: bits per byte lost.
        share: the same as a share of the base's.
        limit: that it is beyond.
    """

    lang: str
    domain: str
    delta: float
    share: float
    limit: Limit

    def __str__(self) -> str:
        lost = f"{100 * self.share:+.2f}%" if self.limit.relative else f"{self.delta:+.4f} bits per byte"
        return f"{self.lang} {self.domain} {lost} (limit {self.limit})"


@dataclass(frozen=True)
class Verdict:
    """Of one checkpoint.

    Attributes:
        step: of the checkpoint.
        excess: old texts beyond their limits, the furthest first; empty: the checkpoint is within the budget.
        gain: mean over the new texts; None: there is none.
        retention: mean over the old texts; None: there is none.
    """

    step: int
    excess: tuple[Excess, ...]
    gain: float | None
    retention: float | None

    @property
    def within(self) -> bool:
        """Whether no old language lost more than it may."""
        return not self.excess


def judge(rows: list[Row], config: RunConfig) -> Verdict:
    """The verdict on one checkpoint. It depends on the rows and the configuration alone.

    Args:
        rows: of one step, at least one.
        config: reads `monitor`; a base that is made from scratch has nothing to forget, and no limits.
    """
    excess = []
    for row in rows:
        limit = limit_of(config.monitor, row["lang"]) if row["role"] in KEPT and config.model.base else None
        base_bits = row["base_bits_per_byte"]
        if limit is not None and row["delta"] > limit.bits(base_bits):
            share = row["delta"] / base_bits if base_bits else math.inf
            excess.append(Excess(row["lang"], row["domain"], row["delta"], share, limit))
    excess.sort(key=lambda e: -e.share)
    return Verdict(rows[0]["step"], tuple(excess), _mean(rows, "gain"), _mean(rows, "retention"))


def verdicts(rows: list[Row], config: RunConfig) -> list[Verdict]:
    """The verdict on each step that can be compared with the others, by ascending step: all texts of
    `data.evaluation` were measured then, as they were at the last such step."""
    wanted = {(text.lang, text.domain) for text in config.data.evaluation}
    by_step: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if (row["lang"], row["domain"]) in wanted:
            by_step[row["step"]].append(row)
    keys = {
        step: {(r["lang"], r["domain"]): (r.get("key"), r["role"]) for r in of_step}
        for step, of_step in by_step.items()
    }
    complete = [step for step in sorted(by_step) if keys[step].keys() == wanted]
    return [judge(by_step[step], config) for step in complete if keys[step] == keys[complete[-1]]]


def best(rows: list[Row], config: RunConfig, steps: list[int] | None = None) -> Verdict | None:
    """The best checkpoint: within the budget, and there the greatest mean gain; without new texts the greatest mean
    retention; the later one of equals.

    Args:
        rows: all that were measured.
        config: the run's.
        steps: choose among these; None: among all that were measured after step 0.

    Returns:
        Its verdict; None: none of them was measured and is within the budget.
    """
    wanted = [v for v in verdicts(rows, config) if v.within and (v.step > 0 if steps is None else v.step in steps)]
    return max(wanted, key=_merit, default=None)


def _merit(verdict: Verdict) -> tuple:
    merit = verdict.gain if verdict.gain is not None else verdict.retention
    return (-math.inf if merit is None else merit, verdict.step)


def _mean(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None
