"""Datasets of the Hugging Face hub, or folders laid out like them: which version is read, and its rows as a stream.

`main` of a dataset moves. The commit that it stood at when it was first read is kept in the cache, so every stage,
resume and rank after that reads the same text, and none of them needs the network to know which.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from moect.data.reading.digests import digest
from moect.data.reading.files import BLOCK_BYTES, BLOCK_ROWS, Block, Place, in_blocks, row_bytes
from moect.data_config import EvaluationConfig, SourceConfig, source_key
from moect.errors import DataError

log = logging.getLogger("moect.data")

COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 60.0  # to wait for an answer about a dataset
SHOWN = 8  # names in a message


def dataset_folder(source: SourceConfig | EvaluationConfig, root: str) -> Path | None:
    """The folder that `source.dataset` names, relative to `root`; None for a hub name.

    Raises:
        DataError: it can only be a folder and there is none, or it is a file, or a folder with a revision.
    """
    name = source.dataset
    folder = Path(os.path.expanduser(root)) / os.path.expanduser(name)
    if folder.is_dir():
        if source.revision:
            raise DataError(f"{folder}: is a folder, which has no `revision`; remove that key")
        return folder
    if folder.exists():
        raise DataError(f"{folder}: is a file, no dataset; give it as `path`, or name its folder")
    if name.startswith(("/", "./", "../", "~")):
        raise DataError(f"{folder}: there is no such folder; check `dataset`, `data.root` and the variable MOECT_DATA")
    return None


def identity(
    source: SourceConfig | EvaluationConfig, root: str, cache_folder: Path | None, online: bool = True
) -> list[str] | None:
    """What decides which rows a dataset has: commit, subset and split, or the digests of a folder's files.

    Args:
        source: with a `dataset`.
        root: what a relative folder starts from.
        cache_folder: where commits are kept; None: nowhere.
        online: whether the hub may be asked; if not, the answer is None where nobody has asked before.

    Raises:
        DataError: as `dataset_folder` and `dataset_blocks`.
    """
    if folder := dataset_folder(source, root):
        files = _builder(source, folder, None).config.data_files[source.split]
        return ["folder", *(part for file in files for part in (Path(file).suffix, digest(Path(file), cache_folder)))]
    commit = _commit(source, cache_folder, online)
    return commit and ["hub", source.dataset, source.subset or "", source.split, commit]


def dataset_blocks(
    source: SourceConfig | EvaluationConfig,
    root: str,
    cache_folder: Path | None,
    columns: list[str],
    wished: list[str],
    after: Place,
) -> Iterator[Block]:
    """The rows of a dataset in its own order: streamed, or, with `source.streaming` false, from the datasets library's
    cache, which then holds all of it.

    Args:
        source, root, cache_folder: as for `identity`.
        columns: those that must be there.
        wished: those that are read too where they are there.
        after: where to begin.

    Raises:
        DataError: no such dataset, subset, split, revision or column; no access; no network; or damaged data.
    """
    if after.file:  # it was read to its end
        return
    folder = dataset_folder(source, root)
    commit = None if folder else _commit(source, cache_folder)
    builder = _builder(source, folder, commit)
    blocks = _streamed if source.streaming else _stored
    number = after.record
    try:
        for rows, last in blocks(builder, source, columns, wished, after):
            first, number = number + 1, number + len(rows)
            yield Block(source_key(source), "rows", first, rows, last or Place(file=1, record=number))
    except DataError:
        raise
    except Exception as error:  # each file format has exceptions of its own
        raise _explained(error, source, commit, f"after {number} rows" if number else "") from error


def _streamed(
    builder, source, columns: list[str], wished: list[str], after: Place
) -> Iterator[tuple[list, Place | None]]:
    """Rows, and where to go on behind them; None for the last."""
    stream = builder.as_streaming_dataset(split=source.split)
    names = stream.column_names or list(next(iter(stream), {}))
    stream = stream.select_columns(_chosen(source, names, columns, wished))
    if after.stream:
        stream.load_state_dict(after.stream)
    elif after.record:  # it was read from the cache of datasets before
        stream = stream.skip(after.record)
    number, rows, size = after.record, [], 0
    for row in stream:
        rows.append(row)
        size += row_bytes(row)
        if len(rows) == BLOCK_ROWS or size >= BLOCK_BYTES:
            number += len(rows)
            yield rows, Place(record=number, stream=stream.state_dict())
            rows, size = [], 0
    if rows:
        yield rows, None


def _stored(
    builder, source, columns: list[str], wished: list[str], after: Place
) -> Iterator[tuple[list, Place | None]]:
    """As `_streamed`."""
    log.info("%s: fetching all of it into %s", source_key(source), builder.cache_dir)
    builder.download_and_prepare()
    table = builder.as_dataset(split=source.split)
    table = table.select_columns(_chosen(source, table.column_names, columns, wished))
    number = after.record
    while number < len(table):
        rows = next(in_blocks(_rows(table[number : number + BLOCK_ROWS])))  # blocks end where those of a stream do
        number += len(rows)
        yield rows, Place(record=number) if number < len(table) else None


def _rows(columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _chosen(source, names: list[str], columns: list[str], wished: list[str]) -> list[str]:
    """The columns to read, of those that there are."""
    if missing := [name for name in columns if name not in names]:
        raise DataError(
            f"{_named(source)}: has no column `{missing[0]}`{_near(missing[0], names)}; set `text_field` (or "
            "`answer_field`, `id_field`, `filter`) to the right one"
        )
    return [*columns, *(name for name in wished if name in names and name not in columns)]


def _builder(source: SourceConfig | EvaluationConfig, folder: Path | None, commit: str | None):
    """The datasets library's builder for a subset; its split is there."""
    import datasets

    datasets.disable_progress_bars()  # of listing files; `Progress` tells how far the text is
    path = str(folder) if folder else f"hf://datasets/{source.dataset}"  # the prefix: never a folder that lies here
    try:
        builder = datasets.load_dataset_builder(path, source.subset, revision=commit)
    except Exception as error:
        # a wrong subset is a plain ValueError: ask for the names
        names = _subsets(path, commit) if isinstance(error, ValueError) else []
        if source.subset is None and len(names) > 1:
            raise DataError(
                f"{_named(source)}: has several subsets, {_some(names)}; choose one with `subset`"
            ) from error
        if source.subset is not None and names and source.subset not in names:
            raise DataError(
                f"{_named(source)}: there is no subset {source.subset!r}{_near(source.subset, names)}; check `subset`"
            ) from error
        raise _explained(error, source, commit) from error
    if commit and builder.hash != commit:
        # without an answer from the hub, datasets takes whatever version it once stored
        raise DataError(f"{_named(source)}: commit {commit} cannot be had now; {_elsewhere(source)}")
    splits = [str(name) for name in builder.config.data_files or builder.info.splits or {}]
    if source.split not in splits:
        raise DataError(
            f"{_named(source)}: there is no split {source.split!r}{_near(source.split, splits)}; check `split`"
        )
    return builder


