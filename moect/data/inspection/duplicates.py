"""Documents that are there twice: the same, or nearly.

Near means a Jaccard similarity of at least `NEAR` between the sets of shingles, the runs of five words. Pairs that may
be near are found by MinHash (Broder 1997, "On the resemblance and containment of documents") and banding (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3): documents whose signatures agree in all rows of a band.
That happens to a pair of similarity s with probability 1 - (1 - s^ROWS)^BANDS, 0.998 at 0.8; then the two sets of
shingles are compared.

Legend: D documents, S shingles of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moect.data.inspection.runs_of_words import BASE, HashedWords, mix

log = logging.getLogger("moect.data")

NEAR = 0.8
SHINGLE = 5  # words
BANDS, ROWS = 21, 6
SIGNATURE = 128  # a power of two, for which rensa is fastest; at least BANDS * ROWS
SMALL = 16  # documents of a group in which all pairs are compared
AT_ONCE = 1 << 22  # shingles of a group that are looked at together; some 100 bytes each
COMPARED = 64  # in groups that stay large, a document is compared with so many that are not near one another


def shingles_of(words: HashedWords) -> tuple[np.ndarray, np.ndarray]:
    """Each document's set of shingles: (S,) uint32, ascending within a document, and where each begins (D + 1,) int64.

    A document of fewer than five words is one shingle, one without a word has none. 32 bits are enough: in one of four
    thousand pairs of thousand-word documents two different shingles look alike, which adds 0.001 to the similarity.
    """
    hashes, documents = words.runs(SHINGLE)
    short = np.flatnonzero((words.counts > 0) & (words.counts < SHINGLE))
    hashes = np.concatenate([hashes, words.whole()[short]])
    documents = np.concatenate([documents, short]).astype(np.uint64)
    shingles = np.unique((documents << np.uint64(32)) | (hashes >> np.uint64(32)))
    starts = np.searchsorted(shingles, np.arange(len(words.counts) + 1, dtype=np.uint64) << np.uint64(32))
    return shingles.astype(np.uint32), starts.astype(np.int64)


def band_keys(shingles: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(D, BANDS) uint64: equal in a band where two signatures agree in its rows; of no meaning without a shingle.

    Args:
        shingles, offsets: as `shingles_of` returns them.
    """
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(mix(shingles), offsets.astype(np.uint64), SIGNATURE, 1)
    signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(offsets) - 1, SIGNATURE)
    rows = signatures[:, : BANDS * ROWS].reshape(-1, BANDS, ROWS)
    keys = np.zeros(rows.shape[:2], dtype=np.uint64)
    for row in range(ROWS):
        keys = mix(keys * BASE + rows[:, :, row])
    return keys


def first_alike(keys: np.ndarray) -> np.ndarray:
    """(D,) int64: for each document the first one with the same key, which may be itself."""
    order = np.argsort(keys, kind="stable")  # stable: the first of equal ones stays the first
    begins = _changes(keys[order])
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = np.repeat(order[begins], np.diff(np.append(begins, len(keys))))
    return first


@dataclass
class NearCopies:
    """Clusters of documents that are near one another, directly or through others.

    Attributes:
        cluster: (D,) int64, the first document of the cluster; the document itself where it is near no other.
        partner: (D,) int64, a document that it is near, -1 for none.
        similarity: (D,) float32, Jaccard of the two; 0 for none.
    """

    cluster: np.ndarray
    partner: np.ndarray
    similarity: np.ndarray


def near_copies(
    candidates: np.ndarray, band: Callable[[int], np.ndarray], shingles: np.ndarray, offsets: np.ndarray
) -> NearCopies:
    """Find the documents that are near another one.

    Memory: some 70 bytes a document, as long as `shingles` and the arrays that `band` gives lie on disk.

    Args:
        candidates: numbers of the documents to compare, ascending.
        band: from a band's number to its keys (D,), as `band_keys` makes them.
        shingles, offsets: of all documents, as `shingles_of` returns them.
    """
    documents = len(offsets) - 1
    found = NearCopies(np.arange(documents), np.full(documents, -1), np.zeros(documents, dtype=np.float32))
    candidates = candidates[offsets[candidates + 1] > offsets[candidates]]
    large = 0
    for number in range(BANDS):
        keys = np.asarray(band(number))[candidates]
        order = np.argsort(keys, kind="stable")
        begins = _changes(keys[order])
        ends = np.append(begins[1:], len(order))
        for begin, end in zip(*(x[ends - begins > 1].tolist() for x in (begins, ends)), strict=True):
            large += _join_group(candidates[order[begin:end]], found, shingles, offsets)
    if large:
        log.info("near duplicates: %d groups were too large to compare all pairs in them; some may be missed", large)
    for document in np.flatnonzero(found.partner >= 0).tolist():
        found.cluster[document] = _root(found.cluster, document)
    return found


