"""Experts that get next to nothing, and experts that get far more than their part.

L blocks with a module, E experts
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moect.monitor.rows import Row

DEAD = 0.1  # of an even share: less is dead
OVERLOADED = 3.0  # of an even share: more is overloaded


@dataclass(frozen=True)
class Expert:
    """An expert whose load is out of the ordinary.

    Attributes:
        block: index of the base's block.
        expert: index in the block.
        load: its share of the block's assignments.
        even: what it would be if all experts of the block got the same.
    """

    block: int
    expert: int
    load: float
    even: float

    def __str__(self) -> str:
        load, even = (f"{100 * share:.1f}%" for share in (self.load, self.even))
        return f"block {self.block}, expert {self.expert}: {load} of assignments (even share {even})"


def odd_experts(rows: list[Row]) -> tuple[list[Expert], list[Expert]]:
    """Dead experts, which get less than a tenth of an even share over all texts, the least loaded first; and
    overloaded ones, which get more than three times an even share, the most loaded first.

    A block that no token reached has neither.

    Args:
        rows: of one step.
    """
    load_LE = mean_load(rows)
    if load_LE is None:
        return [], []
    reached = [
        Expert(block, expert, float(load), float(even))
        for block, load_E, even in zip(blocks_of(rows), load_LE, even_share(load_LE), strict=True)
        for expert, load in enumerate(load_E)
        if np.nansum(load_E) > 0 and not np.isnan(load)
    ]
    dead = sorted((e for e in reached if e.load < DEAD * e.even), key=lambda e: e.load)
    return dead, sorted((e for e in reached if e.load > OVERLOADED * e.even), key=lambda e: -e.load)


def mean_load(rows: list[Row]) -> np.ndarray | None:
    """(L, E): share of a block's assignments that each expert gets over all texts; all 0 in a block that no token
    reached, nan beyond the experts of a block that has fewer than others; None without modules.

    A text weighs by its tokens that reach the experts (by its bytes in rows of before tokens were counted).
    """
    measured = [row for row in rows if row.get("expert_load")]
    if not measured:
        return None
    unit = unit_of_weight(measured)
    weights = [row.get(unit, 1) * row.get("open_share", 1.0) for row in measured]
    total_LE = sum(load_of(row) * weight for row, weight in zip(measured, weights, strict=True))
    sum_L1 = np.nansum(total_LE, 1, keepdims=True)
    return total_LE / np.where(sum_L1 > 0, sum_L1, 1)


def load_of(row: Row) -> np.ndarray:
    """(L, E): a text's load, nan beyond the experts of a block that has fewer than others."""
    loads = row["expert_load"]
    load_LE = np.full((len(loads), max(map(len, loads))), np.nan)
    for load_E, given in zip(load_LE, loads, strict=True):
        load_E[: len(given)] = given
    return load_LE


def even_share(load_LE: np.ndarray) -> np.ndarray:
    """(L,): what every expert of a block would have if all had the same."""
    return 1 / (~np.isnan(load_LE)).sum(1)


def unit_of_weight(rows: list[Row]) -> str:
    """What texts weigh by: `tokens`, or `bytes` where tokens were not counted."""
    return "tokens" if all(row.get("tokens") for row in rows) else "bytes"


def blocks_of(rows: list[Row]) -> list[int]:
    """Indices of the blocks with a module; their numbers from 0 where older rows do not have them."""
    measured = next(row for row in rows if row.get("expert_load"))
    return measured.get("blocks") or list(range(len(measured["expert_load"])))


def load_entropy(row: Row) -> np.ndarray:
    """(L): how evenly a text's tokens are spread over a block's experts, entropy of their shares by its greatest
    value: 1 all alike, 0 one expert for all; nan in a block that no token reached."""
    load_LE = load_of(row)
    even_L = even_share(load_LE)
    terms_LE = np.nan_to_num(load_LE) * np.log(load_LE, out=np.zeros_like(load_LE), where=load_LE > 0)
    greatest_L = -np.log(even_L)
    entropy_L = np.divide(-terms_LE.sum(1), greatest_L, out=np.ones_like(even_L), where=greatest_L > 0)
    return np.where(np.nansum(load_LE, 1) > 0, entropy_L, np.nan)
