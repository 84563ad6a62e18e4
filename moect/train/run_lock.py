"""One training at a time in a run's folder: two that write the same checkpoints would spoil them for both.

The lock lies beside the folder, in OUTPUT/.cache/NAME.lock: it is taken before the run looks at what is there, when its
folder may not exist yet. The main rank holds it, and it ends with that process, however that ends.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from moect import distributed
from moect.config import RunConfig
from moect.errors import TrainingError
from moect.locks import Held, acquire

log = logging.getLogger("moect.train")


@contextmanager
def only_training(config: RunConfig) -> Iterator[None]:
    """Inside, no other training writes to the run's folder; waits for one that does. Every rank calls it.

    Raises:
        TrainingError: that one did not end within `health.timeout_minutes`.
    """
    held: list[TextIO] = []
    distributed.on_main(lambda: _take(config, held))
    try:
        yield
    finally:
        for file in held:
            file.close()


def lock_of(run_folder: Path) -> Path:
    """The file that stands for the lock of a run's folder."""
    folder = Path(run_folder).resolve()
    return folder.parent / ".cache" / f"{folder.name}.lock"


def take_lock(run_folder: Path, minutes: float = 0.0) -> TextIO | None:
    """Take a run's lock; None, said once, where its file system has none.

    Raises:
        Held: a training has it still, after so many minutes.
    """
    path = lock_of(run_folder)

    def say(holder: str) -> None:
        log.warning(
            "%s: another training is at work there (%s); waits for it, %g minutes at most", run_folder, holder, minutes
        )

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return acquire(path, 60 * minutes, say if minutes else None)
    except OSError as error:
        log.warning("%s: no lock (%s); let no second training write to %s", path, error.strerror or error, run_folder)
        return None


def _take(config: RunConfig, held: list[TextIO]) -> None:
    if config.resume == "never" and config.folder.exists():  # which will be refused
        return
    try:
        file = take_lock(config.folder, config.health.timeout_minutes)
    except Held as holder:
        raise TrainingError(
            f"{config.folder}: another training is still at work there ({holder}); end it, or give this one another "
            "name=…"
        ) from None
    if file:
        held.append(file)
