"""Intervals by bootstrap over documents (Efron 1979): what the numbers would be on other documents of the same kind.

Base and model are measured on the same documents, so both are drawn together (paired): what makes a document hard for
both cancels in their difference. The documents are drawn with a fixed seed, so the same measurements give the same
intervals.

G documents, R resamples
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log

import numpy as np

LEVEL = 0.95
AT_ONCE = 4_000_000  # numbers of drawn counts held at once


def text_intervals(
    nll_G: np.ndarray, bytes_G: np.ndarray, base_nll_G: np.ndarray, base_bytes_G: np.ndarray, resamples: int
) -> dict[str, tuple[float, float]]:
    """95% intervals of bits_per_byte, delta, retention and gain of a text, each (low, high).

    Args:
        nll_G, bytes_G: float64, nats and bytes of each document under the model.
        base_nll_G, base_bytes_G: under the base.
        resamples: R, at least 1.

    Returns:
        By name. A ratio is missing where some resample has no value for it, and all are with fewer than two documents.
    """
    if len(nll_G) < 2:
        return {}
    columns = np.stack([nll_G, bytes_G, base_nll_G, base_bytes_G], axis=1)
    nll_R, bytes_R, base_nll_R, base_bytes_R = np.concatenate(list(_resampled(columns, resamples))).T
    with np.errstate(divide="ignore", invalid="ignore"):
        bits_R, base_R = nll_R / bytes_R / log(2), base_nll_R / base_bytes_R / log(2)
        of = {"bits_per_byte": bits_R, "delta": bits_R - base_R}
        of |= {"retention": base_R / bits_R, "gain": 1 - bits_R / base_R}
    return {name: _limits(values_R) for name, values_R in of.items() if np.isfinite(values_R).all()}


def share_interval(part_G: np.ndarray, whole_G: np.ndarray, resamples: int) -> tuple[float, float]:
    """The 95% interval of sum(part) / sum(whole), by documents. (0, 1) for a single document."""
    if len(part_G) < 2:
        return 0.0, 1.0
    sums_R2 = np.concatenate(list(_resampled(np.stack([part_G, whole_G], axis=1), resamples)))
    return _limits(sums_R2[:, 0] / sums_R2[:, 1])


def _resampled(columns: np.ndarray, resamples: int) -> Iterator[np.ndarray]:
    """Sums of the columns (G, n) over as many documents drawn with replacement: (some of R, n) at a time."""
    count = len(columns)
    generator = np.random.default_rng(0)
    equal_G = np.full(count, 1 / count)
    at_once = max(1, AT_ONCE // count)
    for start in range(0, resamples, at_once):
        yield generator.multinomial(count, equal_G, size=min(at_once, resamples - start)) @ columns


def _limits(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
