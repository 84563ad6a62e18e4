"""The best checkpoint of a run within its budget, as far as checkpoints are still there."""

from __future__ import annotations

import logging
from pathlib import Path

from moect.config import RunConfig
from moect.errors import DataError
from moect.monitor.rows import read_rows
from moect.monitor.verdict import Verdict, best
from moect.train.checkpoint import list_checkpoints, step_of

log = logging.getLogger("moect.checkpoint")


def best_checkpoint(run_folder: Path, config: RunConfig) -> Verdict | None:
    """The verdict on it; None where none was measured and is within the budget, or measurements are damaged."""
    steps = [step_of(path) for path in list_checkpoints(Path(run_folder) / "checkpoints")]
    try:
        return best(read_rows(Path(run_folder) / "monitor"), config, steps)
    except DataError as error:
        log.warning("%s; no checkpoint is taken for the best", error)
        return None
