"""The best checkpoint of a run within its budget, as far as checkpoints are still there."""

from __future__ import annotations

import logging
from pathlib import Path

from moect.config import RunConfig
from moect.errors import DataError
from moect.monitor.rows import read_rows
from moect.monitor.verdict import Verdict, best
from moect.train.checkpoints.reading import damage, list_checkpoints, step_of

log = logging.getLogger("moect.checkpoint")


def best_checkpoint(
    run_folder: Path, config: RunConfig, sound: bool = False, before: int | None = None
) -> Verdict | None:
    """The verdict on it; None where none was measured and is within the budget, or measurements are damaged.

    Args:
        run_folder: the run's folder.
        config: the run's.
        sound: pass damaged checkpoints over, and say so; to know, every file of the best one is read.
        before: only among the measurements of steps before this one; None: among all.
    """
    folder = Path(run_folder) / "checkpoints"
    steps = [step_of(path) for path in list_checkpoints(folder)]
    try:
        rows = read_rows(Path(run_folder) / "monitor")
    except DataError as error:
        log.warning("%s; no checkpoint is taken for the best", error)
        return None
    rows = rows if before is None else [row for row in rows if row["step"] < before]
    while verdict := best(rows, config, steps):
        path = folder / f"step-{verdict.step}"
        fault = damage(path) if sound else None
        if fault is None:
            return verdict
        log.warning("%s: the best checkpoint, but %s; passed over", path, fault)
        steps.remove(verdict.step)
    return None
