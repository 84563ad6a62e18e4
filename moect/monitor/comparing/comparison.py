"""Several runs side by side: what each has learned of the new languages, lost of the old ones, and what it cost."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from moect.errors import DataError
from moect.monitor.comparing.run_summary import Figures, Key, RunSummary, figures, summarise
from moect.monitor.reporting.figures import change
from moect.monitor.reporting.tensorboard import flat
from moect.monitor.rows import Row

log = logging.getLogger("moect.monitor")

Grouping = Literal["config", "name"]

SAME_BASE = 1e-4  # bits per byte: two measurements of one base on one text differ by rounding only
SEED = re.compile(r"(?:[-_](?:seed|s)?[-_=]?|seed)\d+$")  # at the end of a run's name


@dataclass
class Entry:
    """A line of the comparison: a run, or several of one method that differ in their seed.

    Attributes:
        name: of the line.
        runs: its runs.
        figures: of each run, on the texts that all runs share.
    """

    name: str
    runs: list[RunSummary]
    figures: list[Figures]

    def spread(self, values: list[float | None]) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation of one value a run; None: nothing to take it of."""
        known = [value for value in values if value is not None]
        return mean(known) if known else None, stdev(known) if len(known) > 1 else None

    def of_text(self, key: Key, name: str) -> tuple[float | None, float | None]:
        """`spread` of a key of the row of a text."""
        return self.spread([run.rows[key].get(name) for run in self.runs])


@dataclass
class Comparison:
    """A checkpoint of each run on the held-out texts that all of them share.

    Attributes:
        entries: lines, in the order in which their first runs were given.
        texts: a row of each shared text, of the first run: what holds for all of them; old languages first.
        left_out: texts that are not compared, and why.
        last: whether the last checkpoints were asked for.
    """

    entries: list[Entry]
    texts: list[Row]
    left_out: dict[str, str]
    last: bool

    @property
    def runs(self) -> list[RunSummary]:
        """All runs."""
        return [run for entry in self.entries for run in entry.runs]

    @property
    def measure(self) -> str:
        """Key of a row: exact match where every text has answers, else bits per byte."""
        answered = all(run.rows[key_of(t)].get("exact_match") is not None for run in self.runs for t in self.texts)
        return "exact_match" if answered else "bits_per_byte"

    def as_dict(self) -> dict:
        """All figures as plain values: shares, 1 being all; bits per byte; bytes."""
        return {
            "texts": [{name: row[name] for name in ("lang", "role", "domain", "documents")} for row in self.texts],
            "left_out": self.left_out,
            "runs": [
                {"group": entry.name, **_run_dict(run), **dataclasses.asdict(values), "rows": self._rows(run)}
                for entry in self.entries
                for run, values in zip(entry.runs, entry.figures, strict=True)
            ],
        }

    def _rows(self, run: RunSummary) -> list[Row]:
        return [run.rows[key_of(text)] for text in self.texts]


def compare(runs: list[Path], last: bool = False, group: Grouping | None = None) -> Comparison:
    """Compare runs on the held-out texts that they share.

    Args:
        runs: their folders; the same base, measured in the same way.
        last: show the last checkpoint of each; else the best within its budget, and the last where there is none.
        group: put runs into one line, as mean and standard deviation: those whose configurations differ in seed and
            name alone, or those with one name but for a seed at its end (`moe-ct-1`, `moe-ct-seed2`).

    Raises:
        ConfigError: a folder that is no run's.
        DataError: a run that was never measured or is given twice, no text that all share, a base that differs, or
            runs of one name that differ in more than their seed.
    """
    folders = [Path(run) for run in runs]
    real = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if real[number] in real[:number]:
            raise DataError(f"{folder}: is given twice; give each run once")
    summaries = [summarise(folder, last) for folder in folders]
    _name(summaries)
    keys, left_out = _shared(summaries)
    if left_out:
        reasons = "; ".join(f"{text} ({why})" for text, why in left_out.items())
        log.info("not every run was measured on the same texts; left out: %s", reasons)
    texts = [summaries[0].rows[key] for key in keys]
    entries = [
        Entry(name, members, [figures([run.rows[key] for key in keys]) for run in members])
        for name, members in _grouped(summaries, group)
    ]
    return Comparison(entries, sorted(texts, key=lambda row: row["role"] == "new"), left_out, last)


def key_of(row: Row) -> Key:
    """Of its text."""
    return row["lang"], row["domain"]


