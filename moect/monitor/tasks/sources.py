"""Which tasks of lm-eval `monitor.tasks` means: their descriptions, and the files that stand in for their datasets.

A name is one of our own (files/), a task, group or tag of lm-eval, or the path of a YAML file. Nothing is fetched
here, no text is read.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from moect.config import RunConfig
from moect.data.reading.files import resolve_files
from moect.errors import ConfigError, DataError, MoectError
from moect.monitor.tasks.manners import calm
from moect.monitor_config import TaskConfig

log = logging.getLogger("moect.monitor")

OWN = Path(__file__).with_name("files")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
NAMED = re.compile(rb"^(task|group):[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)


@dataclass
class Leaf:
    """A task with questions of its own, not a group.

    Attributes:
        name: as lm-eval calls it.
        wanted: the entry of `monitor.tasks` that asks for it.
        where: that entry, for messages.
        path: its YAML file; None where a group describes it.
        changes: values that take the place of the file's.
        files: of each split, those that stand in for the task's dataset; empty: it reads its own.
    """

    name: str
    wanted: TaskConfig
    where: str
    path: Path | None
    changes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)

    def description(self, functions: bool) -> dict[str, Any]:
        """The task's description with all it includes, and our changes.

        Args:
            functions: import the Python functions it names; else they are text.

        Raises:
            ConfigError: the file, or one it includes, cannot be read.
        """
        return {**(_read(self.path, self.where, functions) if self.path else {}), **self.changes}


def check_tasks(config: RunConfig) -> None:
    """Find out what is wrong with `monitor.tasks`, as far as that shows without data and model.

    Raises:
        ConfigError: an unknown task, file or split; a description that cannot be read; a task that would run code; or
            examples that would come from the questions.
    """
    find_leaves(config)


def find_leaves(config: RunConfig) -> list[Leaf]:
    """The tasks of a run, groups resolved, as they are to be measured.

    Raises:
        ConfigError: see `check_tasks`.
    """
    if not config.monitor.tasks:
        return []
    leaves: list[Leaf] = []
    with calm(tell=False):
        for index, wanted in enumerate(config.monitor.tasks):
            where = f"monitor.tasks[{index}], task {wanted.task!r}"
            found = list(_find(wanted, where))
            if wanted.files and len(found) > 1:
                raise ConfigError(f"{where}: is a group of {len(found)} tasks; give `files` to each by its own name")
            for leaf in found:
                _settle(leaf, config.data.root)
            leaves += found
    seen: dict[tuple[str, str], str] = {}
    for leaf in leaves:
        measured = leaf.name, leaf.wanted.lang
        if measured in seen:
            other = seen[measured]
            raise ConfigError(f"{leaf.where}: {other} measures {leaf.name!r} too, for the same language; keep one")
        seen[measured] = leaf.where
    return leaves


def _find(wanted: TaskConfig, where: str) -> Iterator[Leaf]:
    name = wanted.task
    if not name.endswith((".yaml", ".yml")):
        yield from _of_name(name, wanted, where, {}, None)
        return
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(f"{where}: there is no such file; give its path from where the run is started")
    values = _read(path, where, functions=False)
    if "group" in values:
        yield from _of_group(_read(path, where, functions=True), wanted, where, {}, path.parent)
    elif isinstance(values.get("task"), str):
        yield Leaf(values["task"], wanted, where, path)
    else:
        raise ConfigError(f"{where}: the file names neither a task nor a group; add `task: NAME`")


def _of_name(name: str, wanted: TaskConfig, where: str, changes: dict, beside: Path | None) -> Iterator[Leaf]:
    """What has this name: among our own tasks, in the folder of a group's file, or in lm-eval."""
    from lm_eval.tasks._index import Kind  # there is no public way to see what a group holds without loading its data

    own, near = OWN / f"{name}.yaml", _tasks_in(beside).get(name) if beside else None
    if path := own if own.is_file() else near or _library_tasks().get(name):
        yield Leaf(name, wanted, where, path, dict(changes))
        return
    entry = _library_index().get(name)  # a group or tag
    if entry is None:
        names = [*(path.stem for path in OWN.glob("*.yaml")), *_library_index()]
        similar = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else "`lm_eval ls tasks` lists those of lm-eval"
        raise ConfigError(f"{where}: there is no task {name!r}; {hint}")
    if entry.kind is Kind.TAG:
        for child in sorted(entry.tags):
            yield from _of_name(child, wanted, where, changes, beside)
    elif entry.kind is Kind.GROUP:
        yield from _of_group(_read(entry.yaml_path, where, functions=True), wanted, where, changes, beside)
    else:
        yield Leaf(name, wanted, where, entry.yaml_path, dict(changes))


def _of_group(group: dict, wanted: TaskConfig, where: str, changes: dict, beside: Path | None) -> Iterator[Leaf]:
    """What a group holds. Values that a group has for its tasks give way to those that an outer group has for it."""
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES

    changes = {**{k: v for k, v in group.items() if k not in GROUP_FIELD_NAMES}, **changes}
    for child in group["task"] if isinstance(group["task"], list) else [group["task"]]:
        if isinstance(child, str):
            yield from _of_name(child, wanted, where, changes, beside)
        elif isinstance(child.get("task"), list):
            yield from _of_group(child, wanted, where, changes, beside)
        elif "output_type" in child or "doc_to_text" in child:  # a task described in its place
            yield Leaf(child["task"], wanted, where, None, {**changes, **child})
        else:
            own = {k: v for k, v in child.items() if k not in ("group", "task")}
            yield from _of_name(child.get("group") or child["task"], wanted, where, {**changes, **own}, beside)


