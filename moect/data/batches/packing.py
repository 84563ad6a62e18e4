"""Packing by joining: the documents of a corpus, shuffled each epoch, as one stream that is cut into rows.

S row length, N tokens of an epoch, F fragments of a row
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moect.data.batches.corpus import Documents

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
        valid_S: bool, False for padding, which comes last.
        fragments_F4: int64, what the row holds, in its order: number of the store, of the document in it, and the first
            and the last of the document's tokens. All but the first of these are labels, all but the last inputs (the
            last too, where the document ends in a row of joined documents).
    """

    input_ids_S: np.ndarray
    labels_S: np.ndarray
    position_ids_S: np.ndarray
    valid_S: np.ndarray
    fragments_F4: np.ndarray


class JoinedRows:
    """Rows of a corpus, for as many epochs as anybody asks for.

    An epoch joins all documents in an order of its own to a stream of N tokens. Its row k sees stream[kS : kS + S + 1]:
    S inputs, and their labels one token further. Rows overlap by that one token, so every token except the first of
    each document is a label exactly once an epoch. A document that is cut goes on in the next row without its past.

    Attributes:
        rows_per_epoch: the same in every epoch.
        tokens_per_epoch: inputs that are no padding, in an epoch.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int):
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        self.rows_per_epoch = max(1, -(-(documents.n_tokens - 1) // sequence_length))
        self.tokens_per_epoch = min(self.rows_per_epoch * sequence_length, documents.n_tokens)
        self._epoch = -1
        self._order = self._ends = None  # of epoch self._epoch: documents in order, and where each ends in the stream

    def __reduce__(self):  # another process makes the arrays of an epoch itself
        return type(self), (self.documents, self.sequence_length, self.seed)

    def row(self, index: int) -> Row:
        """Row `index` counted over all epochs; a pure function of the corpus, S, seed and index."""
        S, offsets = self.sequence_length, self.documents.offsets
        epoch, k = divmod(index, self.rows_per_epoch)
        self._shuffle(epoch)
        at = np.arange(k * S, min(k * S + S + 1, self.documents.n_tokens))  # places in the stream
        slots = np.searchsorted(self._ends, at, side="right")
        documents = self._order[slots]
        from_end = self._ends[slots] - at
        places = offsets[documents + 1] - from_end
        tokens = self.documents.read(places)
        since_start = np.minimum(places - offsets[documents], at - k * S)  # of the document or the row
        same = slots[1:] == slots[:-1]

        n = min(S, len(at))
        row = Row(
            input_ids_S=np.full(S, PAD_TOKEN, dtype=np.int64),
            labels_S=np.full(S, NO_LABEL, dtype=np.int64),
            position_ids_S=np.arange(S, dtype=np.int64) - n,
            valid_S=np.arange(S) < n,
            fragments_F4=self._fragments(slots[0], slots[n - 1], at[0], at[-1]),
        )
        row.input_ids_S[:n] = tokens[:n]
        row.labels_S[: len(same)] = np.where(same, tokens[1:], NO_LABEL)
        row.position_ids_S[:n] = since_start[:n]
        return row

    def tokens_before(self, index: int) -> int:
        """Inputs that are no padding in the rows before `index`, counted over all epochs."""
        epochs, k = divmod(index, self.rows_per_epoch)
        return epochs * self.tokens_per_epoch + min(k * self.sequence_length, self.documents.n_tokens)

    def share_cut(self) -> float:
        """The share of documents whose labels lie in more than one row, in the first epoch."""
        self._shuffle(0)
        S, lengths = self.sequence_length, np.diff(self.documents.offsets)[self._order]
        starts = self._ends - lengths
        return float(np.mean(starts // S < (self._ends - 2) // S))  # its last input with a label is the last but one

    def _fragments(self, first: int, last: int, start: int, stop: int) -> np.ndarray:
        """What slots `first` to `last` of the epoch's order hold between two places of the stream, the second too."""
        slots = np.arange(first, last + 1)
        documents = self._order[slots]
        starts = self._ends[slots] - np.diff(self.documents.offsets)[documents]
        tokens = np.maximum(starts, start) - starts, np.minimum(self._ends[slots] - 1, stop) - starts
        return np.stack([*self.documents.locate(documents), *tokens], axis=1)

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        # raw bits and a stable sort: numpy promises these never to change, and does not promise it of `permutation`
        bits = np.random.Philox(np.random.SeedSequence([self.seed % 2**128, epoch]))
        self._order = np.argsort(bits.random_raw(self.documents.n_documents), kind="stable")
        self._ends = np.cumsum(np.diff(self.documents.offsets)[self._order])
        self._epoch = epoch
