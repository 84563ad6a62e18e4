"""Which checkpoint of a run is exported."""

from __future__ import annotations

import logging
from pathlib import Path

from moect.config import RunConfig
from moect.errors import ExportError
from moect.monitor.rows import read_rows
from moect.monitor.verdict import verdicts
from moect.train.checkpoints.best import best_checkpoint
from moect.train.checkpoints.reading import find_checkpoint, list_checkpoints, step_of

log = logging.getLogger("moect.export")


def choose_checkpoint(run_folder: Path, config: RunConfig, name: str | None = None) -> Path:
    """The named checkpoint of a run, or the best undamaged one within its budget (`moect.monitor.verdict.best`).

    Where no checkpoint was measured on all texts, or the run's base was made from scratch and there is nothing to hold
    it against, that is the newest undamaged one.

    Raises:
        ExportError: checkpoints were measured, and none that is undamaged is within `monitor.max_forgetting`.
        CheckpointError: there is none, or the named one is damaged.
    """
    newest = find_checkpoint(run_folder, name)
    if name is not None or config.model.base is None:
        return newest
    measured = {verdict.step for verdict in verdicts(read_rows(run_folder / "monitor"), config)}
    there = [path for path in list_checkpoints(run_folder / "checkpoints") if step_of(path) in measured]
    if not there:
        if config.monitor.max_forgetting:
            log.warning("%s: no checkpoint was measured, so none is known to be within monitor.max_forgetting", newest)
        return newest
    verdict = best_checkpoint(run_folder, config, sound=True)
    if verdict is None:
        raise ExportError(
            f"{run_folder}: none of {', '.join(path.name for path in there)} is whole and within "
            "monitor.max_forgetting; choose one with --checkpoint all the same, or train on with more data.replay"
        )
    path = run_folder / "checkpoints" / f"step-{verdict.step}"
    if path != newest:
        log.info("%s is the best checkpoint within the budget; %s is newer (--checkpoint takes it)", path, newest.name)
    return path
