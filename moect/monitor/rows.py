"""monitor/forgetting.jsonl: one JSON object a checkpoint, language and domain.

    step, lang, role, domain, documents, bytes, tokens (predictions)
    key                                                  digest of base, text as tokens, window and precision: rows of
                                                         other keys cannot be compared
    bits_per_byte, base_bits_per_byte, delta (model - base); retention (old languages) or gain (new ones). Of a learnt
                                                         language `base` is the model as the run began, and what is told
                                                         is retention; where that was not measured it is told as new
    bits_per_byte_low, bits_per_byte_high and so on for delta, retention, gain   95% intervals, if there are any
    exact_match, base_exact_match                        where the text has answers
    exact                                                the logits beside the base's, where they were compared:
        documents, identical_documents, low, high        of the share of documents, a 95% interval
        tokens, identical_tokens                         predictions whose logits are the base's bit for bit
        top1_agreement, kl, max_logit_difference         kl(base || model) in bits per token
        by_length                                        list of {from, to (tokens), documents, identical_documents,
                                                         low, high}; `to` null in the last
    blocks, expert_load (L, E), load_entropy (L), router_entropy (L), gate, gate_by_block (L), open_share
                                                         where the model has a module; see `Routing`
    gate_threshold                                       of the language gate, where there is one

monitor/evaluations.jsonl has the same columns, of what `moect evaluate` measured on other texts or with other settings;
monitor/tasks.jsonl has one a checkpoint and task, monitor/samples.jsonl one a checkpoint and sample, and
monitor/gate.jsonl one a checkpoint: the threshold that was found for the language gate, `limit` and `confidence` of the
promise, `by` train or evaluate, and `documents` and `touched` ones of data.calibration by language. monitor/mixed.jsonl
has the parts of documents of two languages, see `moect.monitor.measuring.mixed`.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from moect.errors import DataError

Row = dict[str, Any]

FILE_NAME = "forgetting.jsonl"
TASKS = "tasks.jsonl"
APART = "evaluations.jsonl"  # measured afterwards, on other texts or with other settings
SAMPLES = "samples.jsonl"
GATE = "gate.jsonl"  # thresholds of the language gate, one a checkpoint
MIXED = "mixed.jsonl"  # documents that change between two languages
KEYS = {
    FILE_NAME: ("step", "lang", "domain"),
    APART: ("step", "lang", "domain", "key"),
    TASKS: ("step", "task", "metric"),
    GATE: ("step",),
    MIXED: ("step", "old", "new", "domain", "part", "gate_threshold"),
    SAMPLES: ("step", "lang", "domain", "document"),
}


def read_rows(folder: Path, name: str = FILE_NAME) -> list[Row]:
    """All rows of a file, by ascending step; none when nothing was measured yet.

    Args:
        folder: RUN/monitor.
        name: key of KEYS.

    Raises:
        DataError: the file is damaged or cannot be read.
    """
    path = Path(folder) / name
    rows = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return rows
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            _key(row, name)
            if not isinstance(row["step"], int):
                raise TypeError("a step is a number")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: not a row of the monitor; remove the line") from error
        rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def replace_rows(folder: Path, rows: list[Row], name: str = FILE_NAME) -> None:
    """Add rows to a file; one with the same values under its KEYS as an earlier one takes its place. Atomic."""
    added = {_key(row, name) for row in rows}
    kept = [row for row in read_rows(folder, name) if _key(row, name) not in added]
    _write(Path(folder) / name, kept + rows)


def add_rows(folder: Path, rows: list[Row], own: set[tuple[str, str]]) -> None:
    """Add rows beside those of a training, whose own stay as they are: its verdicts rest on them.

    Args:
        folder: RUN/monitor.
        rows: of one step.
        own: (lang, domain) of the texts that the training measures. A row of such a text that the training did not
            write, measured like those that it did, takes its place among them; every other goes to APART.
    """
    there = read_rows(folder)
    keys = {(row["lang"], row["domain"]): row.get("key") for row in there}
    by_place = {_key(row, FILE_NAME): row for row in there}
    missing, apart = [], []
    for row in rows:
        text = row["lang"], row["domain"]
        if text in own and _key(row, FILE_NAME) not in by_place and keys.get(text, row["key"]) == row["key"]:
            missing.append(row)
        elif by_place.get(_key(row, FILE_NAME)) != row:
            apart.append(row)
    for name, some in ((FILE_NAME, missing), (APART, apart)):
        if some:
            replace_rows(folder, some, name)


def drop_rows_after(folder: Path, step: int) -> None:
    """Take the rows of later steps out of every file: those steps were undone."""
    for name in KEYS:
        rows = read_rows(folder, name)
        if any(row["step"] > step for row in rows):
            _write(Path(folder) / name, [row for row in rows if row["step"] <= step])


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds either the whole old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # several runs may write the same file
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, rows: list[Row]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in sorted(rows, key=lambda row: row["step"]))
    write_atomically(path, "".join(lines))


def _key(row: Row, name: str) -> tuple:
    return tuple(row[key] for key in KEYS[name])
