"""What the language gate promises of old text. Part of the run's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moect.data_config import DataConfig
from moect.moe_config import option

STRICT = {"extra": "forbid"}


@dataclass
class GateConfig:
    """How the threshold of the language gate is found."""

    __pydantic_config__ = STRICT
    max_touched_old_documents: float | None = option(
        None,
        "find the gate's threshold at each checkpoint, so that no more than this share of the documents of each old "
        "language has a token that passes, judged by `data.calibration`; null: it is `moe.gate_threshold`",
    )
    telling_tokens: bool = option(
        True,
        "tokens with rows of their own (`model.train_embeddings`) that the old languages' text in `data.train` never "
        "has open the gate by themselves, and these rows count from the embedding on",
    )
    begin: Literal["frequencies", "random"] = option(
        "frequencies",
        "what a gate that sees the context begins with: how much more often the new languages' text in `data.train` "
        "has each token than that of the old ones, or nothing",
    )
    confidence: float = option(
        0.95, "probability with which that holds for other text of the same kind, which takes a margin"
    )


def fewest_documents(limit: float, confidence: float) -> int:
    """Documents without a touched one from which it follows with `confidence` that the share is below `limit`."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-limit))


def check_gate(gate: GateConfig, data: DataConfig, calibrates: bool) -> None:
    """What no single field can know.

    Args:
        gate: the section.
        data: of the run.
        calibrates: whether the run has a gate, and finds its threshold.

    Raises:
        ValueError: something that cannot be meant, by its key.
    """
    limit = gate.max_touched_old_documents
    if limit is not None and not 0 < limit < 1:
        raise ValueError(f"`gate.max_touched_old_documents` is {limit}: it must lie between 0 and 1, say 0.01")
    if not 0.5 <= gate.confidence < 1:
        raise ValueError(f"`gate.confidence` is {gate.confidence}: it must lie in [0.5, 1)")
    for i, source in enumerate(data.calibration):
        if data.languages[source.lang] != "old":
            raise ValueError(
                f"`data.calibration[{i}]` is of a {data.languages[source.lang]} language, {source.lang}: the threshold "
                "is found on old text"
            )
    if not calibrates:
        return
    trained = {source.lang for source in data.train if data.languages[source.lang] == "old"}
    if lacking := sorted(trained - {source.lang for source in data.calibration}):
        few = fewest_documents(limit, gate.confidence)
        raise ValueError(
            f"`gate.max_touched_old_documents` needs held-out text of {', '.join(lacking)} in `data.calibration`, "
            f"{few} documents at least of each language"
        )
