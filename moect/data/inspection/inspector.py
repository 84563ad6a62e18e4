"""What is noted of every document that is inspected, in one process or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from moect.data.inspection.contamination import EvaluationIndex, Matches
from moect.data.inspection.duplicates import band_keys, shingles_of
from moect.data.inspection.language_id import identify
from moect.data.inspection.runs_of_words import hash_words, mix, normalised
from moect.processes import map_in_order

KILLED = (
    "a process of the inspection ended by itself, perhaps for want of memory; inspect with fewer workers, or a sample"
)


@dataclass
class Batch:
    """Documents of one source on their way to a process.

    Attributes:
        source: number of the source.
        judge: whether to say in which languages they are.
        ids, texts: of the documents.
        n_bytes: of the texts, in UTF-8.
    """

    source: int
    judge: bool
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    n_bytes: int = 0

    def add(self, name: str, text: str) -> None:
        """Take one more."""
        self.ids.append(name)
        self.texts.append(text)
        self.n_bytes += len(text.encode())


@dataclass
class Noted:
    """What is noted of the documents of a batch that are in the sample, D of them.

    Attributes:
        taken: (D,) int64, their numbers in the batch.
        columns: arrays by name: `key` (D,) uint64, of the normalised text, two documents of a hundred million share one
            by chance with probability 0.0003; `bytes` (D,) int64; `size` (D,) int64, the number of shingles;
            `shingles`, uint32, of all; `band-0`, `band-1`, ... (D,) uint64.
        matches: what they share with evaluation documents.
        languages: (label, probability) of each; empty where that was not asked for.
    """

    taken: np.ndarray
    columns: dict[str, np.ndarray]
    matches: Matches
    languages: list[tuple[str, float]]


class Inspector:
    """Notes of a batch what is to be known of it.

    Args:
        index: of the evaluation documents.
        sample: the share of documents to take. One word run of a document decides, so that copies are taken or left
            together, and near copies most often.
    """

    def __init__(self, index: EvaluationIndex, sample: float):
        self.index, self.sample = index, sample

    def __call__(self, batch: Batch) -> Noted:
        """See `Noted`."""
        texts, taken = batch.texts, np.arange(len(batch.texts))
        words = hash_words(texts)
        shingles, offsets = shingles_of(words)
        if self.sample < 1:
            least = np.append(shingles, np.uint32(0))[offsets[:-1]].astype(np.uint64)  # a document's first is its least
            deciding = np.where(np.diff(offsets) > 0, least, _keys(texts))
            taken = np.flatnonzero(mix(deciding) < np.uint64(self.sample * 2**64))
            texts = [texts[number] for number in taken]
            words = hash_words(texts)
            shingles, offsets = shingles_of(words)
        columns = {
            "key": _keys(texts),
            "bytes": np.array([len(text.encode()) for text in texts], dtype=np.int64),
            "size": np.diff(offsets),
            "shingles": shingles,
        }
        columns |= {f"band-{number}": keys for number, keys in enumerate(band_keys(shingles, offsets).T)}
        languages = [identify(text) for text in texts] if batch.judge else []
        return Noted(taken, columns, self.index.search(words), languages)


def inspect_batches(inspector: Inspector, batches: Iterable[Batch], workers: int) -> Iterator[tuple[Batch, Noted]]:
    """Each batch and what is noted of it, in their order.

    Args:
        inspector: does the work; every process gets a copy.
        batches: read as far ahead as keeps the processes busy.
        workers: number of processes; with one, the work is done in this one.

    Raises:
        DataError: a process ended by itself.
    """
    if workers == 1:
        for batch in batches:
            yield batch, inspector(batch)
        return
    yield from map_in_order(inspector, batches, workers, KILLED)


def _keys(texts: list[str]) -> np.ndarray:
    import xxhash

    return np.array([xxhash.xxh3_64_intdigest(normalised(text).encode()) for text in texts], dtype=np.uint64)
