"""The run's folder: made once, never overwritten, readable without moect."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moect.config import RunConfig, config_to_yaml
from moect.errors import ConfigError


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
            os.replace(path, _free_name(folder, "config-before-resume", ".yaml"))
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error.strerror or error}; change `output` or `name`"
        ) from error
    return folder


class RunLog:
    """log.jsonl: one JSON object a line, appended and flushed. Written by the main rank only.

    A line has either `step` and figures, or `event`. After an event `resume` at step N, earlier lines of steps beyond N
    are superseded: readers skip them.
    """

    def __init__(self, folder: Path, enabled: bool):
        path = folder / "log.jsonl"
        self._file = path.open("a", encoding="utf-8") if enabled else None
        self.has_lines = enabled and path.stat().st_size > 0  # of an earlier process
        if self.has_lines and path.read_bytes()[-1:] != b"\n":
            self._file.write("\n")  # a kill cut the last line off

    def write(self, **values) -> None:
        """Append one line."""
        if self._file:
            self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    number = 1
    while (path := folder / f"{stem}-{number}{suffix}").exists():
        number += 1
    return path
