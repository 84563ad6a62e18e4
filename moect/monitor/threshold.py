"""The threshold of the language gate that was found for a checkpoint, for whoever uses its model later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moect.config import RunConfig
from moect.errors import ConfigError, DataError
from moect.gate_config import GateConfig
from moect.monitor.rows import GATE, Row, read_rows


def threshold_row(run_folder: Path, step: int) -> Row | None:
    """What was found at a step, a row of monitor/gate.jsonl; None: nothing was."""
    return next((row for row in read_rows(Path(run_folder) / "monitor", GATE) if row["step"] == step), None)


def calibrated(config: RunConfig, run_folder: Path, step: int) -> RunConfig:
    """The run's configuration with the threshold that was found at a step: by `moect evaluate` after it, or by the
    training for what the configuration promises.

    Raises:
        ConfigError: the run promises something of its gate, and nothing was found at this step.
        DataError: what was found is damaged.
    """
    row, promise = threshold_row(run_folder, step), config.gate
    try:
        if row and (row["by"] == "evaluate" or _keeps(row, promise)):
            return replace(config, moe=replace(config.moe, gate_threshold=float(row["threshold"])))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{run_folder}/monitor/{GATE}: step {step} has no threshold; remove the line") from error
    if config.calibrates:
        raise ConfigError(
            f"{run_folder}: no threshold was found for the language gate at step {step} that keeps "
            f"gate.max_touched_old_documents; moect evaluate RUN --checkpoint step-{step} finds it"
        )
    return config


def _keeps(row: Row, promise: GateConfig) -> bool:
    """Whether what a training found is what the configuration now wants; it may have been changed."""
    limit = promise.max_touched_old_documents
    return limit is not None and row["limit"] <= limit and row["confidence"] >= promise.confidence


def render_threshold(run_folder: Path, measured: Row) -> str | None:
    """How the threshold was found that a row of forgetting.jsonl was measured at, as a line for the screen; None: it
    is the configuration's, or a later measurement found another."""
    row = threshold_row(run_folder, measured["step"])
    if row is None or row["threshold"] != measured.get("gate_threshold"):
        return None
    touched = ", ".join(f"{lang} {row['touched'][lang]:,} of {n:,}" for lang, n in row["documents"].items())
    return (
        f"language gate: tokens pass above {row['threshold']:.6g}; touched of the documents in data.calibration: "
        f"{touched} (so that it is at most {row['limit']:.3g} of others, with {row['confidence']:.0%} confidence)"
    )
