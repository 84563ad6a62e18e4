"""What the stock mixtures of experts have in common: a shared FFN, the frozen one, and routed experts that are added.

Their attention has the base's form and names, so what differs is where the FFN's and the module's tensors go.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from moect.export.targets.form import (
    EMBEDDING,
    HEAD,
    Piece,
    Subject,
    Support,
    Target,
    power_of_two,
)
from moect.model.build import DTYPES
from moect.model.families import SUPPORTED, config_of_blocks

# of a base's config, what every architecture of transformers calls the same
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
)


class StockMixture(Target):
    """A stock mixture of experts: by default one that computes r + (f + e), with a shared expert beside routed ones."""

    architecture: str  # name of the class in transformers
    router: str  # how it turns router logits into scores
    ties = True  # whether its class can tie head and embedding
    selects_by_bias = False  # whether its router has one, `moe.balance: bias`
    families: tuple[str, ...] = SUPPORTED  # whose attention has its form

    def supports(self, subject: Subject) -> Support:
        reason = self._common_reason(subject) or self.reason(subject)
        if reason:
            return Support(reason)
        return Support(None, self.bitwise(subject) and not subject.rows, self.note(subject))

    @abstractmethod
    def reason(self, subject: Subject) -> str | None:
        """What this architecture cannot do, of what others can."""

    @abstractmethod
    def bitwise(self, subject: Subject) -> bool:
        """Whether it computes the same bits in fp32."""

    def note(self, subject: Subject) -> str:
        """What to know about serving it."""
        return ""

    @abstractmethod
    def values(self, subject: Subject) -> dict:
        """What its config says beyond what all have in common."""

    @abstractmethod
    def mixture(self, subject: Subject, index: int) -> list[Piece]:
        """The pieces of a block's FFN and module; the block has a module."""

    @abstractmethod
    def plain(self, subject: Subject, index: int) -> list[Piece]:
        """The same for a block without a module."""

    def config(self, subject: Subject):
        from transformers import AutoConfig

        values = {key: getattr(subject.base, key) for key in KEPT if hasattr(subject.base, key)}
        values["tie_word_embeddings"] = self.ties and values["tie_word_embeddings"]
        config = AutoConfig.for_model(self.name, **{**values, **self.values(subject)})
        config.architectures = [self.architecture]
        return config

    def config_of_blocks(self, subject: Subject, blocks: range):
        """The config of a model of some of the blocks, at most one."""
        return config_of_blocks(self.config(subject), blocks)

    def block(self, subject: Subject, index: int, names: list[str]) -> list[Piece]:
        start = f"model.layers.{index}."
        kept = [n for n in names if not n.startswith((start + "mlp.", start + "moe."))]
        of_ffn = self.mixture(subject, index) if index in subject.blocks else self.plain(subject, index)
        return [Piece(n, (n,)) for n in kept] + of_ffn

    def outside(self, subject: Subject, names: list[str]) -> list[Piece]:
        pieces = super().outside(subject, names)
        if not self.ties and HEAD not in names:
            pieces.append(Piece(HEAD, (EMBEDDING,), Tensor.clone))
        return pieces

    def _common_reason(self, subject: Subject) -> str | None:
        moe = subject.moe
        if moe is None:
            return "nothing was appended"
        if isinstance(moe.experts, list):
            return "its blocks have one number of experts, and moe.experts is a list"
        if moe.language_gate:
            return "it has no gate that skips the experts (moe.language_gate)"
        if reason := self.fusion_reason(moe.fusion):
            return reason
        if moe.router != self.router:
            return f"its router is a {self.router}, and moe.router is `{moe.router}`"
        if moe.balance == "bias" and not self.selects_by_bias:
            return "its router has no selection bias (moe.balance: bias)"
        if reason := self.bias_reason(subject):
            return reason
        if subject.base.model_type not in self.families:
            return f"its attention has another form than {subject.base.model_type}'s"
        return None

    def fusion_reason(self, fusion: str) -> str | None:
        """Why it cannot join FFN and experts so."""
        return None if fusion in ("add", "fixed") else f"it adds the experts to the FFN, and moe.fusion is `{fusion}`"

    def bias_reason(self, subject: Subject) -> str | None:
        """Why it cannot have the base's biases: most have none on the output projection."""
        if "o" in subject.biases:
            return "its attention has no bias on the output projection, and the base's has"
        return None


