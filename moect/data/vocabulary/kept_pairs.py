"""Which neighbours must not be joined, so that text of the old languages stays cut as it is.

A merge of two old tokens changes every text in which they stand side by side; one that involves a new token changes
only text in which that token is. So where no merge joins a pair of old tokens that old text has, old text has no new
token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

SHARE = 1e-7  # of the old text's tokens: a pair that is rarer may be joined
AT_ONCE = 2**22  # pairs that are noted before they are counted


class KeptPairs:
    """Pairs of tokens that stand side by side in some text.

    Args:
        n_ids: ids are below this.
    """

    def __init__(self, n_ids: int):
        self.n_ids = n_ids
        self.n_tokens = 0
        self._codes, self._counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._noted: list[np.ndarray] = []
        self._pending = 0

    def add(self, encodings: Iterable) -> None:
        """Count the neighbours inside the words of tokenized texts."""
        for encoding in encodings:
            ids, words = np.array(encoding.ids, dtype=np.int64), np.array(encoding.word_ids, dtype=object)
            self.n_tokens += len(ids)
            codes = self._code(ids)[words[1:] == words[:-1]]
            self._noted.append(codes)
            self._pending += len(codes)
            if self._pending >= AT_ONCE:
                self._count()

    def finish(self) -> None:
        """Forget the pairs that are too rare; call it once, after the last text."""
        self._count()
        self._codes = self._codes[self._counts > SHARE * self.n_tokens]

    def between(self, ids: np.ndarray) -> np.ndarray:
        """(n - 1,) bool: for each two neighbours of n tokens (int64), whether they are such a pair."""
        if not len(self._codes):
            return np.zeros(max(len(ids) - 1, 0), dtype=bool)
        codes = self._code(ids)
        at = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return self._codes[at] == codes

    def _code(self, ids: np.ndarray) -> np.ndarray:
        return ids[:-1] * self.n_ids + ids[1:]

    def _count(self) -> None:
        found, counts = np.unique(np.concatenate([*self._noted, self._codes[:0]]), return_counts=True)
        self._codes, where = np.unique(np.concatenate([self._codes, found]), return_inverse=True)
        self._counts = np.bincount(where, np.concatenate([self._counts, counts])).astype(np.int64)
        self._noted, self._pending = [], 0
