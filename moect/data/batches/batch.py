"""Micro-batches: rows of corpora side by side, as tensors.

B rows, S tokens a row, F fragments of a row
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from moect.data.batches.best_fit import BestFitRows
from moect.data.batches.corpus import Corpus
from moect.data.batches.packing import JoinedRows

ROLES = {"old": 0, "new": 1, "learnt": 1}  # a language that was learned is as little the base's as one that is new
PADDING = -1


@dataclass
class MicroBatch:
    """What a rank takes at once.

    Attributes:
        input_ids_BS: int64.
        labels_BS: int64, already shifted: the next token of the same document, else -100.
        position_ids_BS: int64, from 0 in each document's fragment. Pass them to the model with `use_cache=False` and
            without an attention mask: then documents cannot see one another.
        role_BS: int8, role of the token's language: 0 old, 1 new or learnt, -1 padding.
        language_BS: int16, the token's language: its place in the sorted keys of `data.languages`; -1 padding.
        fragments: for each row (F, 4) int64, what it holds: place of the source in `data.train`, document, first and
            last token, as in `Row.fragments_F4`.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    role_BS: Tensor
    language_BS: Tensor
    fragments: list[np.ndarray]

    def to(self, device) -> MicroBatch:
        """The same with its tensors on another device."""
        values = (getattr(self, field.name) for field in fields(self))
        return MicroBatch(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in values))

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray | list]) -> MicroBatch:
        """From what `RowReader` gives."""
        return cls(**{name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in arrays.items()})


class RowReader:
    """Micro-batches as arrays, by the rows that they are to hold. Another process can have one: it holds no tokens.

    Args:
        corpora: of the configuration.
        packed: the rows of each.
        languages: the sorted keys of `data.languages`.
    """

    def __init__(self, corpora: list[Corpus], packed: list[JoinedRows | BestFitRows], languages: list[str]):
        self.corpora, self.packed, self.languages = corpora, packed, languages

    def __getitem__(self, chosen: list[tuple[int, int]]) -> dict[str, np.ndarray | list]:
        """The fields of a MicroBatch of these (corpus, row of the corpus)."""
        rows = [self.packed[corpus].row(index) for corpus, index in chosen]
        of_rows = [self.corpora[corpus] for corpus, _ in chosen]
        valid_BS = np.stack([row.valid_S for row in rows])
        role_B1 = np.array([[ROLES[corpus.role]] for corpus in of_rows], dtype=np.int8)
        language_B1 = np.array([[self.languages.index(corpus.lang)] for corpus in of_rows], dtype=np.int16)
        fragments = []
        for row, corpus in zip(rows, of_rows, strict=True):
            held = row.fragments_F4.copy()
            held[:, 0] = np.array(corpus.sources)[held[:, 0]]
            fragments.append(held)
        return {
            "input_ids_BS": np.stack([row.input_ids_S for row in rows]),
            "labels_BS": np.stack([row.labels_S for row in rows]),
            "position_ids_BS": np.stack([row.position_ids_S for row in rows]),
            "role_BS": np.where(valid_BS, role_B1, np.int8(PADDING)),
            "language_BS": np.where(valid_BS, language_B1, np.int16(PADDING)),
            "fragments": fragments,
        }
