"""Files of text: which ones a path stands for, and their records in blocks, from any place on."""

from __future__ import annotations

import glob
import gzip
import logging
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from moect.errors import DataError

log = logging.getLogger("moect.data")

COMPRESSIONS = ("", ".gz", ".zst")
LINES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".txt") for packed in COMPRESSIONS)
EXTENSIONS = (*LINES, ".parquet")
BLOCK_BYTES = 2**20  # of text that is read, tokenized and written at once
BLOCK_ROWS = 512  # the same for rows, whose size is not known before they are read


@dataclass(frozen=True)
class Place:
    """Where reading goes on.

    Attributes:
        file: number of the file among those of the source.
        byte: bytes of its decompressed text before this place; of lines only.
        record: lines or rows before this place, in the file or the dataset.
        stream: state of a dataset's stream, as the datasets library keeps it; None at its start.
    """

    file: int = 0
    byte: int = 0
    record: int = 0
    stream: dict | None = None


@dataclass
class Block:
    """Records that lie one after another in a file or a dataset, as they are read: lines, or rows.

    Attributes:
        origin: the file or dataset, as messages name it.
        kind: `jsonl` and `txt`: records are lines, bytes; `rows`: mappings of columns to values.
        first: number of the first record, from 1.
        records: not looked into yet; text may still be bytes.
        after: where the next block begins.
        bytes_read: of the source's files, compressed as they are; of a dataset 0.
    """

    origin: str
    kind: str
    first: int
    records: list
    after: Place
    bytes_read: int = 0


