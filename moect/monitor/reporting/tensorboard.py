"""The monitor's numbers and the report's pictures in TensorBoard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from moect.config import RunConfig
from moect.monitor.reporting.figures import at_step, changes, identical, mean, role
from moect.monitor.rows import Row, read_rows

SCALARS = ("bits_per_byte", "delta", "retention", "gain", "exact_match")
EXACT = ("top1_agreement", "kl", "max_logit_difference")


def write_scalars(writer, rows: list[Row], step: int) -> None:
    """Rows of one step as scalars monitor/LANG/DOMAIN/…, exact/LANG/DOMAIN/… and routing/LANG/DOMAIN/…

    Args:
        writer: a SummaryWriter.
        rows: of one step.
        step: optimizer steps behind them.
    """
    for row in rows:
        name = f"{row['lang']}/{row['domain']}"
        for key in SCALARS:
            for part in (key, f"{key}_low", f"{key}_high"):
                if row.get(part) is not None:
                    writer.add_scalar(f"monitor/{name}/{part}", row[part], step)
        if exact := row.get("exact"):
            writer.add_scalar(
                f"exact/{name}/identical_documents", exact["identical_documents"] / exact["documents"], step
            )
            if exact["tokens"]:
                writer.add_scalar(f"exact/{name}/identical_tokens", exact["identical_tokens"] / exact["tokens"], step)
            for key in EXACT:
                if exact.get(key) is not None:
                    writer.add_scalar(f"exact/{name}/{key}", exact[key], step)
        for key in ("gate", "open_share"):
            if row.get(key) is not None:
                writer.add_scalar(f"routing/{name}/{key}", row[key], step)
        for key in ("load_entropy", "router_entropy"):
            if row.get(key):
                writer.add_scalar(f"routing/{name}/{key}", sum(row[key]) / len(row[key]), step)
        if row.get("expert_load"):
            greatest = max(max(load_E) * len(load_E) for load_E in row["expert_load"])  # 1: every expert got the same
            writer.add_scalar(f"routing/{name}/greatest_load", greatest, step)


def write_end(config: RunConfig) -> None:
    """The report's pictures and the hparams of a run that has ended, beside its scalars."""
    from torch.utils.tensorboard import SummaryWriter

    rows = read_rows(config.folder / "monitor")
    with SummaryWriter(config.folder / "tensorboard") as writer:
        write_images(writer, config.folder / "plots", rows[-1]["step"] if rows else 0)
        write_hparams(writer, config, rows)


def write_images(writer, plots: Path, step: int) -> None:
    """The pictures that `write_report` left in RUN/plots, as images report/NAME.

    Args:
        writer: a SummaryWriter.
        plots: the folder.
        step: of the run.
    """
    import numpy as np
    from PIL import Image

    for path in sorted(Path(plots).glob("*.png")):
        with Image.open(path) as image:
            pixels_HWC = np.asarray(image.convert("RGB"))
        writer.add_image(f"report/{path.stem}", pixels_HWC, step, dataformats="HWC")


def write_hparams(writer, config: RunConfig, rows: list[Row]) -> None:
    """The configuration and the last step's figures as the hparams of this very run, not of a run beside it.

    Args:
        writer: a SummaryWriter.
        config: the run's.
        rows: all that were measured.
    """
    from torch.utils.tensorboard.summary import hparams

    figures, step = last_figures(rows), rows[-1]["step"] if rows else 0
    for summary in hparams(flat(dataclasses.asdict(config)), figures):
        writer.file_writer.add_summary(summary)
    for name, value in figures.items():
        writer.add_scalar(name, value, step)


def last_figures(rows: list[Row]) -> dict[str, float]:
    """The figures of the last step that stand for a run, as hparams metrics."""
    if not rows:
        return {}
    last = at_step(rows, rows[-1]["step"])
    old, new = role(last, "old"), role(last, "new")
    same = identical(old)
    figures = {
        "last/mean_gain": mean(changes(new)),
        "last/mean_forgotten": mean(changes(old)),
        "last/worst_forgotten": max(changes(old), default=None),
        "last/old_documents_identical": same.share if same else None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def flat(values: dict, prefix: str = "") -> dict[str, bool | str | float]:
    """Nested values by dotted key; lists as JSON, what is not set left out."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found[prefix + key] = json.dumps(value, ensure_ascii=False)
        elif value is not None:
            found[prefix + key] = value
    return found
