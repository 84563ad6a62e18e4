"""Leaving a course that a run took: the checkpoint to go on from comes first, then what is behind it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from moect import distributed
from moect.monitor.rows import drop_rows_after
from moect.train.checkpoints import reading
from moect.train.checkpoints.writing import remove
from moect.train.folder import RunLog


class Returned(Protocol):
    """A run that has gone back to the state of an earlier step.

    Attributes:
        folder: the run's.
        step: that it went back to.
        log: told of it.
    """

    folder: Path
    step: int
    log: RunLog

    def save(self, judged: bool = False) -> None:
        """Make a checkpoint of the present state; `judged`: what follows from its measurement is done."""

    def settle(self) -> None:
        """Wait until it is complete."""


def keep_course(run: Returned, **line) -> None:
    """Make what a run went back to what it goes on from; `line` is for the log, once it is so. Every rank calls it.

    First the checkpoint, with the text's position of now. Killed before the later ones are gone, a run resumes from one
    of them, finds the same once more and comes here again, with the same values.
    """
    run.save(judged=True)
    run.settle()
    if line:
        run.log.write(**line)
    distributed.on_main(lambda: undo_after(run.folder, run.step))


def undo_after(folder: Path, step: int) -> None:
    """Measurements and checkpoints of later steps are of a course that is not taken any more."""
    drop_rows_after(folder / "monitor", step)
    for path in reading.list_checkpoints(folder / "checkpoints"):
        if reading.step_of(path) > step:
            remove(path)
