"""Tensors of a Hugging Face folder, each read when it is asked for; the folder is only read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moect.errors import ExportError
from moect.train.checkpoints.reading import file_digest


class FolderWeights(Mapping[str, Tensor]):
    """The tensors of all safetensors files of a folder, onto the CPU.

    Args:
        folder: in Hugging Face format.
        pickle: where there are no safetensors files, read pytorch_model*.bin, with torch's reader of plain tensors.

    Attributes:
        shapes: of all of them, by name.

    Raises:
        ExportError: there are none, or one cannot be read; also later, for a tensor.
    """

    def __init__(self, folder: Path, pickle: bool = False):
        self.folder = Path(folder)
        self.shapes: dict[str, torch.Size] = {}
        self._where: dict[str, Path] = {}
        self._open: dict[Path, object] = {}  # readers map their file, which costs addresses and no memory
        for path in self._files():
            for name in self._reader(path).keys():  # noqa: SIM118 - no mapping
                if name in self._where:
                    raise ExportError(
                        f"{path}: holds {name}, which {self._where[name].name} holds too; remove the file that is not "
                        "the model's"
                    )
                self._where[name] = path
                self.shapes[name] = torch.Size(self._reader(path).get_slice(name).get_shape())
        if not self._where:
            self._take_pickled(pickle)

    def __getitem__(self, name: str) -> Tensor:
        path = self._where[name]
        if path.suffix == ".bin":
            return _unpickled(path)[name]
        try:
            return self._reader(path).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path}: cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def digests(self) -> dict[str, str]:
        """The sha256 of each file, by name."""
        return {path.name: file_digest(path) for path in sorted(set(self._where.values()))}

    def _files(self) -> list[Path]:
        """Those that the index names; other formats may lie beside them."""
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if single.is_file():  # transformers takes it first, whatever an index beside it says
            return [single]
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                return sorted(self.folder / name for name in names)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ExportError(f"{index}: is no index of weights; fetch or save the model anew") from error
        return sorted(self.folder.glob("*.safetensors"))

    def _reader(self, path: Path):
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ExportError(f"{path}: cannot be read: {error}") from error
        return self._open[path]

    def _take_pickled(self, allowed: bool) -> None:
        files = sorted(self.folder.glob("pytorch_model*.bin"))
        if not files:
            raise ExportError(f"{self.folder}: has no safetensors files; give a folder in Hugging Face format")
        if not allowed:
            raise ExportError(
                f"{self.folder}: has pickled weights only, which could run code; --pickle reads them all the same"
            )
        for path in files:
            for name, tensor in _unpickled(path).items():
                self._where[name], self.shapes[name] = path, tensor.shape


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has many ways to say no, and some advise to trust the file
        raise ExportError(
            f"{path}: holds more than plain tensors, or is damaged; save the model as safetensors where it comes from"
        ) from error
