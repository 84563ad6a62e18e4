"""Read the documents of a source: of files or of a dataset, in their order, the unusable ones counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from moect.data.reading.files import Block, Place, file_blocks, resolve_files
from moect.data.reading.hub import dataset_blocks
from moect.data.reading.records import Document, RecordReader, Tally
from moect.data_config import EvaluationConfig, SourceConfig, source_key
from moect.errors import DataError

log = logging.getLogger("moect.data")

HOPELESS = 1000  # bad documents at which reading stops early, if they are too great a share by then


def read_documents(
    source: SourceConfig | EvaluationConfig, root: str, max_bad_fraction: float, cache_folder: Path | None = None
) -> Iterator[Document]:
    """The usable documents of a source in the order of its files or rows, at most `source.limit` of them.

    Blank lines of a file hold no document. A document is bad when its line is not UTF-8 or not a JSON object, or when
    its text, or the answer that `source.answer_field` asks for, is missing, not a string, blank or not encodable. Bad
    documents are skipped; one log line gives their number.

    Args:
        source: what to read, and how many documents of it.
        root: folder that relative paths start from.
        max_bad_fraction: the share of bad documents that is put up with.
        cache_folder: where the commits of hub datasets are kept; None: nowhere.

    Raises:
        DataError: a file that cannot be found, opened or decompressed; a dataset that cannot be had (see
            `dataset_blocks`); more than `max_bad_fraction` bad documents, or no usable one. The last two are known, and
            raised, when the iterator is exhausted, or after a thousand bad documents.
    """
    reader = RecordReader(source, root)
    tally = Tally()
    for block in read_blocks(source, root, reader, cache_folder):
        yield from reader.documents(block, tally, None if source.limit is None else source.limit - tally.good)
        check_bad(source, tally, max_bad_fraction)
        if tally.good == source.limit:
            break
    check_bad(source, tally, max_bad_fraction, at_end=True)
    tell_bad(source, tally)


def read_blocks(
    source: SourceConfig | EvaluationConfig,
    root: str,
    reader: RecordReader,
    cache_folder: Path | None,
    after: Place | None = None,
) -> Iterator[Block]:
    """The records of a source, from a place on; arguments and errors as for `read_documents`."""
    after = after or Place()
    if source.path:
        return file_blocks(resolve_files(source.path, root), reader.columns, reader.wished, after)
    return dataset_blocks(source, root, cache_folder, reader.columns, reader.wished, after)


def check_bad(
    source: SourceConfig | EvaluationConfig, tally: Tally, max_bad_fraction: float, at_end: bool = False
) -> None:
    """Stop when too many documents are bad, and, at the end, when none is good.

    Raises:
        DataError: with the place of the first bad document.
    """
    if tally.bad > max_bad_fraction * tally.seen and (at_end or tally.bad >= HOPELESS):
        raise DataError(
            f"{tally.examples[0]}; {tally.bad} of {tally.seen} documents are unusable, more than the share of "
            f"{max_bad_fraction:g} that `data.max_bad_fraction` allows: mend the text, name the right field, or raise "
            "that key"
        )
    if at_end and not tally.good:
        if tally.filtered:
            raise DataError(
                f"{source_key(source)}: the corpus is empty: `filter` left out {tally.filtered} of {tally.seen}; check "
                "the fields that it names, and that numbers are compared with numbers"
            )
        raise DataError(f"{source_key(source)}: the corpus is empty, it holds no usable document; give one with text")


def tell_bad(source: SourceConfig | EvaluationConfig, tally: Tally) -> None:
    """Log how many documents were left out, and why."""
    key = source_key(source)
    if tally.bad:
        kinds = ", ".join(f"{count} {kind}" for kind, count in tally.faults.most_common())
        first = tally.examples[0]
        log.warning("%s: skipped %d of %d documents as unusable: %s; %s", key, tally.bad, tally.seen, kinds, first)
    if tally.filtered:
        log.info("%s: left out %d of %d documents by `filter`", key, tally.filtered, tally.seen)
