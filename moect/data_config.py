"""What a run reads: corpora, their languages, and how they become batches. Part of the run's configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moect.moe_config import option

STRICT = {"extra": "forbid"}
Role = Literal["old", "new", "learnt"]
KEPT = ("old", "learnt")  # not to be lost


@dataclass
class FilterConfig:
    """What a field of a document must be for the document to be read; all conditions that are given must hold."""

    __pydantic_config__ = STRICT
    equals: str | int | float | bool | None = option(None, "this very value")
    among: list[str | int | float] | None = option(None, "one of these")
    min: float | None = option(None, "a number not below")
    max: float | None = option(None, "a number not above")
    matches: str | None = option(None, "text in which this regular expression is found")
    min_characters: int | None = option(None, "text of at least so many characters")
    max_characters: int | None = option(None, "text of at most so many characters")


@dataclass
class SourceConfig:
    """A corpus: documents of one language."""

    __pydantic_config__ = STRICT
    path: str = option(
        "",
        "file, glob or folder of JSON lines (.jsonl), plain text (.txt, a document a line), both also .gz or .zst, or "
        ".parquet",
    )
    dataset: str | None = option(None, "instead of `path`: hub name of a dataset, or a folder laid out like one")
    subset: str | None = option(None, "of the dataset, its configuration; null: the only or default one")
    split: str = option("train", "of the dataset")
    revision: str | None = option(None, "of a hub dataset, a commit or tag; null: `main` as it is when first read")
    streaming: bool = option(
        True, "of a dataset: read it as it comes; false: first fetch all of it into the cache of datasets"
    )
    lang: str = option("", "language of every document")
    text_field: str = option("text", "key of the text in a JSON line, or column of the dataset")
    id_field: str | None = option(None, "key of a document's name; null: `id` where there is one, else file and line")
    filter: dict[str, FilterConfig] = option({}, "by key or column, what it must be: `{language_score: {min: 0.9}}`")
    limit: int | None = option(None, "take the first so many documents")
    weight: float | None = option(
        None,
        "weight against other sources of the same role; null: all such of a language are one, which weighs its tokens",
    )


@dataclass
class EvaluationConfig:
    """A held-out text that the monitor measures."""

    __pydantic_config__ = STRICT
    path: str = option("", "as in `data.train`")
    dataset: str | None = option(None, "as in `data.train`")
    subset: str | None = option(None, "as in `data.train`")
    split: str = option("train", "as in `data.train`")
    revision: str | None = option(None, "as in `data.train`")
    streaming: bool = option(True, "as in `data.train`")
    lang: str = option("", "language of every document")
    domain: str = option("held-out", "name of the kind of text, for the tables")
    text_field: str = option("text", "key of the text in a JSON line, or column of the dataset")
    filter: dict[str, FilterConfig] = option({}, "as in `data.train`")
    limit: int | None = option(None, "take the first so many documents")
    answer_field: str | None = option(
        None,
        "key of an answer: then the text is a prompt, and the share of exactly right greedy answers is measured too",
    )


@dataclass
class DataConfig:
    """Corpora, their languages and how they are mixed."""

    __pydantic_config__ = STRICT
    root: str = option(".", "folder that relative paths start from; if not given, the environment variable MOECT_DATA")
    languages: dict[str, Role] = option(
        {},
        "role of each language: `old` (the base knows it: to keep), `new` (to learn), or `learnt` (the run "
        "`model.start` learned it: to keep)",
    )
    train: list[SourceConfig] = option([], "corpora to train on")
    evaluation: list[EvaluationConfig] = option([], "held-out texts for the monitor")
    calibration: list[EvaluationConfig] = option(
        [], "held-out texts of old languages, others than in `evaluation`, to find the language gate's threshold on"
    )
    sequence_length: int = option(512, "tokens a row, S; documents are packed into rows and cannot see one another")
    packing: Literal["concatenate", "best-fit"] = option(
        "concatenate",
        "fill rows by joining documents and cutting every S tokens, or by whole documents that fit best, with padding",
    )
    replay: float | None = option(
        None, "share of rows from old and learnt languages; null: by number of tokens, like the others"
    )
    sampling: Literal["temperature", "unimax"] = option(
        "temperature", "languages by `temperature`, or as equally as `max_epochs` allows (UniMax)"
    )
    temperature: float = option(1.0, "a language's weight is its tokens to the power 1/temperature")
    max_epochs: float | None = option(
        None, "no language is read more often; what that takes from one goes to those that it shares the rows with"
    )
    workers: int = option(0, "processes a rank that make batches ahead of time; 0: the rank itself, when it needs one")
    max_bad_fraction: float = option(0.001, "stop when more than this share of a source's documents is unusable")


def source_key(source: SourceConfig | EvaluationConfig) -> str:
    """The name of a source in messages, tables and checkpoints; it does not depend on `data.root`."""
    if source.path:
        return source.path
    subset = f"/{source.subset}" if source.subset else ""
    revision = f"@{source.revision}" if source.revision else ""
    split = f":{source.split}" if source.split != "train" else ""
    return f"{source.dataset}{subset}{revision}{split}"


def check_data(data: DataConfig) -> None:
    """What no single field can know.

    Raises:
        ValueError: something that cannot be meant, by its key.
    """
    if data.sequence_length < 2:
        raise ValueError(f"`data.sequence_length` is {data.sequence_length}: it must be at least 2")
    if data.replay is not None and not 0 <= data.replay <= 1:
        raise ValueError(f"`data.replay` is {data.replay}: it must lie between 0 and 1")
    if data.temperature <= 0:
        raise ValueError(f"`data.temperature` is {data.temperature}: it must be positive")
    if data.max_epochs is not None and data.max_epochs <= 0:
        raise ValueError(f"`data.max_epochs` is {data.max_epochs}: it must be positive")
    if data.sampling == "unimax" and data.max_epochs is None:
        raise ValueError("`data.sampling: unimax` shares rows equally up to a limit: set `data.max_epochs`, say to 4")
    if data.workers < 0:
        raise ValueError(f"`data.workers` is {data.workers}: it cannot be negative")
    if not 0 <= data.max_bad_fraction <= 1:
        raise ValueError(f"`data.max_bad_fraction` is {data.max_bad_fraction}: it must lie between 0 and 1")
    if not data.train:
        raise ValueError("`data.train` is empty: name at least one corpus")
    for section in ("train", "evaluation", "calibration"):
        for i, source in enumerate(getattr(data, section)):
            _check_source(source, f"`data.{section}[{i}]`", data.languages)
    roles = {data.languages[source.lang] for source in data.train}
    if data.replay and not roles & set(KEPT):
        raise ValueError("`data.replay` is set but no corpus in `data.train` is of an old or learnt language")
    if data.replay == 1.0 and "new" in roles:
        raise ValueError("`data.replay` is 1: corpora of new languages would never be read")


def _check_source(source: SourceConfig | EvaluationConfig, where: str, languages: dict[str, Role]) -> None:
    if source.path and source.dataset:
        raise ValueError(f"{where} has both `path` and `dataset`: give one of them")
    if not source.path and not source.dataset:
        raise ValueError(f"{where} needs `path`, files, or `dataset`, a hub name")
    plain = SourceConfig()
    for name in ("subset", "split", "revision", "streaming"):
        if source.path and getattr(source, name) != getattr(plain, name):
            raise ValueError(f"{where}: `{name}` is of a `dataset`, and this is a `path`; remove one of the two")
    if not source.lang:
        raise ValueError(f"{where} needs `lang`")
    if source.lang not in languages:
        raise ValueError(f"{where}: language `{source.lang}` has no role; add it to `data.languages`")
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"{where}: `limit` is {source.limit}, it must be at least 1")
    if getattr(source, "weight", None) is not None and source.weight < 0:
        raise ValueError(f"{where}: `weight` is {source.weight}, it cannot be negative")
    for field, conditions in source.filter.items():
        if not any(value is not None for value in vars(conditions).values()):
            raise ValueError(f"{where}: `filter.{field}` says nothing; give min, max, equals, among or matches")
        for low, high in (("min", "max"), ("min_characters", "max_characters")):
            bounds = getattr(conditions, low), getattr(conditions, high)
            if None not in bounds and bounds[0] > bounds[1]:
                raise ValueError(f"{where}: `filter.{field}` has {low} {bounds[0]:g} above {high} {bounds[1]:g}")
        try:
            re.compile(conditions.matches or "")
        except re.error as error:
            raise ValueError(f"{where}: `filter.{field}.matches` is no regular expression ({error})") from error
