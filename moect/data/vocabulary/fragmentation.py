"""How finely a tokenizer cuts text, before and after it was extended."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from moect.data.reading.words import count_words
from moect.tables import aligned

DOCUMENTS_AT_ONCE = 256
COLUMNS = ["language", "documents", "bytes/token", "after", "tokens/word", "after", "documents changed"]


def fragmentation(before, after, texts: dict[str, Iterable[str]]) -> dict[str, dict]:
    """Cut text with two tokenizers and count.

    Args:
        before: a tokenizer of transformers.
        after: another, the first one extended.
        texts: by language.

    Returns:
        By language: `documents`, `bytes` (UTF-8) and `words` (as `count_words` counts them) of its text;
        `tokens`, `bytes_per_token` and `tokens_per_word` (None without words), each [before, after];
        `documents_changed`, the share of documents whose ids differ.
    """
    return {language: _count(before, after, iter(own)) for language, own in texts.items()}


def _count(before, after, texts) -> dict:
    documents = n_bytes = words = changed = 0
    tokens = [0, 0]
    while batch := list(itertools.islice(texts, DOCUMENTS_AT_ONCE)):
        ids = [t(batch, add_special_tokens=False, verbose=False)["input_ids"] for t in (before, after)]
        documents += len(batch)
        n_bytes += sum(len(text.encode("utf-8")) for text in batch)
        words += sum(map(count_words, batch))
        tokens = [total + sum(map(len, own)) for total, own in zip(tokens, ids, strict=True)]
        changed += sum(a != b for a, b in zip(*ids, strict=True))
    return {
        "documents": documents,
        "bytes": n_bytes,
        "words": words,
        "tokens": tokens,
        "bytes_per_token": [n_bytes / max(1, n) for n in tokens],
        "tokens_per_word": [n / words for n in tokens] if words else None,
        "documents_changed": changed / max(1, documents),
    }


def fragmentation_table(counts: dict[str, dict]) -> str:
    """The result of `fragmentation` as an aligned table, a line a language."""
    rows = []
    for language, own in counts.items():
        per_word = [f"{n:.2f}" for n in own["tokens_per_word"]] if own["tokens_per_word"] else ["", ""]
        per_token = [f"{n:.2f}" for n in own["bytes_per_token"]]
        rows.append([language, f"{own['documents']:,}", *per_token, *per_word, f"{own['documents_changed']:.1%}"])
    return aligned(COLUMNS, rows)
