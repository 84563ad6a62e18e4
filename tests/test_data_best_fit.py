"""Best-fit packing: the plan of a few million fragments is that of one fragment after another."""

from bisect import bisect_left, insort
from collections import Counter

import numpy as np
import pytest

from moect.data.batches.best_fit import BestFitRows, plan_rows


class Lengths:
    """What packing wants to know of documents whose tokens nobody reads."""

    def __init__(self, lengths):
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.n_documents, self.n_tokens = len(lengths), int(self.offsets[-1])

    def locate(self, documents):
        return np.zeros_like(documents), documents

    def read(self, places):
        return places


def one_by_one(lengths: list[int], S: int) -> list[int]:
    """Best-fit decreasing as it is defined, a fragment at a time: the room that each row has left in the end."""
    rooms: list[int] = []  # ascending
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else S
        insort(rooms, room - length)
    return rooms


def rooms_of(patterns, S: int) -> list[int]:
    return sorted(S - sum(n * times for n, times in p.parts) for p in patterns for _ in range(p.rows))


@pytest.mark.parametrize("S", [2, 3, 7, 64, 500])
@pytest.mark.parametrize("fragments", [1, 2, 17, 300, 5000])
def test_rows_have_as_much_room_left_as_when_fragments_are_placed_one_by_one(S, fragments):
    rng = np.random.default_rng(S * fragments)
    for lengths in (rng.integers(1, S + 1, fragments), np.minimum(S, rng.lognormal(np.log(S) / 2, 1, fragments) + 1)):
        lengths = lengths.astype(int)
        patterns = plan_rows(np.bincount(lengths, minlength=S + 1))
        assert rooms_of(patterns, S) == one_by_one(lengths.tolist(), S)
        held = Counter()
        for pattern in patterns:
            for length, times in pattern.parts:
                held[length] += pattern.rows * times
        assert held == Counter(lengths.tolist())


@pytest.mark.parametrize("S", [2, 5, 16])
def test_a_document_longer_than_a_row_is_cut_into_whole_rows_and_a_rest_and_no_other_is_cut(S):
    lengths = [1, 2, S, S + 1, S + 2, 2 * S, 2 * S + 1, 3 * S + 1, 4 * S]
    corpus = BestFitRows(Lengths(lengths), S, seed=0)
    held = {}
    for k in range(corpus.rows_per_epoch):
        for _, document, first, last in corpus.row(k).fragments_F4.tolist():
            held.setdefault(document, []).append((first, last))
    expected = {d: [(at, min(at + S, n - 1)) for at in range(0, n - 1, S)] for d, n in enumerate(lengths) if n > 1}
    assert {d: sorted(parts) for d, parts in held.items()} == expected
    assert corpus.share_cut() == sum(n > S + 1 for n in lengths) / len(lengths)


def test_a_million_documents_are_planned_from_their_lengths_and_leave_hardly_any_room():
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(6, 1.2, 1_000_000).astype(int))
    S = 2048
    corpus = BestFitRows(Lengths(lengths), S, seed=0)
    pairs = int((lengths - 1).sum())
    assert corpus.tokens_per_epoch == pairs
    assert corpus.rows_per_epoch * S < 1.001 * pairs
    assert len(corpus._takes) <= 4 * S  # what is kept for each kind of row, whatever the number of documents


def test_every_epoch_puts_other_documents_together():
    corpus = BestFitRows(Lengths([5, 5, 5, 5, 6, 6, 6, 6, 4, 4, 4, 4]), 13, seed=3)
    partners = [
        {tuple(corpus.row(epoch * corpus.rows_per_epoch + k).fragments_F4[:, 1]) for k in range(corpus.rows_per_epoch)}
        for epoch in range(4)
    ]
    assert len({frozenset(p) for p in partners}) > 1
    assert all(sorted(d for row in p for d in row) == list(range(12)) for p in partners)
