"""The mixture: what share of the rows each source gets, and which source gives the next row."""

from __future__ import annotations

import numpy as np

from moect.errors import ConfigError


def source_weights(
    tokens: list[int],
    roles: list[str],
    explicit: list[float | None],
    replay: float | None,
    temperature: float,
) -> np.ndarray:
    """The share of rows of each source, float64, sum 1.

    Args:
        tokens: size of each source.
        roles: `old` or `new`, of each source.
        explicit: the weight given in the configuration; None: tokens ** (1 / temperature).
        replay: share of rows of the old languages, divided among them by weight; None: all sources together by weight.
            Where only one role has sources, it gets everything.
        temperature: above 1 small sources get more than their share of tokens.

    Raises:
        ConfigError: the sources that are to share something all have weight 0.
    """
    sizes = np.array(tokens, dtype=np.float64) ** (1.0 / temperature)
    weights = np.array([size if w is None else w for size, w in zip(sizes, explicit, strict=True)], dtype=np.float64)
    if replay is not None:
        for role, share in (("old", replay), ("new", 1.0 - replay)):
            chosen = np.array(roles) == role
            total = weights[chosen].sum()
            if chosen.any() and share > 0 and total == 0:
                raise ConfigError(f"`data.train`: every source of a language of role `{role}` has weight 0; raise one")
            weights[chosen] *= share / total if total else 0.0
    if not np.isfinite(weights.sum()):
        raise ConfigError("`data.train`: a weight is not a finite number; check `weight` and `data.temperature`")
    if weights.sum() == 0:
        raise ConfigError("`data.train`: no source is left to draw from; raise a `weight`, or `data.replay`")
    return weights / weights.sum()


class Mixture:
    """Sources in a fixed order that keeps close to their shares at every moment.

    Row g goes to the source that is furthest behind its share: the greatest weights * (g + 1) - drawn, the lowest index
    among equals. These differences sum to 1, so one of them is above 0: a source of weight 0 is never drawn, and no
    source gets a whole row ahead of its share.

    Attributes:
        drawn: rows taken from each source so far; this is the whole state.
    """

    def __init__(self, weights: np.ndarray, drawn: list[int] | None = None):
        self.weights = np.asarray(weights, dtype=np.float64)
        self.drawn = list(drawn) if drawn is not None else [0] * len(self.weights)

    def next(self) -> int:
        """Draw a row: the index of its source."""
        behind = self.weights * (sum(self.drawn) + 1) - np.array(self.drawn, dtype=np.float64)
        source = int(np.argmax(behind))
        self.drawn[source] += 1
        return source