def _subsets(path: str, commit: str | None) -> list[str]:
    import datasets

    try:
        return datasets.get_dataset_config_names(path, revision=commit)
    except Exception:  # then it is not the subset that is wrong
        return []


def _commit(source: SourceConfig | EvaluationConfig, cache_folder: Path | None, online: bool = True) -> str | None:
    """The commit that `source.revision` stands for: itself, or as kept, or as the hub says, which is kept then."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source.dataset)
    except HFValidationError as error:
        raise _explained(error, source, None) from error
    revision = source.revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    kept = None
    if cache_folder is not None:
        kept = Path(cache_folder) / "hub" / f"{source.dataset}@{revision}".replace("/", "--")
        if kept.exists():
            commit = kept.read_text(encoding="utf-8").strip()
            if COMMIT.fullmatch(commit):
                _tell(source.dataset, revision, commit, kept)
                return commit
            log.warning("%s: holds no commit; asking the hub again", kept)
    if not online:
        return None
    commit = _ask(source, revision)
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(f".{kept.name}.{uuid.uuid4().hex}")
            temporary.write_text(commit + "\n", encoding="utf-8")
            temporary.replace(kept)
        except OSError as error:
            raise DataError(
                f"{kept}: the cache cannot be written ({error.strerror or error}); free or choose another place"
            ) from error
    _tell(source.dataset, revision, commit, kept)
    return commit


def _ask(source: SourceConfig | EvaluationConfig, revision: str) -> str:
    """The hub's answer: the commit of a revision, of a dataset that may be read."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(source.dataset, repo_type="dataset")
        return HfApi().dataset_info(source.dataset, revision=revision, timeout=SECONDS).sha
    except Exception as error:
        raise _explained(error, source, None) from error


