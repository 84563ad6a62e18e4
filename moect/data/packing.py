"""Packing: the documents of a corpus, shuffled each epoch, joined to one stream and cut into rows.

S row length, N tokens of an epoch
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moect.data.store import TokenStore

NO_LABEL = -100  # what PyTorch's cross-entropy ignores
PAD_TOKEN = 0  # any id will do: nothing attends to it and it has no label


@dataclass
class Row:
    """One packed row.

    Attributes:
        input_ids_S: int64 token ids.
        labels_S: int64, the next token of the same document, else -100. Already shifted: labels_S[i] belongs to
            input_ids_S[i].
        position_ids_S: int64, from 0 in each document's fragment; this is what keeps the documents apart in attention.
        valid_S: bool, False for padding, which only the last row of an epoch has.
    """

    input_ids_S: np.ndarray
    labels_S: np.ndarray
    position_ids_S: np.ndarray
    valid_S: np.ndarray


class PackedCorpus:
    """Rows of a token store, for as many epochs as anybody asks for.

    An epoch joins all documents in an order of its own to a stream of N tokens. Its row k sees stream[kS : kS + S + 1]:
    S inputs, and their labels one token further. Rows overlap by that one token, so every token except the first of
    each document is a label exactly once an epoch. A document that is cut goes on in the next row without its past.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: int):
        self.store, self.sequence_length, self.seed = store, sequence_length, seed
        self.rows_per_epoch = max(1, -(-(store.n_tokens - 1) // sequence_length))
        self._epoch = -1
        self._order = self._ends = None  # of epoch self._epoch: documents in order, and where each ends in the stream

    def row(self, index: int) -> Row:
        """Row `index` counted over all epochs; a pure function of the store, S, seed and index."""
        S = self.sequence_length
        epoch, k = divmod(index, self.rows_per_epoch)
        self._shuffle(epoch)
        at = np.arange(k * S, min(k * S + S + 1, self.store.n_tokens))  # places in the stream
        slots = np.searchsorted(self._ends, at, side="right")
        documents = self._order[slots]
        from_end = self._ends[slots] - at
        places = self.store.offsets[documents + 1] - from_end
        tokens = self.store.tokens[places].astype(np.int64)
        since_start = np.minimum(places - self.store.offsets[documents], at - k * S)  # of the document or the row
        same = slots[1:] == slots[:-1]

        n = min(S, len(at))
        row = Row(
            input_ids_S=np.full(S, PAD_TOKEN, dtype=np.int64),
            labels_S=np.full(S, NO_LABEL, dtype=np.int64),
            position_ids_S=np.arange(S, dtype=np.int64) - n,
            valid_S=np.arange(S) < n,
        )
        row.input_ids_S[:n] = tokens[:n]
        row.labels_S[: len(same)] = np.where(same, tokens[1:], NO_LABEL)
        row.position_ids_S[:n] = since_start[:n]
        return row

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        # raw bits and a stable sort: numpy promises these never to change, and does not promise it of `permutation`
        bits = np.random.Philox(np.random.SeedSequence([self.seed % 2**128, epoch]))
        self._order = np.argsort(bits.random_raw(self.store.n_documents), kind="stable")
        self._ends = np.cumsum(np.diff(self.store.offsets)[self._order])
        self._epoch = epoch
