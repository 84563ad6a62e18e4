"""A corpus: what is mixed as one, and read through before any of it comes again.

All sources of a language are one corpus, so that an epoch of the corpus is an epoch of the language; but a source with
a `weight` is a corpus of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moect.data.tokens.store import TokenStore
from moect.data_config import DataConfig, SourceConfig, source_key


@dataclass(frozen=True)
class Corpus:
    """Sources that are mixed as one.

    Attributes:
        key: its name in tables and checkpoints: that of its source, or language and number of sources.
        lang, role: of all its documents.
        weight: as given in the configuration; None: by its number of tokens.
        sources: places of its sources in `data.train`.
    """

    key: str
    lang: str
    role: str
    weight: float | None
    sources: tuple[int, ...]


def corpora_of(data: DataConfig) -> list[Corpus]:
    """The corpora of a configuration, in the order of their first sources."""
    groups: dict[object, list[int]] = {}
    for i, source in enumerate(data.train):
        groups.setdefault(source.lang if source.weight is None else i, []).append(i)
    keys = source_keys(data.train)
    corpora = []
    for members in groups.values():
        first = data.train[members[0]]
        key = keys[members[0]] if len(members) == 1 else f"{first.lang} ({len(members)} sources)"
        corpora.append(Corpus(key, first.lang, data.languages[first.lang], first.weight, tuple(members)))
    return corpora


def source_keys(sources: list[SourceConfig]) -> list[str]:
    """A name for each source that does not depend on `data.root`; the second of the same name gets `#2`."""
    seen = Counter()
    keys = []
    for key in map(source_key, sources):
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return keys


class Documents:
    """The documents of several stores, numbered through.

    A process that gets this from another opens the stores anew: what travels is the names of their folders.

    Attributes:
        stores: in the order of their documents.
        offsets: (n_documents + 1,) int64: document d is tokens offsets[d] to offsets[d + 1] of all that `read` gives.
        n_documents, n_tokens: over all stores.
    """

    def __init__(self, stores: list[TokenStore]):
        self.stores = list(stores)
        self._first_token = np.cumsum([0, *(store.n_tokens for store in stores)])
        self._first_document = np.cumsum([0, *(store.n_documents for store in stores)])
        self.n_documents, self.n_tokens = int(self._first_document[-1]), int(self._first_token[-1])
        if len(stores) == 1:
            self.offsets = stores[0].offsets
        else:
            starts = [s.offsets[:-1] + first for s, first in zip(stores, self._first_token[:-1], strict=True)]
            self.offsets = np.concatenate([*starts, [self.n_tokens]])

    def read(self, places: np.ndarray) -> np.ndarray:
        """The tokens, int64, at places (int64) that count through all stores."""
        if len(self.stores) == 1:
            return self.stores[0].tokens[places].astype(np.int64)
        tokens = np.empty(len(places), dtype=np.int64)
        which = np.searchsorted(self._first_token, places, side="right") - 1
        for i in np.unique(which):
            here = which == i
            tokens[here] = self.stores[i].tokens[places[here] - self._first_token[i]]
        return tokens

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of some documents (int64), the number of its store and its own number in that store."""
        which = np.searchsorted(self._first_document, documents, side="right") - 1
        return which, documents - self._first_document[which]

    def __reduce__(self):
        return _open, ([store.folder for store in self.stores],)


def _open(folders: list[Path]) -> Documents:
    return Documents([TokenStore(folder) for folder in folders])
