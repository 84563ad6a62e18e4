"""Digests of files, kept in the cache, so that a large corpus is not read through at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from pathlib import Path

from moect.errors import DataError

log = logging.getLogger("moect.data")

SETTLED = 5.0  # seconds since a file was written, from which on its time stamp tells one content from the next


def digest(file: Path, cache_folder: Path | None) -> str:
    """sha256 of a file's bytes; where it was computed before, that is taken as long as the file's size and time of
    change are the same.

    Args:
        file: what to read.
        cache_folder: where digests are kept; None: nowhere.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        file = Path(os.path.abspath(file))
        state = [file.stat().st_size, file.stat().st_mtime_ns]
        kept = None
        if cache_folder is not None:
            name = hashlib.sha256(str(file).encode("utf-8", "surrogateescape")).hexdigest()
            kept = Path(cache_folder) / "digests" / f"{name}.json"
            if found := _read(kept, state):
                return found
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        unchanged = state == [file.stat().st_size, file.stat().st_mtime_ns]
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    if kept is not None and unchanged and time.time() - state[1] / 1e9 > SETTLED:
        _keep(kept, {"file": str(file), "state": state, "sha256": found})
    return found


def _read(kept: Path, state: list[int]) -> str | None:
    try:
        values = json.loads(kept.read_text(encoding="utf-8"))
        return values["sha256"] if values["state"] == state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(kept: Path, values: dict) -> None:
    temporary = kept.with_name(f".{kept.name}.{uuid.uuid4().hex}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(kept)
    except OSError as error:  # then it is read through again next time
        log.info("%s: cannot be written (%s)", kept, error.strerror or error)
