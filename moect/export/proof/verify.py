"""An export that was not verified is not one: every tensor accounted for, and logits compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from moect.errors import ExportError
from moect.export.proof.assembled import assemble
from moect.export.proof.by_block import compare_by_block, compare_folding
from moect.export.proof.comparison import BITWISE, ROUNDING, Comparison, Text
from moect.export.proof.whole import compare_whole, quiet
from moect.export.shards import Shard
from moect.export.targets.form import Subject, Target
from moect.export.trained import TrainedModel, fold_rows
from moect.export.weights import FolderWeights
from moect.free_memory import free_bytes

FIT = 0.5  # share of the free memory that two models may take


def verify(
    folder: Path,
    target: Target,
    trained: TrainedModel,
    written: TrainedModel,
    shards: list[Shard],
    texts: list[Text],
    by_block: bool | None = None,
    live: Callable[[], nn.Module] | None = None,
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
        live: makes the trained model without any of the exporter's code, `live_model`; block by block, and where there
            is none, it is assembled from `trained`.

    Raises:
        ExportError: a tensor is missing, left over or another, or a logit differs by more than the bound.
    """
    check_tensors(folder, written, shards)
    check_config(folder, target, written.subject)
    support = target.supports(trained.subject)
    bound = BITWISE if support.bitwise else ROUNDING
    if trained.subject.dtype == "bf16" and written.subject.rows != trained.subject.rows:
        # what bf16 rounds of the sums is no fault of the mapping: the sums are proven before, the mapping after it
        compare_folding(trained, texts, bound).check(f"{folder}: rows added to embedding and head")
        trained, live = fold_rows(trained), None
    if by_block is None:
        by_block = 2 * sum(4 * t.numel() for t in trained.slots.values()) > FIT * free_bytes("cpu")
    if by_block:
        comparison = compare_by_block(folder, target, written.subject, trained, texts, bound)
    else:
        comparison = compare_whole(folder, live() if live else assemble(trained.subject, trained), texts, bound)
    comparison.check(str(folder))
    return comparison


def check_config(folder: Path, target: Target, subject: Subject) -> None:
    """The folder's config.json, read as its users will, is the target's: block by block, nothing else reads it.

    Raises:
        ExportError: names the first value that is another, or why it cannot be read.
    """
    from transformers import AutoConfig

    try:
        with quiet():
            found = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder}: config.json cannot be read: {str(error).splitlines()[0]}; please report"
        ) from error
    made = target.config(subject).to_dict()
    of_place = {"_name_or_path", "transformers_version", "dtype", "auto_map"}
    for key in sorted((found.keys() | made.keys()) - of_place):
        a, b = (json.dumps(values.get(key), sort_keys=True, default=str) for values in (found, made))  # NaN: not itself
        if a != b:
            raise ExportError(f"{folder}: config.json has {key} {a}, the model {b}; please report")


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
                raise ExportError(f"{folder}: {name} is not what the model has; give the same command again")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
