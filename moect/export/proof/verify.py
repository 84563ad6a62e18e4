"""An export that was not verified is not one: every tensor accounted for, and logits compared."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import Tensor

from moect.errors import ExportError
from moect.export.proof.by_block import compare_by_block
from moect.export.proof.comparison import BITWISE, ROUNDING, Comparison, Text
from moect.export.proof.whole import compare_whole
from moect.export.targets.form import Target
from moect.export.trained import TrainedModel, fold_rows
from moect.export.weights import FolderWeights
from moect.export.writer import Shard

FIT = 0.5  # share of the free memory that two models may take


def verify(
    folder: Path,
    target: Target,
    trained: TrainedModel,
    written: TrainedModel,
    shards: list[Shard],
    texts: list[Text],
    by_block: bool | None = None,
) -> Comparison:
    """Account for every tensor of the folder, reload it, and compare logits.

    Args:
        folder: a Hugging Face folder.
        target: what it was written as.
        trained: the model that it is held against.
        written: the model as the target was given it.
        shards: what was to be written.
        texts: to compare logits on.
        by_block: compare block by block; None: if two models in fp32 take more than half of the free memory.

    Raises:
        ExportError: a tensor is missing, left over or another, or a logit differs by more than the bound.
    """
    check_tensors(folder, written, shards)
    support = target.supports(trained.subject)
    if trained.subject.dtype == "bf16" and written.subject.rows != trained.subject.rows:
        trained = fold_rows(trained)  # what bf16 rounds of the sums is no fault of the mapping
    if by_block is None:
        by_block = 2 * sum(4 * t.numel() for t in trained.slots.values()) > FIT * psutil.virtual_memory().available
    bound = BITWISE if support.bitwise else ROUNDING
    if by_block:
        comparison = compare_by_block(folder, target, written.subject, trained, texts, bound)
    else:
        comparison = compare_whole(folder, trained, texts, bound)
    comparison.check(str(folder))
    return comparison


def check_tensors(folder: Path, written: TrainedModel, shards: list[Shard]) -> None:
    """The folder's files hold what each shard should, bit for bit, and nothing else.

    Raises:
        ExportError: names the first tensor for which this does not hold.
    """
    weights = FolderWeights(folder)
    expected = {piece.name for shard in shards for piece in shard.pieces}
    if extra := sorted(weights.keys() - expected):
        raise ExportError(f"{folder}: holds {extra[0]}, which the model does not have")
    if missing := sorted(expected - weights.keys()):
        raise ExportError(f"{folder}: {len(missing)} tensors of the model are missing, first {missing[0]}")
    for shard in shards:
        for name, tensor in shard.tensors(written).items():
            if not _same_bits(weights[name], tensor):
                raise ExportError(f"{folder}: {name} is not what the model has")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
