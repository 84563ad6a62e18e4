"""What a run's folder holds, read for its report."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from moect.config import RunConfig, load_config
from moect.errors import ConfigError
from moect.monitor.rows import FILE_NAME, SAMPLES, TASKS, Row, read_rows

log = logging.getLogger("moect.monitor")

MEASURED = ("checkpoint", "verdict", "monitor")  # events of a step at which the monitor may have left rows


@dataclass(frozen=True)
class Log:
    """The lines of log.jsonl that count.

    Attributes:
        entries: figures and events, in the order of the file.
        superseded: steps of checkpoints that were gone back behind and not made again.
        cut: number of lines that are not whole JSON objects, which a crash leaves behind.
    """

    entries: list[dict]
    superseded: set[int]
    cut: int

    @property
    def figures(self) -> list[dict]:
        """Lines of training, by ascending step."""
        return [e for e in self.entries if "event" not in e and "step" in e]

    def events(self, name: str) -> list[dict]:
        """The events of one name."""
        return [e for e in self.entries if e.get("event") == name]


@dataclass(frozen=True)
class RunFiles:
    """A run, as its folder tells it.

    Attributes:
        folder: the run's.
        config: of config.yaml.
        plan: of plan.json; empty without one.
        log: of log.jsonl.
        rows, tasks, samples: of monitor/, by ascending step, without those of superseded steps.
    """

    folder: Path
    config: RunConfig
    plan: dict
    log: Log
    rows: list[Row]
    tasks: list[dict]
    samples: list[dict]


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder; the run need not be finished.

    Raises:
        ConfigError: it is no run's folder, or cannot be read.
        DataError: a file of its monitor is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: is not the folder of a run, it has no config.yaml; give RUN as `output`/`name`")
    config = load_config(folder / "config.yaml")
    monitor = folder / "monitor"
    try:
        lines = read_entries(folder / "log.jsonl")
        plan = _read_plan(folder / "plan.json")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror or error}); check permissions") from error
    # without those of checkpoints that the run went back behind, and that were not made again
    counted = (
        [row for row in read_rows(monitor, name) if row["step"] not in lines.superseded]
        for name in (FILE_NAME, TASKS, SAMPLES)
    )
    return RunFiles(folder, config, plan, lines, *counted)


def read_log(path: Path) -> tuple[list[dict], set[int], int]:
    """The lines of training that count in log.jsonl, the superseded steps and the number of cut lines; see `Log`."""
    lines = read_entries(path)
    return lines.figures, lines.superseded, lines.cut


def read_entries(path: Path) -> Log:
    """The lines of log.jsonl that count.

    After an event `resume` at step N, earlier lines of steps beyond N are superseded: the steps were made again. So are
    they after an `action` that rolled back to N; but the actions before it stay, because what they did stays done.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    entries: list[dict] = []
    superseded: set[int] = set()
    cut = 0
    for line in lines:
        try:
            entry = json.loads(line)
            step = int(entry.get("step", 0))
        except (ValueError, TypeError, AttributeError):
            cut += 1
            continue
        event = entry.get("event")
        rolled_back = event == "action" and entry.get("action") == "rollback" and entry.get("to") is not None
        if event == "resume" or rolled_back:
            last = int(entry["to"]) if rolled_back else step
            superseded |= {e["step"] for e in entries if e.get("event") in MEASURED and e["step"] > last}
            stays = ("action", "mixture") if rolled_back else ()
            entries = [e for e in entries if e.get("step", 0) <= last or e.get("event") in stays]
        entries.append(entry)
    if cut:
        log.warning("%s: %d line(s) are not whole JSON objects and are left out", path, cut)
    superseded -= {e["step"] for e in entries if e.get("event") in MEASURED}
    return Log(entries, superseded, cut)


def _read_plan(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON; remove it, the report does without") from error
