"""The shares of a run's corpora, from its configuration and what is known of their sizes."""

from __future__ import annotations

import logging
from math import inf

import numpy as np

from moect.config import RunConfig
from moect.data.batches.corpus import Corpus
from moect.data.batches.mixture import corpus_weights, limit_shares
from moect.data_config import KEPT

log = logging.getLogger("moect.data")


def corpus_shares(
    config: RunConfig,
    corpora: list[Corpus],
    tokens: list[int | None],
    rows_per_epoch: list[int | None],
    row: int = 0,
    drawn: tuple[int, ...] | None = None,
    tell: bool = False,
    left: int | None = None,
) -> list[float | None]:
    """The share of the run's rows of each corpus.

    Args:
        config: reads `data`, `train.steps` and `train.batch_size`.
        corpora: of the configuration.
        tokens, rows_per_epoch: of each corpus; None: not known.
        row, drawn: from which row of the run on the shares are to hold, and what each corpus has given before; with
            `data.max_epochs` this much less is left of it.
        tell: log what the configuration leaves unclear or cannot be kept.
        left: rows that the run is to take from `row` on; None: those of all its steps, less `row`.

    Returns:
        The shares; None where they hang on a size that is not known.

    Raises:
        ConfigError: no corpus is left to draw from.
    """
    data = config.data
    groups = ["any"] * len(corpora)
    if data.replay is not None:
        groups = ["old" if corpus.role in KEPT else "new" for corpus in corpora]
    known = {}
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        without = [i for i in members if corpora[i].weight is None]
        if tell and without and len(without) < len(members):
            theirs = "their tokens" if data.sampling == "temperature" else "1"
            log.warning(
                "data.train: some sources of %s role have a `weight` and some do not; theirs is %s", group, theirs
            )
        by_size = data.max_epochs is not None or (without and data.sampling == "temperature")
        known[group] = not by_size or len(members) == 1 or all(tokens[i] is not None for i in members)
    # where a size is not known any will do: it decides nothing, or the shares of its group are not told
    sizes = [1 if n is None else n for n in tokens]
    temperature = inf if data.sampling == "unimax" else data.temperature
    shares = corpus_weights(sizes, [c.role for c in corpora], [c.weight for c in corpora], data.replay, temperature)
    rows_left = config.train.steps * config.train.batch_size - row if left is None else left
    if data.max_epochs is not None and rows_left > 0:
        read = np.array(drawn if drawn is not None else [0] * len(corpora), dtype=np.float64)
        rows = np.array([inf if n is None else n for n in rows_per_epoch], dtype=np.float64)
        shares, crowded = limit_shares(shares, data.max_epochs * rows / rows_left, groups, read / rows_left)
        for group in crowded if tell else ():
            log.warning(
                "data.max_epochs: the corpora of %s role are too small for the run, each is read more often than "
                "%g times; lower train.steps, give more text, or raise the limit",
                group,
                data.max_epochs,
            )
    return [share if known[group] else None for share, group in zip(shares.tolist(), groups, strict=True)]
