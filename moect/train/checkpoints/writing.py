"""Writing checkpoints: each rank its part, beside the place; then all of it into the place, by one rename.

    begin        the main rank makes .writing-step-N, once the disk has the space
    write_part   every rank writes its tensors there and syncs them; no rank waits for another
    commit       the main rank, when all have written: checks that it sees every file, writes checkpoint.json, renames

A kill leaves either the checkpoint or a hidden folder that the next `begin` removes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moect import tables
from moect.errors import CheckpointError
from moect.train.checkpoints.reading import FORMAT, INFO, file_digest, list_checkpoints, step_of, values_digest

WRITING = ".writing-"  # before the name of a checkpoint that is not complete
ASIDE = ".replaced-"  # before the name of a checkpoint while another takes its place
GONE = ".deleted-"  # before the name of a checkpoint while it is deleted
SPARE = 2**20  # bytes: for what is beside the tensors


def save_checkpoint(folder: Path, step: int, files: dict[str, dict[str, Tensor]], info: dict) -> Path:
    """Write `folder/step-N` by one process, from tensors by kind of file and plain values; replaces one of that step.

    Raises:
        CheckpointError: the disk refuses.
    """
    begin(folder, step, sum(t.nbytes for tensors in files.values() for t in tensors.values()))
    return commit(folder, step, [write_part(folder, step, files, 0, 1)], info)


def begin(folder: Path, step: int, size: int) -> None:
    """Make the place where a checkpoint of `size` bytes is written.

    Raises:
        CheckpointError: there is no space for it, or the disk refuses.
    """
    try:
        clear(folder)  # at most one is in flight
        (folder / f"{WRITING}step-{step}").mkdir(parents=True)
    except OSError as error:
        raise _refused(folder / f"step-{step}", error) from error
    check_space(folder, size)


def clear(folder: Path) -> None:
    """Delete what a run that was killed has left half written or half deleted."""
    for mark in (WRITING, GONE):
        for left in folder.glob(f"{mark}step-*"):  # NFS keeps files that somebody reads: then another time
            shutil.rmtree(left, ignore_errors=True)


def check_space(folder: Path, size: int) -> None:
    """Whether a checkpoint of `size` bytes can be written to a folder.

    Raises:
        CheckpointError: it cannot.
    """
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise CheckpointError(
            f"{folder}: a checkpoint takes {tables.size(size)} and {tables.size(free)} are free; free space, "
            "lower train.keep_last or change `output`, then go on with resume=auto"
        )


def write_part(
    folder: Path, step: int, files: dict[str, dict[str, Tensor]], part: int, parts: int
) -> dict[str, tuple[str, int]]:
    """Write one rank's tensors, by kind of file, to where `begin` made place.

    Returns:
        The sha256 and the size in bytes of each file, by name.

    Raises:
        CheckpointError: the disk refuses.
    """
    temporary, written = folder / f"{WRITING}step-{step}", {}
    try:
        for kind, tensors in files.items():
            if not tensors:
                continue
            path = temporary / (f"{kind}.safetensors" if parts == 1 else f"{kind}-{part + 1}-of-{parts}.safetensors")
            save_file({key: t.contiguous() for key, t in tensors.items()}, path)
            _sync(path)
            written[path.name] = (file_digest(path), path.stat().st_size)
    except OSError as error:
        raise _refused(folder / f"step-{step}", error) from error
    except Exception as error:  # safetensors has its own for a full disk
        raise CheckpointError(f"{folder / f'step-{step}'}: cannot be written: {error}") from error
    return written


def commit(folder: Path, step: int, written: list[dict[str, tuple[str, int]]], info: dict) -> Path:
    """Make a checkpoint of what the ranks have written.

    Args:
        folder: of the checkpoints.
        step: of the checkpoint; one of the same step is replaced.
        written: what `write_part` returned on each rank.
        info: plain values.

    Raises:
        CheckpointError: the disk refuses, or a rank's files are not here.
    """
    final, temporary = folder / f"step-{step}", folder / f"{WRITING}step-{step}"
    try:
        digests = {}
        for rank, files in enumerate(written):
            for name, (digest, size) in files.items():
                path = temporary / name
                if not path.exists() or path.stat().st_size != size:
                    raise CheckpointError(
                        f"{final}: rank {rank} has written {name}, and rank 0 does not see it; let `output` be on a "
                        "file system that all nodes share"
                    )
                digests[name] = digest
        values = json.loads(json.dumps({"format": FORMAT, "step": step, **info, "files": digests}))
        text = json.dumps({**values, "sha256": values_digest(values)}, indent=1, ensure_ascii=False)
        (temporary / INFO).write_text(text, encoding="utf-8")
        _sync(temporary / INFO)
        _sync(temporary)
        aside = folder / f"{ASIDE}{final.name}"
        if aside.exists():
            remove(aside)
        if final.exists():  # the same step once more, after a resume from an earlier one
            os.rename(final, aside)
        os.rename(temporary, final)
        _sync(folder)
        if aside.exists():
            remove(aside)
    except OSError as error:
        raise _refused(final, error) from error
    return final


def put_back(folder: Path) -> None:
    """Undo a replacement that was interrupted. Only who writes checkpoints here may call it."""
    for aside in folder.glob(f"{ASIDE}step-*"):
        path = folder / aside.name.removeprefix(ASIDE)
        if path.exists():
            remove(aside)
        else:
            os.rename(aside, path)


def rotate(folder: Path, keep_last: int, step: int, keep: int | None = None, keep_every: int | None = None) -> None:
    """Delete all but the `keep_last` checkpoints up to a step, 0 keeps all.

    Args:
        folder: of the checkpoints.
        keep_last: how many.
        step: the last that was made. Later ones are of another course, or damaged; they are not touched.
        keep: one more step to keep.
        keep_every: keep steps that are a multiple of it, too.
    """
    made = [path for path in list_checkpoints(folder) if step_of(path) <= step]
    for path in superseded(made, keep_last, keep, keep_every):
        remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint: at once as far as others can see, so that a kill leaves no half of one."""
    gone = path.with_name(f"{GONE}{path.name.removeprefix(ASIDE)}-{secrets.token_hex(4)}")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)  # what somebody reads on NFS stays till then; `clear` comes again


def superseded(made: list[Path], keep_last: int, keep: int | None, keep_every: int | None) -> list[Path]:
    """The checkpoints, of those given newest first, that rotation deletes; arguments as of `rotate`."""
    old = made[keep_last:] if keep_last else []
    return [path for path in old if step_of(path) != keep and not (keep_every and step_of(path) % keep_every == 0)]


def _refused(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be written: {error.strerror or error}; free space or change `output`")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
