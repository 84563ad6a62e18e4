"""Questions of a task from files, and whether its examples are among them."""

from __future__ import annotations

import json
from pathlib import Path

import orjson

from moect.data.reading.files import Place, file_blocks
from moect.errors import DataError
from moect.monitor.tasks.sources import Leaf, one_line


def local_dataset(leaf: Leaf):
    """The leaf's files as a `DatasetDict` in memory, so that nothing is written to the cache of datasets.

    Raises:
        DataError: a file that cannot be read, or whose lines do not make a table.
    """
    import datasets

    made = {}
    for split, files in leaf.files.items():
        rows = _rows(files)
        if not rows:
            raise DataError(f"{leaf.where}, split {split!r}: {files[0]} has no lines; give one with questions")
        fields = list(dict.fromkeys(name for row in rows for name in row))
        try:
            made[split] = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in fields})
        except (ValueError, TypeError) as error:  # of Arrow: all values of a field are of one type
            raise DataError(
                f"{leaf.where}, split {split!r}: the lines of {files[0]} do not make a table ({one_line(error)}); give "
                "a field the same type in every line"
            ) from error
    return datasets.DatasetDict(made)


def questions_among_examples(task, leaf: Leaf) -> int:
    """How many questions are also among the examples that may be put before them, all fields equal."""
    if not leaf.changes["num_fewshot"] or not hasattr(task, "sampler"):
        return 0
    pool = {_as_text(document) for document in task.sampler.df}
    asked = {request.doc_id: request.doc for request in task.instances}
    return sum(_as_text(document) in pool for document in asked.values())


def _as_text(document: dict) -> str:
    """All that is asked and answered; a document's own name tells nothing."""
    return json.dumps({k: v for k, v in document.items() if k != "id"}, sort_keys=True, default=str)


def _rows(files: list[Path]) -> list[dict]:
    rows = []
    for block in file_blocks(files, [], [], Place()):
        for number, line in enumerate(block.records, start=block.first):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{block.origin}:{number}: is not JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise DataError(f"{block.origin}:{number}: is no JSON object; mend or remove the line")
            rows.append(row)
    return rows
