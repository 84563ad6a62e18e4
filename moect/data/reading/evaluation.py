"""Held-out texts for the monitor."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from moect.config import RunConfig
from moect.data.reading.files import resolve_files
from moect.data.reading.hub import dataset_folder, identity
from moect.data.reading.sources import read_documents
from moect.data_config import DataConfig, EvaluationConfig, Role, source_key
from moect.errors import DataError

log = logging.getLogger("moect.data")


@dataclass
class EvaluationDocument:
    """A held-out text, or a prompt and its answer.

    Attributes:
        text: the text; with an answer, the prompt alone.
        answer: what should follow the prompt; None where the text is not a prompt.
        id: its name, as of a `Document`.
    """

    text: str
    answer: str | None = None
    id: str = field(default="", compare=False)

    @property
    def full_text(self) -> str:
        """What bits per byte are measured on: the text, and the answer if there is one."""
        return self.text + (self.answer or "")


@dataclass
class EvaluationText:
    """The documents of one entry of `data.evaluation`."""

    lang: str
    role: Role
    domain: str
    documents: list[EvaluationDocument]


def load_evaluation(config: DataConfig, cache_folder: Path | None = None) -> list[EvaluationText]:
    """Read all held-out texts.

    Args:
        config: reads `evaluation` and what concerns it.
        cache_folder: where documents of datasets are kept, so that the hub is asked once; None: it is asked each time.

    Raises:
        DataError: see `read_documents`; a missing or empty answer makes a document unusable too.
    """
    trained_on = {source_key(source) for source in config.train if source.dataset}
    for key in trained_on & {source_key(source) for source in config.evaluation}:
        log.warning("%s: is in `data.train` too, so it is not held out; give another `split`", key)
    for file in sorted(_files(config.train, config.root) & _files(config.evaluation, config.root)):
        log.warning("%s: is in `data.train` too, so it is not held out; keep such files apart", file)
    return [
        EvaluationText(
            lang=source.lang,
            role=config.languages[source.lang],
            domain=source.domain,
            documents=(
                _kept_documents(source, config, Path(cache_folder))
                if source.dataset and cache_folder is not None
                else _documents(source, config, cache_folder)
            ),
        )
        for source in config.evaluation
    ]


def load_calibration(config: RunConfig, cache_folder: Path | None = None) -> list[EvaluationText]:
    """Read the texts of `data.calibration`; none where the run's language gate does not need them.

    Raises:
        DataError: as `load_evaluation`.
    """
    if not config.calibrates:
        return []
    return load_evaluation(replace(config.data, evaluation=config.data.calibration), cache_folder)


def is_at_hand(source: EvaluationConfig, config: DataConfig, cache_folder: Path) -> bool:
    """Whether a held-out text can be read without the network: a file, a folder, or a dataset that was read before."""
    if not source.dataset or dataset_folder(source, config.root):
        return True
    file = _kept_file(source, config, Path(cache_folder), online=False)
    return file is not None and file.exists()


def _files(sources: list, root: str) -> set[str]:
    return {os.path.realpath(file) for source in sources if source.path for file in resolve_files(source.path, root)}


def _documents(source: EvaluationConfig, config: DataConfig, cache_folder: Path | None) -> list[EvaluationDocument]:
    return [
        EvaluationDocument(d.text, d.fields[source.answer_field] if source.answer_field else None, d.id)
        for d in read_documents(source, config.root, config.max_bad_fraction, cache_folder)
    ]


def _kept_documents(source: EvaluationConfig, config: DataConfig, cache_folder: Path) -> list[EvaluationDocument]:
    """The documents of a dataset, from the cache if they are there, else read and written to it, one JSON object a
    line."""
    file = _kept_file(source, config, cache_folder)
    if file.exists():
        try:
            lines = file.read_text(encoding="utf-8").split("\n")[:-1]
            return [EvaluationDocument(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s: damaged (%s); reading %s again", file, error, source_key(source))
    documents = _documents(source, config, cache_folder)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(json.dumps(asdict(d)) + "\n" for d in documents), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise DataError(
            f"{file}: the cache cannot be written ({error.strerror or error}); free or choose another place"
        ) from error
    return documents


def _kept_file(source: EvaluationConfig, config: DataConfig, cache_folder: Path, online: bool = True) -> Path | None:
    """Where the documents of a dataset are kept; None: its commit is not known, and `online` does not allow to ask."""
    made_of = identity(source, config.root, cache_folder, online)
    if made_of is None:
        return None
    filters = {name: asdict(conditions) for name, conditions in source.filter.items()}
    options = [source.text_field, source.answer_field, source.limit, filters, config.max_bad_fraction]
    digest = hashlib.sha256(json.dumps([*made_of, *options]).encode()).hexdigest()
    return cache_folder / "evaluation" / f"{digest}.jsonl"
