"""Evaluation text that occurs in training text.

As is customary (Brown et al. 2020, arXiv 2005.14165, appendix C): a held-out document is contaminated when a run of 13
of its words, or 50 letters in scripts without spaces between words, occurs in a training document. A shorter one counts
as a whole; one that is too short for that to mean anything, when a training document consists of it and nothing else.
The evaluation side, which is small, is held in memory, some 50 bytes a word; the training side streams past it.

Legend: E evaluation documents, N entries (a run of words and a document that holds it), K different runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moect.data.inspection.runs_of_words import HashedWords, hash_words, is_unspaced

WORDS, LETTERS = 13, 50  # of a run
FEWEST_WORDS, FEWEST_LETTERS = 5, 15  # of a shorter text that is looked for inside others


@dataclass
class Matches:
    """What some training documents share with evaluation documents: one entry for every such pair.

    Attributes:
        document: (M,) int64, number of the training document.
        evaluation: (M,) int64, number of the evaluation document.
        share: (M,) float64, of the runs of the evaluation document.
        runs: (K',) int64, numbers of the runs that occur.
    """

    document: np.ndarray
    evaluation: np.ndarray
    share: np.ndarray
    runs: np.ndarray


class EvaluationIndex:
    """The runs of words of evaluation documents.

    Args:
        texts: E evaluation documents.

    Attributes:
        entries: (E,) int64, number of different runs of each document; 0 where it holds no word.
        lengths: the lengths of runs to look for inside training documents, in words.
    """

    def __init__(self, texts: list[str]):
        words = hash_words(texts)
        length, entire = self._lengths(texts, words.counts)
        hashes, documents = [words.whole()[entire]], [np.flatnonzero(entire)]
        self.lengths = np.unique(length[~entire & (length > 0)]).tolist()
        for run in self.lengths:
            found, owners = words.runs(run)
            wanted = (length[owners] == run) & ~entire[owners]
            hashes.append(found[wanted])
            documents.append(owners[wanted])
        hashes, documents = np.concatenate(hashes), np.concatenate(documents)
        order = np.lexsort((documents, hashes))
        hashes, documents = hashes[order], documents[order]
        new = np.ones(len(hashes), dtype=bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (documents[1:] != documents[:-1])
        hashes, self._documents = hashes[new], documents[new]  # (N,) each
        self._keys, starts = np.unique(hashes, return_index=True)  # (K,)
        self._starts = np.append(starts, len(hashes))
        self._entire = np.isin(self._keys, words.whole()[entire])
        bits = max(16, 4 + len(self._keys).bit_length())
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(
            1 << bits, dtype=bool
        )  # most runs of a training text are known to be absent by this alone
        self._seen[self._slot(self._keys)] = True
        self.entries = np.bincount(self._documents, minlength=len(texts))

    @property
    def n_runs(self) -> int:
        """K."""
        return len(self._keys)

    def coverage(self, found: np.ndarray) -> np.ndarray:
        """(E,) float64: of each document's runs, the share that is among those found.

        Args:
            found: (K,) bool.
        """
        hits = np.repeat(found, np.diff(self._starts))
        return np.bincount(self._documents[hits], minlength=len(self.entries)) / np.maximum(self.entries, 1)

    def search(self, words: HashedWords) -> Matches:
        """What training documents share with the evaluation documents."""
        pairs = [self._find(words.whole(), np.arange(len(words.counts)), entire=True)]
        pairs += [self._find(*words.runs(length), entire=False) for length in self.lengths]
        runs, documents = (np.concatenate(part) for part in zip(*pairs, strict=True))
        both = np.unique(np.stack([documents, runs], axis=1), axis=0)
        documents, runs = both[:, 0], both[:, 1]
        counts = self._starts[runs + 1] - self._starts[runs]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = self._documents[np.repeat(self._starts[runs], counts) + within]
        held, number = np.unique(np.stack([np.repeat(documents, counts), owners], axis=1), axis=0, return_counts=True)
        return Matches(held[:, 0], held[:, 1], number / self.entries[held[:, 1]], np.unique(runs))

    def _find(self, hashes: np.ndarray, documents: np.ndarray, entire: bool) -> tuple[np.ndarray, np.ndarray]:
        likely = np.flatnonzero(self._seen[self._slot(hashes)])
        hashes, documents = hashes[likely], documents[likely]
        if not len(hashes):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._keys, hashes), len(self._keys) - 1)
        right = (self._keys[places] == hashes) & (self._entire[places] == entire)
        return places[right], documents[right]

    @staticmethod
    def _lengths(texts: list[str], counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E,) int64: words of a run to look for, 0 where there is no word; (E,) bool: only as an entire document."""
        unspaced = np.array([is_unspaced(text) for text in texts], dtype=bool)
        length = np.minimum(counts, np.where(unspaced, LETTERS, WORDS))
        return length, (counts > 0) & (counts < np.where(unspaced, FEWEST_LETTERS, FEWEST_WORDS))

    def _slot(self, hashes: np.ndarray) -> np.ndarray:
        return hashes >> self._shift
