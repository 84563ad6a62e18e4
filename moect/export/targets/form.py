"""What a target is: an architecture that says which models it can hold, and how each of its tensors is made.

E experts of width F beside an FFN of width F_base, D width; a block's tensors in training are those of the base,
`model.layers.N.self_attn.*` and so on, and those of the module, `model.layers.N.moe.*`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moect.moe_config import MoeConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Subject:
    """What is to be written, as far as a configuration tells: enough to ask targets before training.

    Attributes:
        base: the base's Hugging Face config, with the base's vocabulary.
        moe: what was appended to it; None: nothing, the base's own tensors were trained.
        dtype: of the weights, `fp32` or `bf16`.
        rows: how many tokens have rows of their own in embedding and head, as `MoectConfig` counts them: `rows`,
            `added_tokens`, `spare_tokens`; None: none has.
    """

    base: object
    moe: MoeConfig | None
    dtype: Literal["fp32", "bf16"] = "bf16"
    rows: dict[str, int] | None = None

    @property
    def blocks(self) -> list[int]:
        """The blocks with a module, ascending."""
        return [] if self.moe is None else self.moe.layer_indices(self.base.num_hidden_layers)

    @property
    def expert_width(self) -> int:
        """F."""
        return self.moe.width or self.base.intermediate_size

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return getattr(self.base, "head_dim", None) or self.base.hidden_size // self.base.num_attention_heads

    @property
    def biases(self) -> str:
        """The attention's projections that have a bias: a part of `qkvo`."""
        if self.base.model_type == "qwen2":
            return "qkv"
        return "qkvo" if getattr(self.base, "attention_bias", False) else ""

    @property
    def windowed(self) -> list[bool]:
        """Of each block, whether its attention sees the last `base.sliding_window` tokens only."""
        base = self.base
        if not getattr(base, "sliding_window", None):
            return [False] * base.num_hidden_layers
        if base.model_type == "mistral":  # all blocks, and no list of them
            return [True] * base.num_hidden_layers
        return [kind == "sliding_attention" for kind in getattr(base, "layer_types", None) or ()]

    @property
    def factors(self) -> tuple[float, float]:
        """By what the frozen FFN and the weighted sum of the experts are multiplied before they are added, for the
        fusions `add` and `fixed`: see `moect.model.fusion`."""
        moe = self.moe
        if moe.fusion == "add":
            return 1.0, moe.routed_scale
        share = moe.fixed_weight
        frozen = share if moe.starts_as_copies(self.base.intermediate_size) else 1.0
        return frozen, (1 - share) * moe.routed_scale


@dataclass(frozen=True)
class Support:
    """A target's answer.

    Attributes:
        reason: why it cannot hold the model; None: it can.
        bitwise: in fp32, its logits are the trained model's bit for bit; else they agree to rounding.
        note: what to know about serving it.
    """

    reason: str | None = None
    bitwise: bool = False
    note: str = ""


@dataclass(frozen=True)
class Piece:
    """One tensor of the written model.

    Attributes:
        name: in the file.
        parts: names of the trained model's tensors that it is made of.
        make: from these to the tensor.
    """

    name: str
    parts: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


class Target(ABC):
    """An architecture. Instances have no state."""

    name: str

    @abstractmethod
    def supports(self, subject: Subject) -> Support:
        """Whether it can hold the model, and how exactly; or the reason why not."""

    @abstractmethod
    def config(self, subject: Subject):
        """Its Hugging Face config."""

    @abstractmethod
    def block(self, subject: Subject, index: int, names: list[str]) -> list[Piece]:
        """The tensors of a block.

        Args:
            subject: what is written.
            index: of the block.
            names: of all tensors of this block in training.
        """

    def outside(self, subject: Subject, names: list[str]) -> list[Piece]:
        """The tensors outside all blocks, whose names in training are given."""
        return [Piece(name, (name,)) for name in names]


def power_of_two(factor: float) -> bool:
    """Whether a product with it is exact in floating point."""
    return torch.frexp(torch.tensor(factor, dtype=torch.float64)).mantissa.item() == 0.5
