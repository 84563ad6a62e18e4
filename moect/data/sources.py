"""Read documents: from files of JSON lines or plain text, gzipped or not, one document a line; or from a dataset."""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moect.data.hub import read_rows
from moect.data_config import EvaluationConfig, SourceConfig
from moect.errors import DataError

log = logging.getLogger("moect.data")

EXTENSIONS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Document:
    """A text, and what it came in: the JSON object, the columns of a dataset that were asked for, {} for plain text."""

    text: str
    fields: dict = field(default_factory=dict)


def source_key(source: SourceConfig | EvaluationConfig) -> str:
    """The name of a source in messages, tables and checkpoints; it does not depend on `data.root`."""
    if source.path:
        return source.path
    subset = f"/{source.subset}" if source.subset else ""
    revision = f"@{source.revision}" if source.revision else ""
    split = f":{source.split}" if source.split != "train" else ""
    return f"{source.dataset}{subset}{revision}{split}"


def resolve_files(path: str, root: str) -> list[Path]:
    """The files that `path` (a file or a glob, relative to `root`) stands for, sorted by name.

    Raises:
        DataError: no file matches, a folder where a file should be, or a file of an unknown kind.
    """
    full = Path(os.path.expanduser(root)) / os.path.expanduser(path)
    if full.is_dir():
        raise DataError(f"{full}: is a folder; name its files, for example {path.rstrip('/')}/*.jsonl.gz")
    # a literal name comes first: it may hold characters that a glob would interpret
    names = [full] if full.exists() else map(Path, glob.glob(str(full), recursive=True))
    files = sorted(name for name in names if not name.is_dir())
    if not files:
        raise DataError(f"{full}: no file matches; check the path, `data.root` and the variable MOECT_DATA")
    for file in files:
        if not file.name.endswith(EXTENSIONS):
            raise DataError(f"{file}: unknown kind of file; the kinds that can be read are {', '.join(EXTENSIONS)}")
    return files


def read_documents(
    source: SourceConfig | EvaluationConfig, root: str, max_bad_fraction: float, cache_folder: Path | None = None
) -> Iterator[Document]:
    """The usable documents of a source in the order of its files or rows, at most `source.limit` of them.

    Blank lines of a file hold no document. A document is bad when its text, or the answer that `source.answer_field`
    asks for, is missing, not a string, blank or not encodable as UTF-8. Bad documents are skipped; one log line gives
    their number.

    Args:
        source: what to read, and how many documents of it.
        root: folder that relative paths start from.
        max_bad_fraction: the share of bad documents that is put up with.
        cache_folder: where the commits of hub datasets are kept; None: nowhere.

    Raises:
        DataError: a file that cannot be found, opened or decompressed; a line that is not UTF-8 or not a JSON object
            (with file and line number); a dataset that cannot be had (see `read_rows`); more than `max_bad_fraction`
            bad documents, or no usable one. The last two are known, and raised, only when the iterator is exhausted.
    """
    answer_field = getattr(source, "answer_field", None)
    needed = [source.text_field] + ([answer_field] if answer_field else [])
    good = bad = 0
    first_bad = ""
    key = source_key(source)
    if source.path:
        records = _records(resolve_files(source.path, root), source.text_field)
    else:
        rows = read_rows(source, root, cache_folder, needed)
        records = ((f"{key}, row {number}", row, row) for number, row in enumerate(rows, start=1))
    for where, values, fields in records:
        if good == source.limit:
            break
        if fault := _fault(values, needed):
            bad += 1
            first_bad = first_bad or f"{where}: {fault}"
            continue
        good += 1
        yield Document(values[source.text_field], fields)
    if bad > max_bad_fraction * (good + bad):
        raise DataError(
            f"{first_bad}; {bad} of {good + bad} documents are unusable, more than the share of {max_bad_fraction:g} "
            "that `data.max_bad_fraction` allows: mend the text, name the right field, or raise that key"
        )
    if bad:
        log.warning("%s: skipped %d of %d documents as unusable; %s", key, bad, good + bad, first_bad)
    if not good:
        raise DataError(f"{key}: the corpus is empty, it holds no document; give one with text")


def _records(files: list[Path], text_field: str) -> Iterator[tuple[str, dict, dict]]:
    """Place, the values that are asked for, and the JSON object ({} for plain text) of each line that is not blank."""
    for file, number, line in _lines(files):
        if not line.strip():
            continue
        plain = file.name.endswith((".txt", ".txt.gz"))
        fields = {} if plain else _json_object(line, f"{file}:{number}")
        yield f"{file}:{number}", {text_field: line} if plain else fields, fields


def _lines(files: list[Path]) -> Iterator[tuple[Path, int, str]]:
    """File, line number from 1, and line; decoded line by line, so that an error knows where it happened."""
    for file in files:
        number = 0
        try:
            with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as stream:
                for number, raw in enumerate(stream, start=1):
                    raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
                    yield file, number, raw.rstrip(b"\r\n").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{file}:{number + 1}: damaged gzip data ({error}); fetch or compress it again") from error
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def _json_object(line: str, where: str) -> dict:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON ({error.msg}, column {error.colno}); mend or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{where}: JSON beyond what can be read ({error}); mend or remove the line") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: holds a JSON {type(fields).__name__}, not an object; write one object a line")
    return fields


def _fault(values: dict, needed: list[str]) -> str | None:
    """Why a document cannot be used, or None."""
    for name in needed:
        if name not in values:
            return f"no `{name}`"
        value = values[name]
        if not isinstance(value, str):
            return f"`{name}` is not a string"
        if not value.strip():
            return f"`{name}` is empty"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
            return f"`{name}` is not valid Unicode"
    return None