def _join_group(group: np.ndarray, found: NearCopies, shingles: np.ndarray, offsets: np.ndarray) -> int:
    """Join the clusters of near documents in a group, ascending; returns in how many parts of it not all pairs that can
    be near were compared."""
    if len(group) <= SMALL:
        return _join(group.tolist(), found, shingles, offsets)
    piece = np.cumsum(offsets[group + 1] - offsets[group]) // AT_ONCE
    pieces = np.split(group, _changes(piece)[1:])
    parts = (part for piece in pieces for part in _parts(piece, shingles, offsets))
    return len(pieces) - 1 + sum(_join(part, found, shingles, offsets) for part in parts)


def _parts(group: np.ndarray, shingles: np.ndarray, offsets: np.ndarray) -> Iterator[list[int]]:
    """The parts of a group that near pairs are in, which are small as long as few documents share a rare shingle.

    Documents that have much in common, say a form that each fills in differently, fall into one group although they
    are not near. Of two that are, the one has s shingles and NEAR s of them at least are in the other; so when the
    shingles of both are in one order, and of each as many are taken from the beginning as it can lack, and one more,
    the two have one of these in common (Chaudhuri et al. 2006, "A primitive operator for similarity joins in data
    cleaning"). The order begins with what is rarest in the group.
    """
    sizes = offsets[group + 1] - offsets[group]
    owners = np.repeat(np.arange(len(group)), sizes)
    begins = np.cumsum(sizes) - sizes
    within = np.arange(len(owners)) - begins[owners]
    _, names, counts = np.unique(shingles[offsets[group][owners] + within], return_inverse=True, return_counts=True)
    order = np.lexsort((names, counts[names], owners))  # of each document, its shingles from the rarest on
    lacking = sizes - np.ceil(NEAR * sizes - 1e-9).astype(np.int64)
    taken = order[within <= lacking[owners]]
    taken = taken[counts[names[taken]] > 1]
    taken = taken[np.lexsort((owners[taken], names[taken]))]
    for part in np.split(owners[taken], _changes(names[taken])[1:]):
        if len(part) > 1:
            yield group[part].tolist()


def _join(group: list[int], found: NearCopies, shingles: np.ndarray, offsets: np.ndarray) -> bool:
    """Join the clusters of near documents in a group, ascending; returns whether it was too large for all pairs."""
    compared: list[int] = []
    for document in group:
        alone = True
        for other in compared:
            roots = _root(found.cluster, other), _root(found.cluster, document)
            if roots[0] == roots[1]:
                alone = False
                continue
            similarity = _jaccard(*(shingles[offsets[d] : offsets[d + 1]] for d in (other, document)))
            if similarity < NEAR:
                continue
            alone = False
            found.cluster[max(roots)] = min(roots)  # so that the root is the first of the cluster
            for one, its in ((document, other), (other, document)):
                if found.partner[one] < 0:
                    found.partner[one], found.similarity[one] = its, similarity
        if len(group) <= COMPARED or (alone and len(compared) < COMPARED):
            compared.append(document)
    return len(group) > COMPARED


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) > len(b):
        a, b = b, a
    if len(a) < NEAR * len(b):
        return 0.0  # the similarity cannot be greater than the ratio of the sizes
    common = np.count_nonzero(b.take(b.searchsorted(a), mode="clip") == a)
    return common / (len(a) + len(b) - common)


def _root(parents: np.ndarray, document: int) -> int:
    while (parent := int(parents[document])) != document:
        parents[document] = document = int(parents[parent])
    return document


def _changes(sorted_keys: np.ndarray) -> np.ndarray:
    """Where in a sorted array a new value begins."""
    return np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[: len(sorted_keys)])
