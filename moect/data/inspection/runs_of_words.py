"""Texts as numbers that can be compared: hashes of words, and of runs of words, for many documents at once.

Legend: D documents, W words in all of them, R runs of words.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass

import numpy as np

from moect.data.reading.words import UNSPACED

BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial; odd, so that it has an inverse modulo 2^64
INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))


def normalised(text: str) -> str:
    """The text in Unicode's normal form NFC, with one space for every run of white space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def split_words(text: str) -> list[str]:
    """The words of a text in their order, in NFC and lower case, without punctuation; see `count_words` for what a word
    is: one letter with its marks in scripts that put no spaces between words."""
    text = unicodedata.normalize("NFC", text).lower()
    plain, unspaced, both = _patterns()
    return (plain if text.isascii() or not unspaced.search(text) else both).findall(text)


def is_unspaced(text: str) -> bool:
    """Whether most words of a text are letters of scripts that put no spaces between words."""
    return 2 * len(_patterns()[1].findall(text)) > len(split_words(text))


@functools.cache
def _patterns():
    """Of words where all scripts have spaces, of a letter of the others, of words in any text. The first is the fastest
    by far, and right for most texts."""
    import regex

    letter = "[{}&&\\p{{L}}]".format("".join(rf"\p{{{script}}}" for script in UNSPACED))
    return (
        regex.compile(r"[\p{L}\p{M}\p{N}]+"),
        regex.compile(rf"(?V1){letter}"),
        regex.compile(rf"(?V1){letter}[\p{{M}}]*|[[\p{{L}}\p{{M}}\p{{N}}]--{letter}]+"),
    )


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 onto itself that leaves no pattern (the finalizer of SplitMix64)."""
    values = values.astype(np.uint64, copy=True)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    return values ^ (values >> np.uint64(31))


@dataclass
class HashedWords:
    """The words of D documents, one after another.

    Attributes:
        hashes: (W,) uint64.
        offsets: (D + 1,) int64, where each document begins.
    """

    hashes: np.ndarray
    offsets: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """(D,) int64: words of each document."""
        return np.diff(self.offsets)

    @functools.cached_property
    def _powers(self) -> tuple[np.ndarray, np.ndarray]:
        """(W + 1,) each: BASE^i, and INVERSE^i."""
        factors = np.ones((2, len(self.hashes) + 1), dtype=np.uint64)
        factors[0, 1:], factors[1, 1:] = BASE, INVERSE
        return tuple(np.cumprod(factors, axis=1, dtype=np.uint64))

    @functools.cached_property
    def _sums(self) -> np.ndarray:
        """(W + 1,): the polynomial of all words before each one."""
        sums = np.zeros(len(self.hashes) + 1, dtype=np.uint64)
        np.cumsum(self.hashes * self._powers[0][:-1], dtype=np.uint64, out=sums[1:])
        return sums

    def runs(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Every run of `length` words inside a document: hash (R,) uint64, the same wherever the run stands, and number
        of the document (R,) int64; in the order of the text. Time does not depend on `length`."""
        counts = np.maximum(self.counts - length + 1, 0)
        documents = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = self.offsets[documents] + within
        return self._hash(starts, starts + length), documents

    def whole(self) -> np.ndarray:
        """(D,) uint64: the hash of each document as one run of all its words."""
        return self._hash(self.offsets[:-1], self.offsets[1:])

    def _hash(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return mix((self._sums[ends] - self._sums[starts]) * self._powers[1][starts])


def hash_words(texts: list[str]) -> HashedWords:
    """The hashed words of some documents; equal in every process and on every machine."""
    from rensa import RMinHash

    hashes = RMinHash.hash_token_sets([split_words(text) for text in texts])
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(words) for words in hashes], out=offsets[1:])
    flat = np.fromiter((value for words in hashes for value in words), dtype=np.uint64, count=offsets[-1])
    return HashedWords(mix(flat), offsets)
