"""Samples: how model and base write on from the beginnings of held-out documents, greedily."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moect.data.reading.evaluation import EvaluationText
from moect.monitor.measuring.score import evaluation_mode

BEGINNING = 32  # tokens that are given, at most; never more than half of the document


@dataclass
class Prompt:
    """The beginning of a held-out document.

    Attributes:
        lang, role, domain: of its text.
        document: its name.
        text: what is given.
        reference: how it goes on.
    """

    lang: str
    role: str
    domain: str
    document: str
    text: str
    reference: str


def make_prompts(
    texts: list[EvaluationText], tokenizer, count: int, n_tokens: int, longest: int | None = None
) -> list[Prompt]:
    """Beginnings of the first `count` documents of each text, or whole prompts where there are answers.

    Args:
        texts: held-out.
        tokenizer: a fast one of transformers; it says where a beginning may end.
        count: documents of each text; those of fewer than four tokens, and prompts of none, are passed over.
        n_tokens: of the reference, at most.
        longest: prompts of more tokens are passed over; None: none is too long.
    """
    prompts = []
    for text in texts:
        found = []
        for document in text.documents:
            if len(found) == count:
                break
            if document.answer is not None:
                beginning = (document.text, document.answer)
                fits = 1 <= len(_spans(tokenizer, document.text)) <= (longest or math.inf)
            else:
                # surely enough, and no book is read for a line
                spans = _spans(tokenizer, document.text[: 40 * (BEGINNING + n_tokens)])
                given = min(BEGINNING, len(spans) // 2)
                fits = given >= 2
                begin, end = (spans[i - 1][1] for i in (given, min(given + n_tokens, len(spans)))) if fits else (0, 0)
                beginning = (document.text[:begin], document.text[begin:end])
            if fits:
                found.append(Prompt(text.lang, text.role, text.domain, document.id, *beginning))
        prompts += found
    return prompts


@contextmanager
def _settings_of(model: nn.Module, settings) -> Iterator[None]:
    """Inside, the model generates by these settings alone: what they leave open is not taken from the base's own."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _spans(tokenizer, text: str) -> list[tuple[int, int]]:
    """Where each token stands in the text."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]


@torch.no_grad()
def write_on(model: nn.Module, tokenizer, prompts: list[Prompt], n_tokens: int, batch_size: int) -> list[str]:
    """The likeliest continuation of each prompt, of at most `n_tokens` tokens. Every rank makes the same calls.

    Args:
        model: a causal LM of transformers; it is left in the mode it came in.
        tokenizer: its own.
        prompts: from `make_prompts`.
        n_tokens: after which it ends, if EOS does not come first.
        batch_size: prompts at once.
    """
    from transformers import GenerationConfig

    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=n_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0 if eos is None else eos
    )
    device = next(model.parameters()).device
    written = []
    with evaluation_mode(model), _settings_of(model, settings):
        for start in range(0, len(prompts), batch_size):
            ids = [
                before + tokenizer(p.text, add_special_tokens=False)["input_ids"] for p in prompts[start:][:batch_size]
            ]
            width = max(map(len, ids))
            ids_BS, mask_BS = torch.zeros(2, len(ids), width, dtype=torch.int64)
            for b, row in enumerate(ids):  # padded on the left, so that all go on from the same column
                ids_BS[b, width - len(row) :] = torch.tensor(row)
                mask_BS[b, width - len(row) :] = 1
            out_BS = model.generate(ids_BS.to(device), attention_mask=mask_BS.to(device), generation_config=settings)
            # a character whose last bytes were not written is none
            written += [tokenizer.decode(row, skip_special_tokens=True).rstrip("�") for row in out_BS[:, width:]]
    return written
