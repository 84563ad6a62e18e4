"""What a run's folder holds, read for its report."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import median

from moect.config import RunConfig, load_config
from moect.errors import ConfigError, DataError
from moect.monitor.rows import APART, FILE_NAME, SAMPLES, TASKS, Row, read_rows

log = logging.getLogger("moect.monitor")

BITS = dict.fromkeys(("bits_per_byte", "base_bits_per_byte", "delta"), Real)
NEEDED = {  # what a report cannot do without, beside the keys by which rows are told apart
    FILE_NAME: {"role": str, **BITS},
    APART: {"role": str, **BITS},
    TASKS: {"lang": str},
    SAMPLES: {},
}
MEASURED = ("checkpoint", "verdict", "monitor")  # events of a step at which the monitor may have left rows


@dataclass(frozen=True)
class Log:
    """The lines of log.jsonl that count.

    Attributes:
        entries: figures and events, in the order of the file.
        superseded: steps of checkpoints that were gone back behind and not made again.
        cut: number of lines that are not whole JSON objects, which a crash leaves behind.
        every: all lines, those that do not count any more too.
    """

    entries: list[dict]
    superseded: set[int]
    cut: int
    every: list[dict]

    @property
    def figures(self) -> list[dict]:
        """Lines of training, by ascending step."""
        return [e for e in self.entries if "event" not in e and "step" in e]

    def events(self, name: str) -> list[dict]:
        """The events of one name."""
        return [e for e in self.entries if e.get("event") == name]

    @property
    def median_speed(self) -> float | None:
        """Tokens a second, the median over the lines of training; None: none says it."""
        speeds = [e["tokens_per_second"] for e in self.figures if e.get("tokens_per_second")]
        return median(speeds) if speeds else None

    @property
    def monitor_share(self) -> float | None:
        """The monitor's part of the time that steps and measurements took, with what was undone or made again: it took
        time as well. None: the log is older than its `seconds`."""
        training = [e.get("seconds") for e in self.every if "event" not in e]
        measuring = [e.get("seconds") or 0.0 for e in self.every if e.get("event") == "monitor"]
        if not measuring or not training or None in training or not sum(training) + sum(measuring):
            return None
        return sum(measuring) / (sum(training) + sum(measuring))

    @property
    def steps_undone(self) -> int:
        """Steps that rollbacks undid. Their text was drawn, and is not drawn again."""
        return sum(map(_steps_undone, self.entries))

    @property
    def tokens_drawn(self) -> tuple[int, int] | None:
        """Tokens that the steps have taken, no padding, and how many of them rollbacks undid; None: not logged.

        The log does not count the tokens of every step: an undone one has taken as many as the mean one.
        """
        resumed = max((n for n, e in enumerate(self.every) if e.get("event") == "resume"), default=-1)
        lines = [e for e in self.every[resumed + 1 :] if _has_tokens(e)] or [e for e in self.entries if _has_tokens(e)]
        if not lines or not lines[-1]["step"]:
            return None
        last = lines[-1]
        place = next(n for n, e in enumerate(self.every) if e is last)
        counted = {id(e) for e in self.entries}
        later = sum(_steps_undone(e) for e in self.every[place:] if id(e) in counted)
        drawn = sum(last["tokens_seen"].values())
        return drawn, round(drawn * self.steps_undone / (last["step"] + self.steps_undone - later))


@dataclass(frozen=True)
class RunFiles:
    """A run, as its folder tells it.

    Attributes:
        folder: the run's.
        config: of config.yaml.
        plan: of plan.json; empty without one.
        log: of log.jsonl.
        rows, tasks, samples: of monitor/, by ascending step, without those of superseded steps.
        apart: likewise, what `moect evaluate` measured on other texts or with other settings.
    """

    folder: Path
    config: RunConfig
    plan: dict
    log: Log
    rows: list[Row]
    tasks: list[dict]
    samples: list[dict]
    apart: list[Row]


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
        [row for row in _rows(monitor, name) if row["step"] not in lines.superseded]
        for name in (FILE_NAME, TASKS, SAMPLES, APART)
    )
    return RunFiles(folder, config, plan, lines, *counted)


def read_log(path: Path) -> tuple[list[dict], set[int], int]:
    """The lines of training that count in log.jsonl, the superseded steps and the number of cut lines; see `Log`."""
    lines = read_entries(path)
    return lines.figures, lines.superseded, lines.cut


def read_entries(path: Path) -> Log:
    """The lines of log.jsonl that count.

    After an event `resume` at step N, earlier lines of steps beyond N are superseded: the steps were made again. So are
    they after a `rollback` to N, or an `action` that was one; but the actions before it stay, because what they did
    stays done. A rollback that a crash interrupted, so that the run resumed beyond where it went back to, was none.

    Raises:
        DataError: a line without a step.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    every: list[dict] = []
    entries: list[dict] = []
    superseded: set[int] = set()
    cut = 0
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            cut += 1
            continue
        step = _step(entry, "step", f"{path}:{number}")
        event, rolled_back = entry.get("event"), _rolled_back(entry)
        if event == "resume" or rolled_back:
            last = _step(entry, "to", f"{path}:{number}") if "to" in entry else step
            superseded |= {e["step"] for e in entries if e.get("event") in MEASURED and e["step"] > last}
            stays = ("action", "rollback", "mixture") if rolled_back else ()
            before = next((e for e in reversed(entries) if _rolled_back(e)), None)
            was_none = event == "resume" and before is not None and step > entries[-1]["step"]
            entries = [e for e in entries if e["step"] <= last or e.get("event") in stays]
            entries = [e for e in entries if not (was_none and e is before)]
        entries.append(entry)
        every.append(entry)
    if cut:
        log.warning("%s: %d line(s) are not whole JSON objects and are left out", path, cut)
    superseded -= {e["step"] for e in entries if e.get("event") in MEASURED}
    return Log(entries, superseded, cut, every)


