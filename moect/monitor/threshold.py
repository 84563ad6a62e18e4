"""The threshold of the language gate that was found for a checkpoint, for whoever uses its model later."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from moect.config import RunConfig
from moect.errors import ConfigError, DataError
from moect.monitor.rows import GATE, Row, read_rows

log = logging.getLogger("moect.monitor")


def threshold_row(run_folder: Path, step: int) -> Row | None:
    """What was found at a step, a row of monitor/gate.jsonl; None: nothing was."""
    return next((row for row in read_rows(Path(run_folder) / "monitor", GATE) if row["step"] == step), None)


def calibrated(config: RunConfig, run_folder: Path, step: int) -> RunConfig:
    """The run's configuration with the threshold that was found at a step, if one was.

    Raises:
        ConfigError: the run promises something of its gate, and nothing was found at this step.
        DataError: what was found is damaged.
    """
    row = threshold_row(run_folder, step)
    if row is None:
        gated = config.method == "moe-ct" and config.moe.language_gate
        if gated and config.gate.max_touched_old_documents is not None:
            raise ConfigError(
                f"{run_folder}: no threshold was found for the language gate at step {step}, which "
                "gate.max_touched_old_documents asks for; moect evaluate RUN --checkpoint "
                f"step-{step} finds it"
            )
        return config
    try:
        return replace(config, moe=replace(config.moe, gate_threshold=float(row["threshold"])))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{run_folder}/monitor/{GATE}: step {step} has no threshold; remove the line") from error


def render_threshold(row: Row) -> str:
    """A row of monitor/gate.jsonl as a line for the screen."""
    touched = ", ".join(f"{lang} {row['touched'][lang]:,} of {n:,}" for lang, n in row["documents"].items())
    return (
        f"language gate: tokens pass above {row['threshold']:.6g}; touched of the documents in data.calibration: "
        f"{touched} (so that it is at most {row['limit']:.3g} of others, with {row['confidence']:.0%} confidence)"
    )
