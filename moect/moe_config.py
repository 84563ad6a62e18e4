"""What the appended module is made of. Part of the run's configuration and of every exported model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints


def option(default, help: str):
    """A dataclass field with the sentence that the configuration reference prints for it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class MoeConfig:
    """The appended module: where it sits, its experts and router, and how it joins the frozen FFN.

    Raises:
        ValueError: a value, or a combination of values, that describes no module.
    """

    __pydantic_config__ = {"extra": "forbid"}

    layers: str | list[int] = option(
        "all", "blocks that get a module: `all`, `every-N` (blocks N-1, 2N-1, …), or a list of block indices"
    )
    experts: int | list[int] = option(
        4,
        "experts per block, E, or a list with that of each block that `layers` names, in its order (`moect probe` "
        "proposes one); with `fusion: routed` the frozen FFN is one of them",
    )
    top_k: int = option(2, "experts per token, K")
    width: int | None = option(None, "width of an expert, F; null: the width of the base's FFN")
    router: Literal["softmax", "sigmoid"] = option("softmax", "how router logits become scores; always in fp32")
    renormalise: bool = option(True, "divide a token's K weights by their sum")
    routed_scale: float = option(1.0, "factor on the weights after that")
    fusion: Literal["gate", "discrete", "fixed", "add", "routed"] = option(
        "gate", "how the experts' output m joins the frozen FFN's output f: see docs/concepts.md"
    )
    fixed_weight: float = option(0.5, "s of the `fixed` fusion: r + s·f + (1-s)·m")
    init: Literal["auto", "copy", "zero"] = option(
        "auto",
        "experts start as copies of the block's FFN (`copy`) or with a zero output projection (`zero`); "
        "`auto`: copies where width and fusion allow",
    )
    language_gate: bool = option(
        False, "one gate value a token, from frozen features, shared by all blocks; needs `fusion: add`"
    )
    gate_sees: Literal["token", "context", "pairs"] = option(
        "context",
        "what the language gate decides by: a token's own features, or what the tokens so far speak for, added up, as "
        "far as their features tell it (`context`), or as counted, of pairs too (`pairs`)",
    )
    gate_threshold: float = option(0.5, "at inference a token with a gate value at or below this skips the experts")
    balance: Literal["loss", "bias", "none"] = option(
        "loss", "balance the experts by an auxiliary loss, by a selection bias (no loss), or not at all"
    )
    dispatch: str = option("auto", "expert kernel: `auto` or the name of a registered backend")

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            allowed = get_args(hint)
            if get_origin(hint) is Literal and getattr(self, name) not in allowed:
                raise ValueError(f"moe.{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        check_blocks(self.layers, "moe.layers")
        if self.experts == []:
            raise ValueError("moe.experts is an empty list: give a number for each chosen block, or one for all")
        for name, least in (("experts", self.fewest_experts), ("top_k", self.top_k)):
            if least < 1:
                raise ValueError(f"moe.{name} is {getattr(self, name)}: it must be at least 1")
        if self.top_k > self.fewest_experts:
            where = "a block has" if isinstance(self.experts, list) else "there are"
            raise ValueError(
                f"moe.top_k is {self.top_k} but {where} only {self.fewest_experts} experts: lower moe.top_k"
            )
        if self.width is not None and (self.width < 8 or self.width % 8):
            raise ValueError(f"moe.width is {self.width}: the kernels need a multiple of 8")
        if not 0.0 <= self.fixed_weight < 1.0:
            raise ValueError(f"moe.fixed_weight is {self.fixed_weight}: it must lie in [0, 1), at 1 no expert counts")
        if not 0.0 < self.routed_scale < float("inf"):
            raise ValueError(f"moe.routed_scale is {self.routed_scale}: it must be positive")
        if not 0.0 <= self.gate_threshold < 1.0:
            raise ValueError(f"moe.gate_threshold is {self.gate_threshold}: it must lie in [0, 1)")
        if self.language_gate and self.fusion != "add":
            raise ValueError(f"moe.language_gate needs moe.fusion: add, and it is `{self.fusion}`")
        if self.fusion == "routed":
            if self.fewest_experts < 2:
                raise ValueError("moe.fusion: routed needs moe.experts of 2 at least, the frozen FFN being one of them")
            if self.init == "zero" or not self.renormalise or self.routed_scale != 1.0:
                raise ValueError(
                    "moe.fusion: routed begins as the base only with copies whose weights sum to 1: init: auto, "
                    "renormalise: true, routed_scale: 1.0"
                )
        if self.init == "copy":
            if self.fusion == "add":
                raise ValueError("moe.init: copy would double the FFN under fusion `add`: use init: zero or auto")
            if not self.renormalise or self.routed_scale != 1.0:
                raise ValueError("moe.init: copy needs weights that sum to 1: renormalise: true, routed_scale: 1.0")

    def starts_as_copies(self, ffn_width: int) -> bool:
        """Whether experts begin as copies of an FFN of this width; initialisation follows the fusion."""
        if self.init != "auto":
            return self.init == "copy"
        sums_to_one = self.renormalise and self.routed_scale == 1.0
        return self.fusion != "add" and sums_to_one and self.width in (None, ffn_width)

    @property
    def threshold_logit(self) -> float:
        """The gate's logit at `gate_threshold`: what lies above it is let through."""
        return logit_of(self.gate_threshold)

    @property
    def fewest_experts(self) -> int:
        """E of the block that has the fewest."""
        return min(self.experts) if isinstance(self.experts, list) else self.experts

    @property
    def experts_told(self) -> str:
        """E for a reader: one number, or from the fewest to the most."""
        return f"{min(self.experts)} to {max(self.experts)}" if isinstance(self.experts, list) else str(self.experts)

    @property
    def frozen_experts(self) -> int:
        """Experts of a block that are the frozen FFN: 0 or 1."""
        return int(self.fusion == "routed")

    def experts_by_block(self, num_layers: int) -> dict[int, int]:
        """E of each chosen block, by its index, ascending.

        Raises:
            ValueError: as `chosen_blocks`, or a list of another length than there are such blocks.
        """
        indices = self.layer_indices(num_layers)
        counts = self.experts if isinstance(self.experts, list) else [self.experts] * len(indices)
        if len(counts) != len(indices):
            raise ValueError(
                f"moe.experts has {len(counts)} numbers, and moe.layers chooses {len(indices)} of the base's "
                f"{num_layers} blocks: give one for each of these"
            )
        named = self.layers if isinstance(self.layers, list) else indices  # a list may name them in any order
        return dict(sorted(zip(named, counts, strict=True)))

    def layer_indices(self, num_layers: int) -> list[int]:
        """The chosen blocks, ascending.

        Raises:
            ValueError: as `chosen_blocks`.
        """
        return chosen_blocks(self.layers, num_layers, "moe.layers")


def check_blocks(chosen: str | list[int], key: str) -> None:
    """Whether a key's value can name blocks of some model.

    Raises:
        ValueError: it cannot.
    """
    if isinstance(chosen, str) and chosen != "all" and not re.fullmatch(r"every-[1-9]\d*", chosen):
        raise ValueError(f"{key} is {chosen!r}: use `all`, `every-N` or a list of block indices")
    if isinstance(chosen, list) and not chosen:
        raise ValueError(f"{key} is an empty list: name at least one block, or use `all`")


def chosen_blocks(chosen: str | list[int], num_layers: int, key: str) -> list[int]:
    """The blocks that a key's value names, ascending.

    Args:
        chosen: the value.
        num_layers: blocks of the base.
        key: begins the error messages.

    Raises:
        ValueError: an index outside the model, twice the same, or a stride longer than the model.
    """
    if chosen == "all":
        return list(range(num_layers))
    if isinstance(chosen, str):
        stride = int(chosen.removeprefix("every-"))
        if stride > num_layers:
            raise ValueError(f"{key} is {chosen!r} but the base has {num_layers} blocks")
        return list(range(stride - 1, num_layers, stride))
    wrong = [i for i in chosen if not 0 <= i < num_layers]
    if wrong:
        raise ValueError(f"{key} names block {wrong[0]}, the base has blocks 0 to {num_layers - 1}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{key} names a block twice")
    return sorted(chosen)


def logit_of(q: float) -> float:
    """The logit whose sigmoid is q, of [0, 1)."""
    return math.log(q / (1 - q)) if q else -math.inf
