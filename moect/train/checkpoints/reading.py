"""Checkpoints on disk: only what trains, independent of ranks and ZeRO stage, complete or not there at all.

    checkpoints/step-N/
        module.safetensors     fp32 masters of all trained parameters, and the module's buffers, by name in the model
        optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME in fp32
        trainer.safetensors    what else the next step depends on
        checkpoint.json        format, step, data position, fingerprint of the base, configuration, sha256 of each file
                               and of these values themselves

Several ranks write `module-1-of-4.safetensors` and so on, each some of the tensors, whole. Which tensor is in which
file means nothing. Nothing here is pickled. writing.py is the other side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moect.errors import CheckpointError
from moect.model.append import held_parameters, is_appended_tensor

FORMAT = 2
READS = (1, FORMAT)  # 1: one file of each kind, as one rank writes them
INFO = "checkpoint.json"
FILE = r"[a-z]+(-\d+-of-\d+)?\.safetensors"
NEEDED = {"step": int, "base_fingerprint": str, "config": dict, "files": dict}
COUNTS = ("step", "world_size", "rollbacks", "health_rollbacks", "optimizer_steps", "skips_in_row")
log = logging.getLogger("moect.checkpoint")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-(0|[1-9][0-9]*)", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: -step_of(path))


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def find_checkpoint(run_folder: Path, name: str | None = None) -> Path:
    """The named checkpoint of a run, or its newest undamaged one.

    Raises:
        CheckpointError: there is none, or the named one is damaged.
    """
    folder = Path(run_folder) / "checkpoints"
    if name is not None:
        if fault := damage(folder / name):
            there = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
            raise CheckpointError(f"{folder / name}: {fault}; checkpoints there: {there}")
        return folder / name
    for path in list_checkpoints(folder):
        fault = damage(path)
        if fault is None:
            return path
        log.warning("%s: %s; trying the checkpoint before it", path, fault)
    raise CheckpointError(f"{folder}: no usable checkpoint; has the run saved one yet (train.save_every)?")


def damage(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None: every file is compared with its checksum.

    Args:
        path: the checkpoint's folder.
        part, parts: look at every `parts`-th file only, from number `part` on: so that ranks can share the work.
    """
    try:
        info = read_info(path)
        for name, digest in list(info["files"].items())[part::parts]:
            if file_digest(path / name) != digest:
                return f"{name} is damaged (its checksum differs)"
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else 'a file'} cannot be read: {error.strerror}"
    return None


def read_info(path: Path) -> dict:
    """The plain values of a checkpoint.

    Raises:
        CheckpointError: they are missing, damaged or of another format.
    """
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: {INFO} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {INFO} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {INFO} is damaged (not valid JSON)") from error
    if not isinstance(info, dict) or info.get("format") not in READS or not isinstance(info.get("files"), dict):
        formats = " and ".join(map(str, READS))
        raise CheckpointError(f"{path}: {INFO} is not of format {formats}, which this version of moect reads")
    if info.pop("sha256", None) != values_digest(info):
        raise CheckpointError(f"{path}: {INFO} is damaged (its checksum differs)")
    if fault := _fault_of_values(info):
        raise CheckpointError(f"{path}: {INFO} is damaged ({fault})")
    return info


def _fault_of_values(info: dict) -> str | None:
    """What no checkpoint can have, whatever its checksum says; or None."""
    for key, kind in NEEDED.items():
        if not isinstance(info.get(key), kind) or isinstance(info.get(key), bool):
            return f"`{key}` is {'not there' if key not in info else 'no ' + kind.__name__}"
    for key in COUNTS:
        if key in info and (not isinstance(info[key], int) or isinstance(info[key], bool) or info[key] < 0):
            return f"`{key}` is no count"
    for name, digest in info["files"].items():
        if not re.fullmatch(FILE, name) or not isinstance(digest, str):
            return f"`files` has {name!r}"
    return None