def _shared(runs: list[RunSummary]) -> tuple[list[Key], dict[str, str]]:
    """Texts that every run was measured on, in the order of the first run; and the others, with the reason."""
    first = runs[0]
    shared, left_out = [], {}
    for key in dict.fromkeys(key for run in runs for key in run.rows):
        named = f"{key[0]} {key[1]}"
        if missing := [run.name for run in runs if key not in run.rows]:
            left_out[named] = f"not measured in {', '.join(missing)}"
        elif why := next((why for run in runs[1:] if (why := _difference(first, run, key))), None):
            left_out[named] = why
        elif any(change(run.rows[key]) is None for run in runs):
            left_out[named] = "the base needs no bits for it, so that no change is a share of them"
        else:
            shared.append(key)
    if not shared:
        text, why = next(iter(left_out.items()))
        raise DataError(f"the runs share no held-out text: {text} {why}; compare runs that measure the same texts")
    return shared, left_out


def _difference(first: RunSummary, run: RunSummary, key: Key) -> str | None:
    """Why a text of that name is not the same in two runs; None: it is."""
    one, other = first.rows[key], run.rows[key]
    if one["role"] != other["role"]:
        return f"{one['role']} in {first.name}, {other['role']} in {run.name}"
    bases_differ = abs(one["base_bits_per_byte"] - other["base_bits_per_byte"]) > SAME_BASE
    # bytes alone say little: without BOS an added token at the beginning leaves out more of the same text
    if one.get("documents") != other.get("documents") or (bases_differ and one.get("bytes") != other.get("bytes")):
        return f"another text of that name in {run.name}"
    if bases_differ and one["role"] == "learnt":
        return f"{first.name} and {run.name} began from other states of what had been learned"
    if bases_differ:
        raise DataError(
            f"{run.folder} and {first.folder}: their bases differ on {key[0]} {key[1]} "
            f"({other['base_bits_per_byte']:.4f} and {one['base_bits_per_byte']:.4f} bits per byte); compare runs of "
            "one base, measured with the same precision and `monitor.window`"
        )
    return None


def _name(runs: list[RunSummary]) -> None:
    """Folders of one name are called by more of their path."""
    for parts in range(2, 1 + max(len(run.folder.absolute().parts) for run in runs)):
        names = [run.name for run in runs]
        for run, name in zip(runs, names, strict=True):
            if names.count(name) > 1:
                run.name = "/".join(run.folder.absolute().parts[-parts:])


def _grouped(runs: list[RunSummary], group: Grouping | None) -> list[tuple[str, list[RunSummary]]]:
    if group is None:
        return [(run.name, [run]) for run in runs]
    of_key = _without_seed if group == "name" else _configuration
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(of_key(run), []).append(run)
    for first, *others in groups.values():
        for run in others:
            _check_same_configuration(first, run)
    named = [(_group_name(members), members) for members in groups.values()]
    names = [name for name, _ in named]
    return [(name if names.count(name) == 1 else members[0].name, members) for name, members in named]


def _without_seed(run: RunSummary) -> str:
    return SEED.sub("", run.name) or run.name


def _configuration(run: RunSummary) -> str:
    return json.dumps(_settings(run), sort_keys=True)


def _check_same_configuration(one: RunSummary, other: RunSummary) -> None:
    ours, theirs = _settings(one), _settings(other)
    key = next((key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)), None)
    if key is not None:
        raise DataError(
            f"--group name: {one.name} and {other.name} differ in more than seed and name, `{key}` is {ours.get(key)} "
            f"and {theirs.get(key)}; use --group config, or leave --group out"
        )


def _settings(run: RunSummary) -> dict:
    """All that decides about a run but its seed, by dotted key; not how it was named, stopped and resumed."""
    values = dataclasses.asdict(run.config)
    for name in ("name", "output", "resume", "seed"):
        del values[name]
    del values["train"]["stop_after"]
    return flat(values)


def _group_name(members: list[RunSummary]) -> str:
    """What the names have in common."""
    if len(members) == 1:
        return members[0].name
    names = {_without_seed(run) for run in members}
    if len(names) == 1:
        return names.pop()
    return os.path.commonprefix(sorted(names)).rstrip("-_ /.") or members[0].config.method


def _run_dict(run: RunSummary) -> dict:
    plain = ("name", "step", "choice", "within", "measured_until", "trained_until", "tokens", "tokens_undone")
    plain += ("trainable", "tokens_per_second")
    values = {name: getattr(run, name) for name in (*plain, "peak_memory", "planned_memory")}
    return {"folder": str(run.folder), "method": run.config.method, "seed": run.config.seed, **values}