def _explained(
    error: Exception, source: SourceConfig | EvaluationConfig, commit: str | None, when: str = ""
) -> DataError:
    """What the libraries raised, as one line with a remedy."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import HfApi, errors, is_offline_mode
    from huggingface_hub.utils import httpx

    if isinstance(error, DatasetNotFoundError):  # hides which of the hub's own exceptions it was: ask again
        try:
            HfApi().auth_check(source.dataset, repo_type="dataset")
            HfApi().dataset_info(source.dataset, revision=commit, timeout=SECONDS)
        except Exception as precise:
            error = precise
    name = _named(source)
    where = f"{name}, {when}" if when else name
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{lines[0] if lines else 'no reason given'} ({type(error).__name__})"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled) or (isinstance(error, ConnectionError) and is_offline_mode()):
        text = f"{where}: is on the Hugging Face hub and HF_HUB_OFFLINE is set; unset it, or {_elsewhere(source)}"
    elif isinstance(error, errors.GatedRepoError):
        text = (
            f"{name}: is gated; accept its terms on https://huggingface.co/datasets/{source.dataset} and log in with "
            "`hf auth login`"
        )
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        text = (
            f"{name}: neither a folder nor a dataset of the hub that you may see; check `dataset`, and log in with "
            "`hf auth login` if it is private"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        gone = f"commit {commit} is gone; set `revision`, or remove the folder `hub` of the token cache to take another"
        known = commit is None or commit == source.revision
        text = f"{name}: " + (f"has no revision {source.revision or 'main'!r}; check `revision`" if known else gone)
    elif status == 401:
        text = f"{where}: the hub does not accept your token; log in again with `hf auth login`"
    elif isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
        text = f"{where}: the Hugging Face hub cannot be reached, {reason}; mend the network, or {_elsewhere(source)}"
    elif isinstance(error, errors.HfHubHTTPError):
        text = f"{where}: the Hugging Face hub refused, {reason}; try again later"
    else:
        text = f"{where}: cannot be read, {reason}; check `dataset` and `subset`, or mend the files"
    return DataError(text)


def _elsewhere(source: SourceConfig | EvaluationConfig) -> str:
    """How to do without the network here. A folder with the card, but not all files that it names, would not load."""
    return (
        f"fetch its files where there is a network, `hf download {source.dataset} --repo-type dataset --include "
        "PATTERN --local-dir DIR`, and give their folder as `dataset`"
    )


def _named(source: SourceConfig | EvaluationConfig) -> str:
    return f"{source.dataset}/{source.subset}" if source.subset else source.dataset


def _near(name: str, names: list[str]) -> str:
    """The names that were perhaps meant, else all."""
    near = difflib.get_close_matches(name, names, n=3)
    return f", but {' and '.join(map(repr, near))}" if near else f", but {_some(names)}"


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {more} more" if more > 0 else "")


@cache
def _tell(dataset: str, revision: str, commit: str, kept: Path | None) -> None:
    """Say on the main rank which text it is; once, for all sources of one dataset."""
    from moect.distributed import is_main

    if is_main():
        again = f", as kept in {kept}: remove that file to ask the hub again" if kept else ""
        log.info("%s: %s is commit %s%s", dataset, revision, commit[:12], again)
