"""Packing by best fit (Ding et al. 2024, arXiv 2404.10830): whole documents, put where they leave the least room.

A fragment is a run of S or fewer pairs of input and label, so a document of n tokens has n - 1 of them: what is longer
than S is cut into fragments of S and a rest, and nothing else is. Which lengths share a row is decided by the counts of
the lengths alone, once; every epoch fills these patterns with fragments in a new order and shuffles the rows.

S row length, F fragments of a row
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from moect.data.batches.corpus import Documents
from moect.data.batches.packing import NO_LABEL, PAD_TOKEN, Row


@dataclass(frozen=True)
class Pattern:
    """Rows that hold fragments of the same lengths.

    Attributes:
        rows: how many.
        parts: (length, how many of that length in each row), lengths descending.
    """

    rows: int
    parts: tuple[tuple[int, int], ...]


def plan_rows(counts: np.ndarray) -> list[Pattern]:
    """Best-fit decreasing for counts[n] fragments of length n, n from 0 to S; the 0th is ignored.

    Fragments are taken longest first, each into the row with the least room that suffices. A row that has just taken
    one is the first choice for the next of the same length, as long as it has room; so whole groups of equal rows are
    filled at once, and the work grows with S and not with the number of fragments.
    """
    S = len(counts) - 1
    groups: dict[
        int, list[tuple[int, tuple]]
    ] = {}  # by room left: numbers of rows, and what they hold as (before, part)
    rooms: list[int] = []  # the keys of `groups`, ascending

    def put(room: int, rows: int, held: tuple) -> None:
        if rows:
            if room not in groups:
                insort(rooms, room)
            groups.setdefault(room, []).append((rows, held))

    for length in range(S, 0, -1):
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):  # nowhere room for one: new rows
                room, rows, held = S, -(-left // (S // length)), ()
            else:
                room = rooms[at]
                rows, held = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[at]
            times = room // length
            full = min(rows, left // times)
            put(room - times * length, full, (held, (length, times)))
            left -= full * times
            if full < rows:
                if left:
                    put(room - left * length, 1, (held, (length, left)))
                put(room, rows - full - bool(left), held)
                left = 0
    return [Pattern(rows, _unwound(held)) for room in rooms for rows, held in groups[room]]


class BestFitRows:
    """Rows of a corpus, for as many epochs as anybody asks for, with the methods of `JoinedRows`.

    Padding is at the end of a row. Documents of one token hold no pair and are left out.

    Attributes:
        rows_per_epoch: the same in every epoch.
        tokens_per_epoch: inputs that are no padding, in an epoch; each has a label.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int):
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        S = sequence_length
        pairs = np.diff(documents.offsets) - 1
        pieces = -(-pairs // S)
        # fragments are numbered through all documents; this is each document's first
        self._first_fragment = np.concatenate([[0], np.cumsum(pieces)])
        self._lengths = np.full(self._first_fragment[-1], S, dtype=np.uint16 if S < 2**16 else np.uint32)
        some = pieces > 0
        self._lengths[self._first_fragment[1:][some] - 1] = (pairs - (pieces - 1) * S)[some]
        self._share_cut = float(np.mean(pieces > 1))
        counts = np.bincount(self._lengths, minlength=S + 1)
        patterns = plan_rows(counts)
        self._rows_before = np.cumsum([0, *(pattern.rows for pattern in patterns)])  # of each pattern
        self._filled = np.array([sum(n * times for n, times in pattern.parts) for pattern in patterns])
        # the k-th of a pattern's rows takes fragments first + k * times and following of the order by length
        self._takes = []
        used = np.cumsum(counts) - counts
        for pattern in patterns:
            takes = []
            for n, times in pattern.parts:
                takes.append((int(used[n]), times))
                used[n] += pattern.rows * times
            self._takes.append(takes)
        self.rows_per_epoch = int(self._rows_before[-1])
        self.tokens_per_epoch = int(pairs.sum())
        self._epoch = -1
        # of epoch self._epoch: fragments by length, equal ones in random order; rows in order; tokens before each row
        self._order = self._rows = self._tokens_before = None

    def __reduce__(self):  # another process makes the arrays itself
        return type(self), (self.documents, self.sequence_length, self.seed)

    def row(self, index: int) -> Row:
        """Row `index` counted over all epochs; a pure function of the corpus, S, seed and index."""
        S, offsets = self.sequence_length, self.documents.offsets
        epoch, k = divmod(index, self.rows_per_epoch)
        self._shuffle(epoch)
        which = int(np.searchsorted(self._rows_before, self._rows[k], side="right")) - 1
        nth = int(self._rows[k] - self._rows_before[which])
        slots = [np.arange(first + nth * n, first + (nth + 1) * n) for first, n in self._takes[which]]
        fragments = self._order[np.concatenate(slots)]
        lengths = self._lengths[fragments].astype(np.int64)
        documents = np.searchsorted(self._first_fragment, fragments, side="right") - 1
        firsts = (fragments - self._first_fragment[documents]) * S

        starts = np.cumsum(lengths) - lengths  # in the row
        n = int(lengths.sum())
        positions = np.arange(n) - np.repeat(starts, lengths)
        places = positions + np.repeat(offsets[documents] + firsts, lengths)
        row = Row(
            input_ids_S=np.full(S, PAD_TOKEN, dtype=np.int64),
            labels_S=np.full(S, NO_LABEL, dtype=np.int64),
            position_ids_S=np.arange(S, dtype=np.int64) - n,
            valid_S=np.arange(S) < n,
            fragments_F4=np.stack([*self.documents.locate(documents), firsts, firsts + lengths], axis=1),
        )
        row.input_ids_S[:n] = self.documents.read(places)
        row.labels_S[:n] = self.documents.read(places + 1)
        row.position_ids_S[:n] = positions
        return row

    def tokens_before(self, index: int) -> int:
        """Inputs that are no padding in the rows before `index`, counted over all epochs."""
        epoch, k = divmod(index, self.rows_per_epoch)
        if k == 0:  # known without the order of that epoch
            return epoch * self.tokens_per_epoch
        self._shuffle(epoch)
        return epoch * self.tokens_per_epoch + int(self._tokens_before[k])

    def share_cut(self) -> float:
        """The share of documents whose labels lie in more than one row; the same in every epoch."""
        return self._share_cut

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        # raw bits and stable sorts: numpy promises these never to change, and does not promise it of `permutation`
        bits = np.random.Philox(np.random.SeedSequence([self.seed % 2**128, epoch]))
        order = np.argsort(bits.random_raw(len(self._lengths)), kind="stable")
        self._order = order[np.argsort(self._lengths[order], kind="stable")]
        self._rows = np.argsort(bits.random_raw(self.rows_per_epoch), kind="stable")
        filled = np.repeat(self._filled, np.diff(self._rows_before))[self._rows]
        self._tokens_before = np.cumsum(filled) - filled
        self._epoch = epoch


def _unwound(held: tuple) -> tuple[tuple[int, int], ...]:
    parts = []
    while held:
        held, part = held
        parts.append(part)
    return tuple(reversed(parts))