def _step(entry: dict, key: str, where: str) -> int:
    step = entry.get(key)
    if not isinstance(step, int):
        raise DataError(f"{where}: not a line of a run's log, its `{key}` is {step!r}; remove the line")
    return step


def _rolled_back(entry: dict) -> bool:
    """By the budget, or after skipped steps."""
    by_budget = entry.get("event") == "action" and entry.get("action") == "rollback" and entry.get("to") is not None
    return by_budget or entry.get("event") == "rollback"


def _steps_undone(entry: dict) -> int:
    """By a rollback; logs of before they said where it came from do not know."""
    return (
        entry["from"] - entry.get("to", entry["step"]) if _rolled_back(entry) and entry.get("from") is not None else 0
    )


def _has_tokens(entry: dict) -> bool:
    return "event" not in entry and bool(entry.get("tokens_seen"))


def _rows(monitor: Path, name: str) -> list[Row]:
    rows = read_rows(monitor, name)
    if not all(_lacks(row, name) is None for row in rows):
        for number, line in enumerate((monitor / name).read_bytes().splitlines(), 1):
            if what := _lacks(json.loads(line), name):
                raise DataError(f"{monitor / name}:{number}: not a row of the monitor, {what}; remove the line")
    return rows


def _lacks(row: Row, name: str) -> str | None:
    """What a report misses in a row; None: nothing."""
    for key, kind in NEEDED[name].items():
        if not isinstance(row.get(key), kind):
            return f"its `{key}` is {row.get(key)!r}"
    return None


def _read_plan(path: Path) -> dict:
    """Without parts that are null, or have a null in them."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON; remove it, the report does without") from error
    if not isinstance(plan, dict):
        raise ConfigError(f"{path}: is not a plan, which is a JSON object; remove it, the report does without")
    return {
        key: part
        for key, part in plan.items()
        if part is not None and not (isinstance(part, dict) and None in part.values())
    }
