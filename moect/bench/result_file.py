"""The file of a measurement: there before it begins, whole after every case, never over another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moect.errors import ConfigError


@contextmanager
def result_file(path: Path | None) -> Iterator[Callable[[dict], None]]:
    """A function that writes a result, as often as there is more of it; without a path it does nothing.

    However the measurement ends, what was written last stays; a file into which nothing was written is removed.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    if path is None:
        yield lambda result: None
        return
    try:
        path.open("x").close()
    except FileExistsError as error:
        raise ConfigError(f"--output {path}: the file exists and is not overwritten; give another name") from error
    except FileNotFoundError as error:
        raise ConfigError(f"--output {path}: there is no folder {path.absolute().parent}; make it first") from error
    except OSError as error:
        raise _unwritable(path, error) from error
    written = False

    def write(result: dict) -> None:
        nonlocal written
        part = path.with_name(f"{path.name}.part")
        try:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)  # so that a process that is killed leaves the last whole one
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _unwritable(path, error) from error
        written = True

    try:
        yield write
    finally:
        if written:
            print(f"\nwrote {path}", flush=True)
        else:
            path.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--output {path}: cannot be written: {error.strerror or error}; give another place")