def module_digest(info: dict) -> str:
    """A digest of what trains in a checkpoint, from its plain values: the same for the same files."""
    digests = [info["files"][name] for name in files_of(info, "module")]
    return digests[0] if len(digests) == 1 else values_digest(digests)


def newest_module_digest(run_folder: Path) -> str | None:
    """`module_digest` of a run's newest checkpoint; None where there is none that can be read."""
    for path in list_checkpoints(Path(run_folder) / "checkpoints")[:1]:
        try:
            return module_digest(read_info(path))
        except CheckpointError:
            return None
    return None


def files_of(info: dict, kind: str) -> list[str]:
    """The files of a kind, `module`, `optimizer` or `trainer`, that a checkpoint has."""
    return [name for name in info["files"] if re.fullmatch(rf"{kind}(-\d+-of-\d+)?\.safetensors", name)]


class Tensors(Mapping[str, Tensor]):
    """The tensors of some kinds of files of a checkpoint, each read, onto the CPU, when it is asked for.

    Attributes:
        shapes: of all of them, by name.

    Raises:
        CheckpointError: a file is missing or cannot be read; also later, for a tensor.
    """

    def __init__(self, path: Path, *kinds: str):
        info = read_info(path)
        self._where: dict[str, Path] = {}
        self.shapes: dict[str, torch.Size] = {}
        for kind in kinds:
            names = files_of(info, kind)
            if not names:
                raise CheckpointError(f"{path}: has no file of the kind `{kind}`")
            for name in names:
                with _opened(path / name) as file:
                    for key in file.keys():  # noqa: SIM118 - no mapping
                        self._where[key] = path / name
                        self.shapes[key] = torch.Size(file.get_slice(key).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._where[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class _opened:
    """safe_open, with our errors."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        try:
            self.file = safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._error(error) from error
        return self.file.__enter__()

    def __exit__(self, kind, error, trace) -> None:
        self.file.__exit__(kind, error, trace)
        if isinstance(error, (OSError, SafetensorError)):
            raise self._error(error) from error

    def _error(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path.parent}: {self.path.name} cannot be read: {error}")


def read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of a kind of files of a checkpoint, on the CPU.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return dict(Tensors(path, kind))


def read_module(path: Path) -> dict[str, Tensor]:
    """What trained, in fp32, and the module's buffers, by name in the model that `build_model` makes."""
    return read_tensors(path, "module")


def load_module(model: torch.nn.Module, path: Path) -> None:
    """Put a checkpoint's module into a model that `build_model` made.

    Raises:
        CheckpointError: its tensors are not exactly those that train in the model, or have other shapes.
    """
    tensors = Tensors(path, "module")
    slots = dict(trained_tensors(model))
    check_shapes(tensors.shapes, {name: slot.shape for name, slot in slots.items()}, path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            slots[name].copy_(tensor)


def check_shapes(there: dict[str, torch.Size], shapes: dict[str, torch.Size], path: Path) -> None:
    """Compare the shapes of a checkpoint's tensors with those that a model wants, by name.

    Raises:
        CheckpointError: they differ.
    """
    if odd := sorted(there.keys() ^ shapes.keys()):
        raise CheckpointError(
            f"{path}: of another model: {len(odd)} tensors are only in one of the two, first {odd[0]}; take the "
            "configuration, and the version of moect, that it was made with"
        )
    for name, shape in there.items():
        if shape != shapes[name]:
            raise CheckpointError(f"{path}: of another model: {name} is {tuple(shape)}, expected {tuple(shapes[name])}")


def trained_tensors(model: torch.nn.Module):
    """(name, tensor) of every parameter that trains, and of what comes with them."""
    yield from ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    yield from carried_tensors(model)


def carried_tensors(model: torch.nn.Module):
    """(name, tensor) of what no optimizer moves and a checkpoint has to hold all the same: buffers that were appended,
    of modules and the tokens whose rows train, and appended parts that `train.parts` leaves as they are."""
    yield from ((n, b) for n, b in model.named_buffers() if is_appended_tensor(n))
    yield from held_parameters(model)


def values_digest(values) -> str:
    """The sha256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
