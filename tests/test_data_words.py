"""Counting words: what a rate per word is divided by."""

import pytest

from moect.data.reading.words import count_words


@pytest.mark.parametrize(
    "text, words",
    [
        ("", 0),
        (" \n—…!", 0),
        ("naïve words, and 2026", 4),
        ("It's", 2),
        ("e\u0301tat", 1),  # a letter and its mark
        ("தமிழ் மொழி", 2),
        ("中文字", 3),
        ("アイ漢字ab", 5),
        ("12中3", 3),
        ("ไทย ลาว", 6),
        ("ปี่", 1),  # a letter with two marks
    ],
)
def test_words_are_runs_of_letters_or_single_letters_of_scripts_without_spaces(text, words):
    assert count_words(text) == words
