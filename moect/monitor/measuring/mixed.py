"""Text that changes between an old and a new language: what the language gate does there, and what that costs.

Made from held-out texts: pieces of an old and of a new language take turns in one document; every second document
begins with the new one. Each part is scored after all that stands before it, by the base, by the model, and by the
model with its gate open for every token.

P parts, T positions of a pass
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

import torch
from torch import Tensor, nn

from moect.data.reading.evaluation import EvaluationDocument, EvaluationText
from moect.errors import ConfigError
from moect.model.append import is_appended
from moect.model.record import ForwardRecord
from moect.monitor.measuring.calibration import with_threshold
from moect.monitor.measuring.exactness import Base
from moect.monitor.measuring.measures import bits_per_byte
from moect.monitor.measuring.score import score
from moect.monitor.measuring.windows import TokenisedDocument
from moect.monitor.rows import Row
from moect.tables import aligned

log = logging.getLogger("moect.monitor")

PIECE = 100  # characters of a part, at most
PARTS = 4  # of a document
KINDS = ("old first", "new after old", "old after new", "new first")


@dataclass
class Part:
    """A mixed document up to the end of one of its parts, whose tokens alone count.

    Attributes:
        document: to be scored.
        kind: one of KINDS.
        leads: whether it is the document's first part.
    """

    document: TokenisedDocument
    kind: str
    leads: bool


class OpenMeter:
    """Counts the tokens of each document that pass the language gate; told as a `RoutingMeter` is."""

    def __init__(self, documents: int, threshold_logit: float, device: torch.device):
        self.threshold_logit = threshold_logit
        self.open_P, self.tokens_P = torch.zeros(2, documents, dtype=torch.int64, device=device)

    def add(self, record: ForwardRecord, document_T: Tensor) -> None:
        """Look at one forward pass; document_T is -1 where a position does not count."""
        counts_T = document_T >= 0
        open_T = record.gate_logit_T[counts_T] > self.threshold_logit
        self.open_P.index_add_(0, document_T[counts_T], open_T.long())
        self.tokens_P.index_add_(0, document_T[counts_T], torch.ones_like(open_T, dtype=torch.int64))


def measure_mixed(
    model: nn.Module, base: Base, texts: Sequence[EvaluationText], tokenizer, most: int, batch_size: int
) -> list[Row]:
    """Measure documents that change between each old and each new language of a domain.

    Args:
        model: with a language gate whose threshold is as it is to be.
        base: as of `base_of`.
        texts: of roles old and new; those with answers are left out.
        tokenizer: of model and base.
        most: documents of a pair of languages.
        batch_size: documents at once.

    Returns:
        One row for each pair, domain and kind of part: old, new, domain, part; parts, tokens (predictions), bytes,
        open_share; base_bits_per_byte, bits_per_byte, and all_open_bits_per_byte.

    Raises:
        ConfigError: the model has no language gate, or no domain has texts of both roles with PARTS documents each.
    """
    if not is_appended(model) or not model.moe_config.language_gate:
        raise ConfigError("documents of two languages are measured for a language gate, and this model has none")
    texts = [text for text in texts if text.documents and text.documents[0].answer is None]
    if short := [f"{text.lang} ({text.domain})" for text in texts if len(text.documents) < PARTS]:
        log.warning("left out, having fewer than %d documents: %s", PARTS, ", ".join(short))
        texts = [text for text in texts if len(text.documents) >= PARTS]
    pairs = [(a, b) for a in texts for b in texts if a.role == "old" != b.role and a.domain == b.domain]
    if not pairs:
        raise ConfigError(
            f"data.evaluation has no domain with an old and a new language, {PARTS} documents each; add them"
        )
    parts, of_pair = [], []
    for index, (old, new) in enumerate(pairs):
        of_this = mixed_parts(old.documents, new.documents, tokenizer, most)
        parts += of_this
        of_pair += [index] * len(of_this)
    documents = [part.document for part in parts]
    longest = max(len(document.ids) for document in documents)

    def scores(of: nn.Module, **told) -> list[float]:
        return [s.nll for s in score(of, documents, longest, longest, batch_size, **told)]

    meter = OpenMeter(len(parts), model.moe_config.threshold_logit, next(model.parameters()).device)
    found = {"bits_per_byte": scores(model, meter=meter)}
    with base() as base_model:
        found["base_bits_per_byte"] = scores(base_model)
    with with_threshold(model, 0.0):
        found["all_open_bits_per_byte"] = scores(model)
    open_P, tokens_P = (_of_parts(parts, count_P.tolist()) for count_P in (meter.open_P, meter.tokens_P))
    rows = []
    for index, (old, new) in enumerate(pairs):
        for kind in KINDS:
            at = [i for i, part in enumerate(parts) if of_pair[i] == index and part.kind == kind]
            if not at:
                continue
            n_bytes, tokens = sum(documents[i].n_bytes for i in at), sum(tokens_P[i] for i in at)
            row = {"old": old.lang, "new": new.lang, "domain": old.domain, "part": kind, "parts": len(at)}
            row |= {"tokens": tokens, "bytes": n_bytes, "open_share": sum(open_P[i] for i in at) / tokens}
            rows.append(row | {key: bits_per_byte(sum(nll[i] for i in at), n_bytes) for key, nll in found.items()})
    return rows


def render_mixed(rows: list[Row]) -> str:
    """A table for the screen: means over the pairs of languages, by domain and kind of part."""
    heading = ["domain", "part", "tokens", "open", "base", "model", "all open"]
    lines = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        for kind in KINDS:
            of_kind = [row for row in rows if (row["domain"], row["part"]) == (domain, kind)]
            figures = [mean(row[key] for row in of_kind) for key in ("base_bits_per_byte", "bits_per_byte")]
            figures.append(mean(row["all_open_bits_per_byte"] for row in of_kind))
            open_share = mean(row["open_share"] for row in of_kind)
            tokens = sum(row["tokens"] for row in of_kind)
            lines.append([domain, kind, f"{tokens:,}", f"{open_share:.1%}", *(f"{bits:.3f}" for bits in figures)])
    return aligned(heading, lines, left=2)


def mixed_parts(old: list[EvaluationDocument], new: list[EvaluationDocument], tokenizer, most: int) -> list[Part]:
    """Documents of PARTS pieces that take turns, each as its parts in order.

    Document n has pieces 4n … 4n + 3 of the shorter list's length; so of parallel texts none is a translation of
    another in the same document.
    """
    count = min(most, min(len(old), len(new)) // PARTS)
    parts = []
    for n in range(count):
        turns = [(old, "old"), (new, "new")]
        turns = turns[n % 2 :] + turns[: n % 2]
        chosen = [(turns[i % 2][1], _piece(turns[i % 2][0][PARTS * n + i].text)) for i in range(PARTS)]
        parts += _parts(chosen, tokenizer)
    return parts


def _parts(pieces: list[tuple[str, str]], tokenizer) -> list[Part]:
    """The parts of one document of these pieces, with the roles of their languages."""
    text = " ".join(piece for _, piece in pieces)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids, spans = before + encoded["input_ids"], encoded["offset_mapping"]
    ends, at = [], 0
    for _, piece in pieces:
        at += len(piece)
        ends.append(at)
        at += 1  # the space, which belongs to what follows
    # a token belongs to the part that its first character does
    lasts = [len(before) + sum(start < end for start, _ in spans) for end in ends]
    firsts = [max(1, len(before)), *lasts[:-1]]
    characters = [0 if before else spans[0][1], *ends]
    parts = []
    for n, (role, _) in enumerate(pieces):
        other = "new" if role == "old" else "old"
        low, high = characters[n : n + 2]
        document = TokenisedDocument(ids[: lasts[n]], firsts[n], lasts[n], len(text[low:high].encode("utf-8")))
        parts.append(Part(document, f"{role} after {other}" if n else f"{role} first", n == 0))
    return parts


def _piece(text: str) -> str:
    """The beginning of a text, up to a space where one is near."""
    text = " ".join(text.split())
    if len(text) <= PIECE:
        return text
    cut = text.rfind(" ", PIECE // 2, PIECE)
    return text[: cut if cut > 0 else PIECE]


def _of_parts(parts: list[Part], counts: list[int]) -> list[int]:
    """What is counted up to the end of each part, as what is counted in it."""
    return [
        now - (0 if part.leads else before) for part, (before, now) in zip(parts, pairwise([0, *counts]), strict=True)
    ]
