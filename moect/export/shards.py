"""Write a model shard by shard: one shard's tensors are in memory at a time, and a shard that is written stays written.

A shard holds whole blocks, as many as fit its size, at least one. It appears under its name when it is complete, so an
export that was interrupted goes on with the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moect import tables
from moect.errors import ExportError
from moect.export.targets.form import Piece, Target
from moect.export.trained import TrainedModel
from moect.progress import Progress

SHARD_BYTES = 2 * 10**9
SPARE = 64 * 2**20  # bytes of a disk that are left free
INDEX = "model.safetensors.index.json"


@dataclass
class Shard:
    """One file of weights.

    Attributes:
        name: of the file.
        pieces: what it holds, in order.
        size: bytes of its tensors.
    """

    name: str = ""
    pieces: list[Piece] = field(default_factory=list)
    size: int = 0

    def tensors(self, trained: TrainedModel) -> dict[str, Tensor]:
        """Its tensors by name, each of the trained model's read once."""
        parts = {part: trained[part] for part in dict.fromkeys(p for piece in self.pieces for p in piece.parts)}
        return {p.name: p.make(*(parts[part] for part in p.parts)).contiguous() for p in self.pieces}


def plan_shards(target: Target, trained: TrainedModel, most: int = SHARD_BYTES) -> list[Shard]:
    """Divide a model among files.

    Args:
        target: what it is written as.
        trained: the model.
        most: bytes of a file; a block that is larger has one of its own.

    Raises:
        ExportError: a tensor of the trained model would be left out, or written twice.
    """
    subject = trained.subject
    units = [[piece] for piece in target.outside(subject, trained.outside)]
    units += [target.block(subject, i, trained.of_block(i)) for i in range(subject.base.num_hidden_layers)]
    _account(target, trained, units)
    shards = [Shard()]
    for unit in units:
        size = sum(_size(piece, trained) for piece in unit)
        if shards[-1].pieces and shards[-1].size + size > most:
            shards.append(Shard())
        shards[-1].pieces += unit
        shards[-1].size += size
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        shard.name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
    return shards


def write_shards(shards: list[Shard], trained: TrainedModel, folder: Path) -> None:
    """Write those files that are not there yet, and their index.

    Raises:
        ExportError: the disk has no room for them.
        OSError: one cannot be written.
    """
    missing = [shard for shard in shards if not (folder / shard.name).exists()]
    needed, free = sum(shard.size for shard in missing), shutil.disk_usage(folder).free
    if needed and needed + SPARE > free:
        raise ExportError(
            f"{folder.parent}: the export takes {tables.size(needed)} and {tables.size(free)} are free; free space, or "
            "choose another folder with --output"
        )
    total = sum(shard.size for shard in shards)
    progress = Progress("writing", total, total - needed)
    try:
        for shard in missing:
            temporary = folder / f"{shard.name}.part"
            save_file(shard.tensors(trained), temporary, metadata={"format": "pt"})
            temporary.chmod(0o666 & ~_umask())  # safetensors lets the owner alone read
            os.replace(temporary, folder / shard.name)
            progress.add(shard.size)
    finally:
        progress.end()
    if len(shards) > 1:
        where = {piece.name: shard.name for shard in shards for piece in shard.pieces}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _account(target: Target, trained: TrainedModel, units: list[list[Piece]]) -> None:
    pieces = [piece for unit in units for piece in unit]
    used = {part for piece in pieces for part in piece.parts}
    if left := [name for name in trained.slots if name not in used]:
        raise ExportError(f"{target.name}: {len(left)} tensors of the model have no place in it, first {left[0]}")
    if len({piece.name for piece in pieces}) < len(pieces):
        raise ExportError(f"{target.name}: a tensor would be written twice")


def _size(piece: Piece, trained: TrainedModel) -> int:
    with torch.device("meta"):
        tensor = piece.make(*(trained.slots[part] for part in piece.parts))
    return tensor.numel() * tensor.element_size()
