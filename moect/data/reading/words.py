"""Counting words in any script, for rates that compare tokenizers and texts."""

from __future__ import annotations

import functools

# scripts written without spaces between words: there each letter counts
UNSPACED = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")


def count_words(text: str) -> int:
    """The number of words in a text.

    A word is a longest run of letters, marks and digits; in scripts that put no spaces between words (Chinese
    characters, kana, Thai, Lao, Khmer, Burmese) it is one letter with its marks. So the number compares texts of one
    language, not of several: a letter is less than a word.
    """
    return sum(1 for _ in _pattern().finditer(text))


@functools.cache
def _pattern():
    import regex

    unspaced = "".join(rf"\p{{{script}}}" for script in UNSPACED)
    letter = rf"[{unspaced}&&\p{{L}}]"
    return regex.compile(rf"(?V1){letter}[\p{{M}}]*|[[\p{{L}}\p{{M}}\p{{N}}]--{letter}]+")
