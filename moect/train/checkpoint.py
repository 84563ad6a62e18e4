"""Checkpoints on disk: only what trains, independent of ranks and ZeRO stage, complete or not there at all.

    checkpoints/step-N/
        module.safetensors     fp32 masters of all trained parameters, and the module's buffers, by name in the model
        optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME in fp32
        trainer.safetensors    what else the next step depends on
        checkpoint.json        format, step, data position, fingerprint of the base, configuration, sha256 of each file
                               and of these values themselves

Nothing here is pickled. A checkpoint is written beside its place, synced, and renamed into it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moect.errors import CheckpointError
from moect.model.append import is_appended_tensor

FORMAT = 1
INFO = "checkpoint.json"
MODULE = "module.safetensors"
ASIDE = ".replaced-"  # before the name of a checkpoint while another takes its place
log = logging.getLogger("moect.checkpoint")


def save_checkpoint(folder: Path, step: int, files: dict[str, dict[str, Tensor]], info: dict) -> Path:
    """Write `folder/step-N` from tensors by file name and plain values; replaces one of the same step.

    Raises:
        CheckpointError: the disk refuses.
    """
    final, temporary = folder / f"step-{step}", folder / f".writing-step-{step}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        digests = {}
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            save_file({key: t.contiguous() for key, t in tensors.items()}, path)
            digests[path.name] = _sha256(path)
            _sync(path)
        values = json.loads(json.dumps({"format": FORMAT, "step": step, **info, "files": digests}))
        text = json.dumps({**values, "sha256": _digest(values)}, indent=1, ensure_ascii=False)
        (temporary / INFO).write_text(text, encoding="utf-8")
        _sync(temporary / INFO)
        _sync(temporary)
        aside = folder / f"{ASIDE}{final.name}"
        if final.exists():  # the same step once more, after a resume from an earlier one
            os.rename(final, aside)
        os.rename(temporary, final)
        _sync(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{final}: cannot be written: {error.strerror or error}; free space or change `output`"
        ) from error
    return final


def put_back(folder: Path) -> None:
    """Undo a replacement that was interrupted. Only who writes checkpoints here may call it."""
    for aside in folder.glob(f"{ASIDE}step-*"):
        path = folder / aside.name.removeprefix(ASIDE)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, path)


def rotate(folder: Path, keep_last: int, step: int, keep: int | None = None) -> None:
    """Delete all but the `keep_last` checkpoints up to a step, 0 keeps all.

    Args:
        folder: of the checkpoints.
        keep_last: how many.
        step: the last that was made. Later ones are of another course, or damaged; they are not touched.
        keep: one more step to keep.
    """
    made = [path for path in list_checkpoints(folder) if step_of(path) <= step]
    for path in made[keep_last:] if keep_last else []:
        if step_of(path) != keep:
            shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
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


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is compared with its checksum."""
    try:
        info = read_info(path)
        for name, digest in info["files"].items():
            if _sha256(path / name) != digest:
                return f"{name} is damaged (its checksum differs)"
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
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
    except OSError as error:
        raise CheckpointError(f"{path}: {INFO} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {INFO} is damaged (not valid JSON)") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT or not isinstance(info.get("files"), dict):
        raise CheckpointError(f"{path}: {INFO} is not of format {FORMAT}, the one this version of moect reads")
    if info.pop("sha256", None) != _digest(info):
        raise CheckpointError(f"{path}: {INFO} is damaged (its checksum differs)")
    return info


def module_digest(run_folder: Path) -> str | None:
    """The sha256 of what trains in a run's newest checkpoint; None where there is none that can be read."""
    for path in list_checkpoints(Path(run_folder) / "checkpoints")[:1]:
        try:
            return read_info(path)["files"][MODULE]
        except CheckpointError:
            return None
    return None


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, on the CPU.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return load_file(path / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {name}.safetensors cannot be read: {error}") from error


def read_module(path: Path) -> dict[str, Tensor]:
    """What trained, in fp32, and the module's buffers, by name in the model that `build_model` makes."""
    return read_tensors(path, "module")


def load_module(model: torch.nn.Module, path: Path) -> None:
    """Put a checkpoint's module into a model that `build_model` made.

    Raises:
        CheckpointError: its tensors are not exactly those that train in the model, or have other shapes.
    """
    tensors = read_module(path)
    slots = dict(trained_tensors(model))
    check_shapes(tensors, {name: slot.shape for name, slot in slots.items()}, path)
    with torch.no_grad():
        for name, tensor in tensors.items():
            slots[name].copy_(tensor)


def check_shapes(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], path: Path) -> None:
    """Compare the tensors of a checkpoint with the shapes that a model wants, by name.

    Raises:
        CheckpointError: they differ.
    """
    if odd := sorted(tensors.keys() ^ shapes.keys()):
        raise CheckpointError(
            f"{path}: of another model: {len(odd)} tensors are only in one of the two, first {odd[0]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{path}: of another model: {name} is {tuple(tensor.shape)}, expected {tuple(shapes[name])}"
            )


def trained_tensors(model: torch.nn.Module):
    """(name, tensor) of every parameter that trains and of every buffer that was appended."""
    yield from ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    yield from module_buffers(model)


def module_buffers(model: torch.nn.Module):
    """(name, tensor) of every buffer that was appended: of modules, and the tokens whose rows train."""
    yield from ((n, b) for n, b in model.named_buffers() if is_appended_tensor(n))


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