def window_reason(subject: Subject) -> str | None:
    """Why a class without sliding windows cannot have the base's."""
    base = subject.base
    if any(subject.windowed) and base.max_position_embeddings > base.sliding_window:
        return f"it is written without sliding windows, and the base's sees {base.sliding_window:,} tokens only"
    return None


def head_reason(subject: Subject) -> str | None:
    """Why a class, or an engine, that divides the model's width among the heads cannot have the base's."""
    if subject.head_dim * subject.base.num_attention_heads != subject.base.hidden_size:
        return "it derives the width of a head from the model's, and the base's heads are of another"
    return None


def names_of(index: int) -> tuple[dict[str, str], dict[str, str]]:
    """The names in training of a block's FFN, `gate`, `up`, `down`, and of its module."""
    start = f"model.layers.{index}"
    ffn = {part: f"{start}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    moe = {
        "gate_up": f"{start}.moe.experts.gate_up_proj",
        "down": f"{start}.moe.experts.down_proj",
        "router": f"{start}.moe.router.weight",
        "bias": f"{start}.moe.router.selection_bias",
    }
    return ffn, moe


def expert_pieces(
    subject: Subject,
    index: int,
    start: str,
    factor: float = 1.0,
    first: int = 0,
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Piece]:
    """The experts that trained, as most architectures store them: three matrices each.

    Args:
        subject: what is written.
        index: of the block.
        start: of the names, before the expert's number.
        factor: on the down projections.
        first: number of the first.
        parts: names of gate, up and down projection.
    """
    _, moe = names_of(index)
    F, (gate, up, down), pieces = subject.expert_width, parts, []
    for e in range(subject.moe.experts - subject.moe.frozen_experts):
        name = f"{start}.{first + e}"
        pieces += [
            Piece(f"{name}.{gate}.weight", (moe["gate_up"],), partial(rows, expert=e, first=0, last=F)),
            Piece(f"{name}.{up}.weight", (moe["gate_up"],), partial(rows, expert=e, first=F, last=2 * F)),
            Piece(f"{name}.{down}.weight", (moe["down"],), partial(one, expert=e, factor=factor)),
        ]
    return pieces


def zeros(subject: Subject, name: str, *shape: int, dtype=None) -> Piece:
    """A tensor of zeros, in the dtype of the weights."""
    return Piece(name, (), lambda: torch.zeros(shape, dtype=dtype or DTYPES[subject.dtype]))


def filled(subject: Subject, name: str, value: float, *shape: int) -> Piece:
    """A tensor of one value, in the dtype of the weights."""
    return Piece(name, (), lambda: torch.full(shape, value, dtype=DTYPES[subject.dtype]))


def rows(stacked: Tensor, expert: int, first: int, last: int) -> Tensor:
    """Some rows of one expert's matrix, of (E, rows, columns)."""
    return stacked[expert, first:last]


def one(stacked: Tensor, expert: int, factor: float = 1.0) -> Tensor:
    """One expert's matrix of (E, rows, columns), times a factor."""
    return scale(stacked[expert], factor)


def scale(tensor: Tensor, factor: float) -> Tensor:
    """A tensor times a factor, rounded once."""
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)


def inexact(subject: Subject, *factors: float) -> str | None:
    """Why these factors cannot be multiplied into the weights; None: they can."""
    for factor in factors:
        if subject.dtype == "bf16" and not power_of_two(factor):
            return f"a factor of {factor:g} would have to be rounded into bf16 weights; --dtype fp32 takes it"
    return None
