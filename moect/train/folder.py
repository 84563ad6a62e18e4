"""The run's folder: made once, never overwritten, readable without moect."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from moect import distributed
from moect.config import RunConfig, config_to_yaml
from moect.errors import ConfigError, TrainingError


def open_folder(config: RunConfig) -> Path:
    """Make the run's folder, or accept the one that is there when the run may resume.

    Raises:
        ConfigError: it exists and `resume` is `never`, or it cannot be made.
    """
    folder = config.folder
    if folder.exists() and config.resume == "never":
        raise ConfigError(f"{folder} exists: go on from it with resume=auto, or choose another name=…")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        text = config_to_yaml(config)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            shutil.copyfile(path, _free_name(folder, "config-before-resume", ".yaml"))
        draft = folder / ".config.yaml"  # a run is never without one
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error.strerror or error}; change `output` or `name`"
        ) from error
    return folder


def check_shared(folder: Path) -> None:
    """Whether all ranks see the same file system: what the main rank writes, the others must be able to read.

    Raises:
        ConfigError: a node does not see it.
    """
    if dist.get_world_size() == 1:
        return
    word = distributed.on_main(lambda: _leave_word(folder))
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (socket.gethostname(), _sees(folder, word)))
    distributed.on_main(lambda: (folder / word).unlink())
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise ConfigError(
            f"{folder.parent}: {', '.join(blind)} cannot see what rank 0 on {seen[0][0]} writes there; let `output` be "
            "on a file system that all nodes share, at the same path"
        )


def _leave_word(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".seen-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def _sees(folder: Path, name: str) -> bool:
    """A network file system may show a new file a little later."""
    for _ in range(50):
        if os.path.isdir(folder) and name in os.listdir(folder):
            return True
        time.sleep(0.1)
    return False


class RunLog:
    """log.jsonl: one JSON object a line, appended and flushed. Written by the main rank only.

    A line has either `step` and figures, or `event`. A figure that is not finite is null. After an event `resume` or
    `rollback` at step N, earlier lines of steps beyond N are superseded: readers skip them.
    """

    def __init__(self, folder: Path, enabled: bool):
        path = folder / "log.jsonl"
        self._file = path.open("a", encoding="utf-8") if enabled else None
        self.has_lines = enabled and path.stat().st_size > 0  # of an earlier process
        if self.has_lines and path.read_bytes()[-1:] != b"\n":
            self._file.write("\n")  # a kill cut the last line off

    def write(self, **values) -> None:
        """Append one line.

        Raises:
            TrainingError: the disk refuses.
        """
        if self._file:
            try:
                self._file.write(json.dumps(_valid(values), ensure_ascii=False, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise TrainingError(
                    f"{self._file.name}: cannot be written: {error.strerror or error}; free space, then go on with "
                    "resume=auto"
                ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file:
            with suppress(OSError):  # what a full disk did not take was told when it was written
                self._file.close()


def _valid(value):
    """The same with null for numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _valid(v) for key, v in value.items()}
    return [_valid(v) for v in value] if isinstance(value, list | tuple) else value


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    number = 1
    while (path := folder / f"{stem}-{number}{suffix}").exists():
        number += 1
    return path
