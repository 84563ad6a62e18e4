"""What a run does after too many skipped steps in a row: back to the last good checkpoint, on with other text.

The decision follows from the state of the run alone. A run that is killed anywhere in it resumes from a checkpoint of
before, skips the same steps and comes here again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from moect import distributed
from moect.config import RunConfig
from moect.data.batches.loader import Loader
from moect.errors import CheckpointError, TrainingError
from moect.train.checkpoints import reading
from moect.train.checkpoints.restore import newest_sound
from moect.train.undo import Returned, keep_course

log = logging.getLogger("moect.train")


class Course(Returned, Protocol):
    """A run whose steps are skipped.

    Attributes:
        config: the run's.
        main: whether this is the rank that speaks.
        loader: of its text.
        health_rollbacks: times that it was sent back so.
    """

    config: RunConfig
    main: bool
    loader: Loader
    health_rollbacks: int

    def go_back(self, path: Path) -> None:
        """Take weights, optimizer and step from a checkpoint; the text goes on from where it is."""


def roll_back(run: Course, skipped: int, why: str) -> None:
    """Send a run back to its newest sound checkpoint after which no step had been skipped. Every rank calls it.

    Args:
        run: it.
        skipped: steps in a row.
        why: the last of them was.

    Raises:
        TrainingError: there is none, or it was sent back as often as it may be.
    """
    run.settle()  # a checkpoint in flight may be the one
    came_from = run.step
    path = newest_sound(distributed.on_main(lambda: _good(run.folder / "checkpoints", came_from)))
    if path is None:
        raise _end(run, skipped, why, "there is no checkpoint from before them to go back to")
    if run.health_rollbacks >= run.config.health.max_rollbacks:
        times = run.health_rollbacks
        raise _end(run, skipped, why, f"it was sent back as often as health.max_rollbacks allows ({times})")
    run.go_back(path)
    run.health_rollbacks += 1
    if run.main:
        log.warning("step %d: %d steps skipped in a row; back to %s, the text goes on", came_from, skipped, path)
    keep_course(run, **{"event": "rollback", "step": run.step, "from": came_from, "skipped": skipped, "why": why})


def _good(folder: Path, step: int) -> list[Path]:
    """Checkpoints of a run at a step that were made right after a step that was taken, newest first; with those of
    which that cannot be read, whose damage whoever looks at them will tell."""
    good = []
    for path in reading.list_checkpoints(folder):
        try:
            skips = reading.read_info(path).get("skips_in_row", 0)
        except CheckpointError:
            skips = 0
        if reading.step_of(path) < step and not skips:  # later ones are of another course
            good.append(path)
    return good


def _end(run: Course, skipped: int, why: str, what: str) -> TrainingError:
    reason = f"{skipped} steps were skipped in a row (the last: {why}), and {what}"
    run.log.write(event="stop", step=run.step, why=reason)
    first, rows = run.step - skipped + 1, run.loader.rows
    first_row = rows - skipped * run.config.train.batch_size
    error = TrainingError(
        f"{run.folder}: ends at step {run.step}: {reason}; lower train.lr, lengthen train.warmup, or look at the text "
        f"of the steps from {first} on (rows {first_row:,} to {rows - 1:,}), then go on with resume=auto"
    )
    error.told_by_main_rank = not run.main
    return error
