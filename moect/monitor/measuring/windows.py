"""Held-out documents as tokens, and the windows in which each token is predicted exactly once.

A document is [BOS] + tokens, where the tokenizer has BOS; a prompt with an answer ends in EOS, where there is one.
Token 0 is context only. Without BOS it is text, and its bytes are left out of the count of bytes as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moect.data.reading.evaluation import EvaluationDocument


@dataclass
class TokenisedDocument:
    """A document ready to be scored.

    Attributes:
        ids: its tokens, BOS and EOS included.
        first, last: tokens first … last - 1 count for bits per byte.
        n_bytes: UTF-8 bytes of the text that these tokens cover.
        answer: tokens answer … must all be predicted greedily for an exact match; None: there is no answer.
    """

    ids: list[int]
    first: int
    last: int
    n_bytes: int
    answer: int | None = None


@dataclass
class Window:
    """One forward pass over tokens start … end - 1 of a document, which predicts its tokens first … end."""

    document: int
    start: int
    end: int
    first: int

    def __len__(self) -> int:
        return self.end - self.start


def tokenise(tokenizer, documents: list[EvaluationDocument]) -> list[TokenisedDocument]:
    """Tokens of held-out documents, as training tokenises them: text and answer as one string, nothing truncated.

    Args:
        tokenizer: a fast tokenizer of transformers.
        documents: what to score.
    """
    texts = [d.full_text for d in documents]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokenised = []
    for document, text, ids, spans in zip(
        documents, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        skipped, characters = (0, 0) if before else _unpredicted(spans)
        answer = None
        if document.answer is not None:
            # a token with characters of both sides belongs to the answer: the prompt alone would not contain it
            prompt = len(document.text)
            in_prompt = next((i for i, (_, end) in enumerate(spans) if end > prompt), len(spans))
            answer = len(before) + in_prompt
        tokenised.append(
            TokenisedDocument(
                ids=before + ids + (after if answer is not None else []),
                first=len(before) + skipped,
                last=len(before) + len(ids),
                n_bytes=len(text[characters:].encode("utf-8")),
                answer=answer,
            )
        )
    return tokenised


def cut_windows(document: int, n_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of at most `window` tokens; each after the first predicts the next `stride` tokens of the document.

    So every token but token 0 is predicted once, from at least min(its position, window - stride) tokens before it.

    Args:
        document: index that the windows carry.
        n_tokens: of the document, BOS and EOS included.
        window, stride: in tokens; 1 <= stride <= window.
    """
    first, start = 1, 0
    while first < n_tokens:
        end = min(start + window, n_tokens - 1)
        yield Window(document, start, end, first)
        first, start = end + 1, start + stride


def _unpredicted(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """Without BOS: how many tokens nothing predicts, and the characters they cover.

    It is one token, except where a character is spread over several (bytes of a rare script): a fraction of a character
    has no bytes of its own in the offsets, so all tokens of that character are left out.
    """
    count, characters = 0, 0
    for start, end in spans:
        if count and start >= characters:
            break
        count, characters = count + 1, max(characters, end)
    return count, characters
