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
    blocks = blocks_of(rows)
    even = 1 / load_LE.shape[1]
    reached = [
        Expert(block, expert, float(load), even)
        for block, load_E in zip(blocks, load_LE, strict=True)
        for expert, load in enumerate(load_E)
        if load_E.sum() > 0
    ]
    dead = sorted((e for e in reached if e.load < DEAD * even), key=lambda e: e.load)
    return dead, sorted((e for e in reached if e.load > OVERLOADED * even), key=lambda e: -e.load)


def mean_load(rows: list[Row]) -> np.ndarray | None:
    """(L, E): share of a block's assignments that each expert gets over all texts; all 0 in a block that no token
    reached; None without modules.

    A text weighs by its tokens that reach the experts (by its bytes in rows of before tokens were counted).
    """
    measured = [row for row in rows if row.get("expert_load")]
    if not measured:
        return None
    unit = unit_of_weight(measured)
    weights = [row.get(unit, 1) * row.get("open_share", 1.0) for row in measured]
    total_LE = sum(np.array(row["expert_load"]) * weight for row, weight in zip(measured, weights, strict=True))
    sum_L1 = total_LE.sum(1, keepdims=True)
    return np.divide(total_LE, sum_L1, out=np.zeros_like(total_LE), where=sum_L1 > 0)


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
    load_LE = np.array(row["expert_load"], dtype=float)
    terms_LE = load_LE * np.log(load_LE, out=np.zeros_like(load_LE), where=load_LE > 0)
    entropy_L = -terms_LE.sum(1) / np.log(load_LE.shape[1]) if load_LE.shape[1] > 1 else np.ones(len(load_LE))
    return np.where(load_LE.sum(1) > 0, entropy_L, np.nan)