@cache
def _library_tasks() -> dict[str, Path]:
    import lm_eval

    return _tasks_in(Path(lm_eval.__file__).with_name("tasks"))


@cache
def _tasks_in(folder: Path) -> dict[str, Path]:
    """The YAML file of each task below a folder. To read them for their names alone is several times as fast as the
    library's own index, which resolves what they include."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        names = dict(NAMED.findall(path.read_bytes()))
        if b"group" not in names and b"task" in names:
            found.setdefault(names[b"task"].decode(), path)
    return found


@cache
def _library_index() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    log.info("reading the descriptions of all tasks of lm-eval")
    return TaskManager().task_index


def _read(path: Path, where: str, functions: bool) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path, resolve_func=functions)
    except Exception as error:  # YAML, includes, and whatever the imported code raises
        told = one_line(error)
        raise ConfigError(f"{where}: {path} cannot be used: {told}; mend it or choose another task") from error


def _settle(leaf: Leaf, root: str) -> None:
    """Put the entry's `files` and `shots` into the task's description.

    Raises:
        ConfigError: see `check_tasks`.
    """
    wanted, described = leaf.wanted, leaf.description(functions=True)  # functions that cannot be imported show here
    if described.get("unsafe_code"):
        raise ConfigError(f"{leaf.where}: {leaf.name} runs code that the model writes; choose another task")
    if described.get("doc_to_image") or described.get("doc_to_audio"):
        raise ConfigError(f"{leaf.where}: {leaf.name} shows images or sound; choose a task of text")
    _check_metrics(leaf, described)
    if wanted.shots and described.get("num_fewshot") == 0:
        raise ConfigError(f"{leaf.where}: {leaf.name} is always asked without examples; leave `shots` out")
    shots = described.get("num_fewshot") or 0 if wanted.shots is None else wanted.shots
    leaf.changes["num_fewshot"] = shots
    if wanted.files:
        leaf.files = {s: _files(name, f"{leaf.where}, split {s!r}", root) for s, name in wanted.files.items()}
        leaf.changes |= _splits_from_files(leaf, described, shots)
        described |= leaf.changes
    elif described.get("dataset_path") == "json" and "data_files" not in (described.get("dataset_kwargs") or {}):
        raise ConfigError(f"{leaf.where}: {leaf.name} has no text of its own; add `files: {{test: FILE.jsonl}}`")
    if shots and "class" not in described:
        _check_examples(leaf, described)


def _check_metrics(leaf: Leaf, described: dict) -> None:
    """What is no metric of lm-eval's own it would look for among the programs of the hub."""
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    for metric in () if described.get("process_results") else described.get("metric_list") or ():
        name = metric.get("metric")
        if isinstance(name, str) and (metric.get("hf_evaluate") or name not in metric_registry):
            raise ConfigError(
                f"{leaf.where}: its metric {name!r} would be code from the hub, which is never run; choose another "
                "task or metric"
            )


def _files(name: str, where: str, root: str) -> list[Path]:
    try:
        files = resolve_files(name, root)
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from error
    if odd := [file for file in files if ".jsonl" not in file.suffixes[-2:]]:
        raise ConfigError(f"{where}: {odd[0]} is no file of JSON lines (.jsonl, .jsonl.gz, .jsonl.zst); convert it")
    return files


def _splits_from_files(leaf: Leaf, described: dict, shots: int) -> dict[str, Any]:
    """Changes to the description, so that it reads the splits that there are files for, and no others."""
    given = list(leaf.files)
    questions = _question_split(leaf, described)
    if questions not in given:
        raise ConfigError(f"{leaf.where}: its questions are of split {questions!r}; give `files` for that one")
    known = {described[key] for key in SPLITS if described.get(key)}
    examples = {**(described.get("fewshot_config") or {})}
    known |= {examples["split"]} if examples.get("split") else set()
    changes = {key: None for key in SPLITS if described.get(key) not in given}
    if examples.get("split") not in given:
        examples.pop("split", None)
    if more := [split for split in given if split not in known]:
        if len(more) > 1 or not shots or known & set(given) != {questions}:
            raise ConfigError(
                f"{leaf.where}: has no split {more[0]!r}, but {', '.join(map(repr, sorted(known)))}; correct `files`"
            )
        changes["fewshot_split"] = more[0]  # the task has no examples of its own: these are some
    return changes | {
        "fewshot_config": examples or None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": None,
    }


def _question_split(leaf: Leaf, described: dict) -> str:
    split = described.get("test_split") or described.get("validation_split")
    if split is None:
        raise ConfigError(f"{leaf.where}: {leaf.name} names no `test_split`; add it to the task's YAML file")
    return split


def _check_examples(leaf: Leaf, described: dict) -> None:
    """lm-eval falls back to the questions when it finds no other examples."""
    config = described.get("fewshot_config") or {}
    split = config.get("split") or described.get("fewshot_split")
    if split is None and config.get("samples") is not None:
        return
    split = split or described.get("training_split") or described.get("validation_split")
    questions = _question_split(leaf, described)
    if split in (None, questions):
        raise ConfigError(
            f"{leaf.where}: its {described['num_fewshot']} examples would come from the questions themselves; "
            "give another split in `files`, or `shots: 0`"
        )
    if same := set(leaf.files.get(split, ())) & set(leaf.files.get(questions, ())):
        raise ConfigError(
            f"{leaf.where}: {same.pop()} has both the questions and the examples before them; give another file"
        )


def one_line(error: BaseException) -> str:
    """What an exception of a library says, on one line."""
    kind = "" if isinstance(error, MoectError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]
