"""How well a written answer matches a reference: exact match and F1 of SQuAD (arXiv 1606.05250, section 4.3)."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def overlap_of(doc: dict, results: list[str]) -> dict[str, float]:
    """The metrics of a question, as lm-eval asks a task's `process_results` for them.

    Args:
        doc: the question; `answers` are its references, of which the best counts.
        results: the answer that was written.
    """
    written = _words(results[0])
    references = [_words(answer) for answer in doc["answers"]]
    return {
        "f1": max(_f1(written, reference) for reference in references),
        "exact_match": float(written in references),
    }


def _words(text: str) -> list[str]:
    """Lower case, without ASCII punctuation and English articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _f1(written: list[str], reference: list[str]) -> float:
    common = (Counter(written) & Counter(reference)).total()
    if not written or not reference:
        return float(written == reference)
    return 2 * common / (len(written) + len(reference))