def resolve_files(path: str, root: str) -> list[Path]:
    """The files that `path` (a file, a glob or a folder, relative to `root`) stands for, sorted by name.

    Of a folder all files of known kinds are taken, those of folders in it, and of folders that are linked there, too.

    Raises:
        DataError: no file matches, a file is of an unknown kind, or a folder or link leads nowhere or cannot be read.
    """
    base, path = Path(os.path.expanduser(root)), os.path.expanduser(path)
    full = base / path
    try:
        if full.is_dir():
            return _files_below(full)
        # a literal name comes first: it may hold characters that a glob would interpret
        names = [full] if full.exists() else [base / name for name in glob.glob(path, root_dir=base, recursive=True)]
        files = sorted(name for name in names if not name.is_dir())
    except OSError as error:
        raise DataError(
            f"{error.filename or full}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    if not files:
        raise DataError(f"{full}: no file matches; check the path, `data.root` and the variable MOECT_DATA")
    for file in files:
        if not file.name.endswith(EXTENSIONS):
            raise DataError(f"{file}: unknown kind of file; the kinds that can be read are {', '.join(EXTENSIONS)}")
    _check_links(files)
    return files


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    files, seen = [], {os.path.realpath(folder)}
    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        places = {name: os.path.realpath(os.path.join(here, name)) for name in sorted(folders)}
        folders.clear()
        for name, place in places.items():
            if place not in seen:  # links may lead round, or twice to one place
                seen.add(place)
                folders.append(name)
        files += [Path(here) / name for name in names]
    known = sorted(file for file in files if file.name.endswith(EXTENSIONS))
    if not known:
        raise DataError(f"{folder}: the folder holds no file of a kind that can be read: {', '.join(EXTENSIONS)}")
    if len(known) < len(files):
        _warn_once(f"{folder}: {len(files) - len(known)} of {len(files)} files are of other kinds and are not read")
    _check_links(known)
    return known


def _check_links(files: list[Path]) -> None:
    for file in files:
        if not file.exists():
            raise DataError(f"{file}: is a link to a file that is not there; mend or remove it")


def file_blocks(files: list[Path], columns: list[str], wished: list[str], after: Place) -> Iterator[Block]:
    """The records of files, one file after another.

    Args:
        files: as `resolve_files` gives them.
        columns: of Parquet files, those that must be there.
        wished: of Parquet files, those that are read too where they are there.
        after: where to begin.

    Raises:
        DataError: a file that cannot be opened, decompressed or understood, or that lacks a column.
    """
    before = sum(size_of(file) for file in files[: after.file])
    for index in range(after.file, len(files)):
        place = after if index == after.file else Place(file=index)
        file = files[index]
        if file.name.endswith(".parquet"):
            yield from _parquet_blocks(file, columns, wished, place, before)
        else:
            yield from _line_blocks(file, place, before)
        before += size_of(file)


def size_of(file: Path) -> int:
    """Bytes of a file.

    Raises:
        DataError: it is not there any more, or cannot be asked.
    """
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def _line_blocks(file: Path, place: Place, before: int) -> Iterator[Block]:
    if not size_of(file):  # some decompressors take that for damage
        return
    plain = file.name.removesuffix(".gz").removesuffix(".zst")
    kind = "txt" if plain.endswith(".txt") else "jsonl"
    number, at = place.record, place.byte
    try:
        with file.open("rb") as raw, _decompressed(raw, file.name) as stream:
            stream.seek(at)
            lines, size, first = [], 0, number + 1
            for line in stream:
                lines.append(line)
                size += len(line)
                number += 1
                if size >= BLOCK_BYTES:
                    at += size
                    yield Block(str(file), kind, first, lines, Place(place.file, at, number), before + raw.tell())
                    lines, size, first = [], 0, number + 1
            if lines:
                yield Block(str(file), kind, first, lines, Place(place.file + 1), before + raw.tell())
    except _damage() as error:
        packing = file.suffix.removeprefix(".")
        raise DataError(f"{file}:{number + 1}: damaged {packing} data ({error}); fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.open(raw)
    if name.endswith(".zst"):
        return zstd().open(raw)
    return raw


def zstd():
    """The zstd module, of Python or from before it had one."""
    if sys.version_info >= (3, 14):
        from compression import zstd as module
    else:
        from backports import zstd as module
    return module


def _damage() -> tuple[type[Exception], ...]:
    """What the decompressors raise."""
    return (EOFError, zlib.error, gzip.BadGzipFile, zstd().ZstdError)


def _parquet_blocks(file: Path, columns: list[str], wished: list[str], place: Place, before: int) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    size = size_of(file)
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if missing := [name for name in columns if name not in names]:
                raise DataError(
                    f"{file}: has no column `{missing[0]}`, but {', '.join(f'`{n}`' for n in names[:8])}; name the "
                    "right one"
                )
            wanted = [*columns, *(name for name in wished if name in names and name not in columns)]
            for group in range(parquet.num_row_groups):
                in_group = parquet.metadata.row_group(group).num_rows
                if number + in_group <= place.record:
                    number += in_group
                    continue
                # group by group, so that blocks have the same ends wherever reading begins
                for batch in parquet.iter_batches(BLOCK_ROWS, row_groups=[group], columns=wanted):
                    done = max(place.record - number, 0)
                    number += min(done, len(batch))
                    for rows in in_blocks(_rows(batch.slice(done))):
                        first, number = number + 1, number + len(rows)
                        read = before + size * number // parquet.metadata.num_rows
                        yield Block(str(file), "rows", first, rows, Place(place.file, 0, number), read)
    except OSError as error:
        if error.strerror:
            raise DataError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
        reason = " ".join(str(error).split())  # Arrow's own, of what it could not make out
        raise DataError(f"{file}: damaged Parquet data after row {number} ({reason}); fetch it again") from error
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: damaged Parquet data after row {number} ({reason}); fetch it again") from error


def in_blocks(rows: list[dict]) -> Iterator[list[dict]]:
    """Rows in lists of about BLOCK_BYTES, however long their texts are. It makes no difference to begin at a cut."""
    block, size = [], 0
    for row in rows:
        block.append(row)
        size += row_bytes(row)
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def row_bytes(row: dict) -> int:
    """About how much text a row holds."""
    return sum(len(value) for value in row.values() if isinstance(value, (str, bytes)))


def _rows(batch) -> list[dict]:
    """Rows of an Arrow batch; text as bytes, so that what is not UTF-8 can be counted and stops nothing."""
    import pyarrow as pa

    text = (pa.types.is_string, pa.types.is_large_string)
    arrays = [c.cast(pa.large_binary()) if any(is_(c.type) for is_ in text) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names).to_pylist()


@cache
def _warn_once(text: str) -> None:
    log.warning(text)
