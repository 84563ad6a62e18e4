"""The mixture: what share of the rows each corpus gets, and which corpus gives the next row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moect.data_config import KEPT
from moect.errors import ConfigError


def corpus_weights(
    tokens: list[int],
    roles: list[str],
    explicit: list[float | None],
    replay: float | None,
    temperature: float,
) -> np.ndarray:
    """The share of rows of each corpus, float64, sum 1.

    Args:
        tokens: size of each corpus.
        roles: `old`, `learnt` or `new`, of each corpus.
        explicit: the weight given in the configuration; None: tokens ** (1 / temperature).
        replay: share of rows of old and learnt languages, divided among them by weight; None: all corpora together by
            weight. Where only these or only new ones have corpora, they get everything.
        temperature: above 1 small corpora get more than their share of tokens; infinite: all the same.

    Raises:
        ConfigError: the corpora that are to share something all have weight 0.
    """
    sizes = np.array(tokens, dtype=np.float64) ** (1.0 / temperature)
    weights = np.array([size if w is None else w for size, w in zip(sizes, explicit, strict=True)], dtype=np.float64)
    if replay is not None:
        for role, share in (("old", replay), ("new", 1.0 - replay)):
            chosen = np.isin(roles, KEPT if role == "old" else role)
            total = weights[chosen].sum()
            if chosen.any() and share > 0 and total == 0:
                raise ConfigError(f"`data.train`: every source of a language of role `{role}` has weight 0; raise one")
            weights[chosen] *= share / total if total else 0.0
    if not np.isfinite(weights.sum()):
        raise ConfigError("`data.train`: a weight is not a finite number; check `weight` and `data.temperature`")
    if weights.sum() == 0:
        raise ConfigError("`data.train`: no source is left to draw from; raise a `weight`, or `data.replay`")
    return weights / weights.sum()


def limit_shares(
    shares: np.ndarray, limits: np.ndarray, groups: list[str], read: np.ndarray | None = None
) -> tuple[np.ndarray, list[str]]:
    """Shares of which none is above its limit; what is taken from one goes to the others of its group in proportion.

    With equal shares this is UniMax (Chung et al. 2023, arXiv 2304.09151, algorithm 1).

    Args:
        shares: float64, of each corpus.
        limits: float64, of what each gives with what it has given before, in the unit of the shares.
        groups: which corpora share with one another.
        read: float64, what each has given before; None: nothing.

    Returns:
        The shares, each group's sum as before; and the groups that have less room than their sum, where all come to the
        same multiple of their limits, but for those that are beyond it already and get nothing.
    """
    limited, crowded = shares.copy(), []
    read = np.zeros_like(limits) if read is None else read
    room_of_each = np.maximum(0.0, limits - read)
    for group in sorted(set(groups)):
        members = np.array([g == group for g in groups]) & (shares > 0)
        total = shares[members].sum()
        room = room_of_each[members].sum()
        if room <= total * (1 + 1e-12):
            if room < total * (1 - 1e-12):
                crowded.append(group)
            limited[members] = _levelled(limits[members], read[members], total)
            continue
        free = members.copy()
        while (above := free & (limited > room_of_each)).any():
            limited[above] = room_of_each[above]
            free &= ~above
            limited[free] = shares[free] * ((total - room_of_each[members & ~free].sum()) / shares[free].sum())
    return limited, crowded


def _levelled(limits: np.ndarray, read: np.ndarray, total: float) -> np.ndarray:
    """What brings all to the same multiple of their limits, where what is read already does not exceed that; sum
    `total`."""
    order = np.argsort(read / limits, kind="stable")
    multiples = (total + np.cumsum(read[order])) / np.cumsum(limits[order])  # if the first so many get something
    reached = np.append((read / limits)[order][1:], np.inf)
    multiple = multiples[np.argmax(multiples <= reached)]
    return np.maximum(0.0, multiple * limits - read)


@dataclass(frozen=True)
class Segment:
    """A part of a run with the same shares.

    Attributes:
        row: the run's first row in it.
        weights: float64, the share of each corpus.
        drawn: rows taken from each corpus before it.
        left: rows that the run was to take from there on; None: as many as the configuration says, less those drawn.
    """

    row: int
    weights: np.ndarray
    drawn: tuple[int, ...]
    left: int | None = None


class Mixture:
    """Corpora in a fixed order that keeps close to their shares at every moment.

    Row g of a segment goes to the corpus that is furthest behind its share of the segment: the greatest
    weights * (g + 1) - drawn since it began, the lowest index among equals. These differences sum to 1, so one of them
    is above 0: a corpus of weight 0 is never drawn, and none gets a whole row ahead of its share.

    Attributes:
        drawn: rows taken from each corpus so far. With the segments this is the whole state.
        segments: the first begins at row 0; the last is the present one.
    """

    def __init__(self, weights: np.ndarray, drawn: list[int] | None = None, segments: list[Segment] | None = None):
        self.drawn = list(drawn) if drawn is not None else [0] * len(weights)
        self.segments = list(segments or [Segment(0, np.asarray(weights, dtype=np.float64), (0,) * len(weights))])

    @property
    def weights(self) -> np.ndarray:
        """The shares that hold now, float64."""
        return self.segments[-1].weights

    def next(self) -> int:
        """Draw a row: the index of its corpus."""
        since = np.array(self.drawn, dtype=np.float64) - self.segments[-1].drawn
        rows = sum(self.drawn) - self.segments[-1].row
        corpus = int(np.argmax(self.weights * (rows + 1) - since))
        self.drawn[corpus] += 1
        return corpus

    def change(self, weights: np.ndarray, left: int | None = None) -> None:
        """From the next row on these shares hold, for `left` rows. What the past gave too much or too little is not
        made up for."""
        self.segments.append(Segment(sum(self.drawn), np.asarray(weights, dtype=np.float64), tuple(self.drawn), left))

    def copy(self) -> Mixture:
        """The same state, to look ahead with."""
        return Mixture(self.weights, self.drawn, self.segments)
