"""The language gate's threshold, from held-out old text: so high that a promised share of documents is not touched.

A document is touched if one of its tokens passes. Its greatest gate logit says from which threshold on it is not, so
one pass over the text gives the share of touched documents at every threshold.

The share found is that of these documents. For others of the kind to keep the promise too, it has to be smaller: of n
documents at most k may be touched, k being the greatest number with P(X <= k) <= 1 - confidence where X is binomial,
n draws at the promised rate. (So `limit` is at least the upper end of the one-sided interval of Clopper and Pearson,
1934.)

G documents, T positions of a pass
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect.errors import DataError
from moect.gate_config import GateConfig, fewest_documents
from moect.model.language_gate import OPEN
from moect.model.record import ForwardRecord
from moect.moe_config import logit_of

# above the greatest logit that has to stay closed: kernels and batches differ in the last bits, and the gate adds up
MARGIN = {torch.float32: 1e-3, torch.bfloat16: 0.25}

log = logging.getLogger("moect.monitor")


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it does to the text that it was found on.

    Attributes:
        threshold: in place of `moe.gate_threshold`.
        documents, touched: by language.
    """

    threshold: float
    documents: dict[str, int]
    touched: dict[str, int]


class TouchMeter:
    """The greatest gate logit of each document.

    Args:
        documents: G, how many there are.
        device: of the model.
    """

    def __init__(self, documents: int, device: torch.device):
        self.greatest_G = torch.full((documents,), -math.inf, device=device)

    def add(self, record: ForwardRecord, document_T: Tensor) -> None:
        """Look at one forward pass; document_T is -1 where a position is not of a text."""
        of_text_T = document_T >= 0
        self.greatest_G.scatter_reduce_(0, document_T[of_text_T], record.gate_logit_T[of_text_T], "amax")

    def reduce(self) -> None:
        """Take the greatest over the ranks. Call it once, on every rank."""
        dist.all_reduce(self.greatest_G, op=dist.ReduceOp.MAX)


def find_threshold(
    greatest_G: Tensor,
    languages: list[str],
    gate: GateConfig,
    dtype: torch.dtype = torch.float32,
    highest: float = math.inf,
) -> Calibration:
    """The lowest threshold that keeps the promise for each language.

    Args:
        greatest_G: the greatest gate logit of each document.
        languages: of each document.
        gate: what is promised.
        dtype: of the model, which decides how far another kernel or batch may come to another logit.
        highest: logit that text can reach; above it only tokens pass that open the gate by themselves.

    Raises:
        DataError: too few documents of a language to conclude anything from, or no threshold keeps the promise.

    Where the threshold is above what text can reach, a warning says so.
    """
    limit, values = gate.max_touched_old_documents, {}
    for language, value in zip(languages, greatest_G.tolist(), strict=True):
        values.setdefault(language, []).append(value)
    logit = -math.inf
    for language, of_language in values.items():
        k = allowed(len(of_language), limit, gate.confidence)
        if k is None:
            raise DataError(
                f"data.calibration has {len(of_language)} documents of {language!r}: that no more than {limit:.3g} of "
                f"them are touched needs {fewest_documents(limit, gate.confidence)} at least; give more, or raise "
                "gate.max_touched_old_documents"
            )
        logit = max(logit, sorted(of_language, reverse=True)[k])
    q = _sigmoid(logit + MARGIN[dtype])
    if logit == OPEN:
        told = ", ".join(f"{sum(v == OPEN for v in of)} of {len(of)} in {k!r}" for k, of in values.items())
        raise DataError(
            f"too many documents of data.calibration have tokens that open the language gate by themselves ({told}), "
            "so no threshold keeps gate.max_touched_old_documents: give more text of their kind in data.train, or set "
            "gate.telling_tokens: false"
        )
    if (there := logit_of(q)) <= logit:
        raise DataError(
            "the language gate takes old documents of data.calibration for new ones with certainty, so no threshold "
            "keeps gate.max_touched_old_documents; train longer, or with more data.replay"
        )
    if logit >= highest:
        told = ", ".join(f"{sum(v >= highest for v in of)} of {len(of)} in {k!r}" for k, of in values.items())
        log.warning(
            "the language gate takes so many documents of data.calibration for new ones with certainty (%s) that it "
            "stays shut for every text: take those of new languages out of it, or raise gate.max_touched_old_documents",
            told,
        )
    touched = {language: sum(v > there for v in of_language) for language, of_language in values.items()}
    return Calibration(q, {k: len(v) for k, v in values.items()}, touched)


def allowed(documents: int, limit: float, confidence: float) -> int | None:
    """How many of so many documents may be touched; None: even none touched would prove too little."""
    below, k = 0.0, 0
    while k < documents:
        log_p = math.lgamma(documents + 1) - math.lgamma(k + 1) - math.lgamma(documents - k + 1)
        below += math.exp(log_p + k * math.log(limit) + (documents - k) * math.log1p(-limit))
        if below > 1 - confidence:
            break
        k += 1
    return k - 1 if k else None


@contextmanager
def with_threshold(model: nn.Module, threshold: float | None) -> Iterator[None]:
    """Inside, the model's gate has this threshold; None: its own. The run's configuration does not change."""
    if threshold is None:
        yield
        return
    config = model.moe_config
    before, config.gate_threshold = config.gate_threshold, threshold
    try:
        yield
    finally:
        config.gate_threshold = before


def _sigmoid(logit: float) -> float:
    q = 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
    return min(q, 1 - 2**-53)
