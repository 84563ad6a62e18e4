"""Logits and routes of two models on the same texts: how far they differ.

T tokens, K experts per token
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from moect.errors import ExportError
from moect.model.record import ForwardRecord

BITWISE, ROUNDING = 1e-5, 1e-4  # greatest difference of a logit that passes


@dataclass
class Text:
    """What logits are compared on.

    Attributes:
        lang: its language; None: none, these are random tokens.
        ids: token ids, (1, S) int64.
    """

    lang: str | None
    ids: Tensor


@dataclass
class Comparison:
    """What was found.

    Attributes:
        bound: greatest difference of a logit that passes.
        difference: the greatest there was, over all tokens and the whole vocabulary.
        tokens: that were compared, by language.
        routes: (token, block) pairs with a module.
        same_routes: those of them that went to the same experts.
        by_block: whether the models were compared block by block.
    """

    bound: float
    difference: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    routes: int = 0
    same_routes: int = 0
    by_block: bool = False

    @property
    def agreement(self) -> float | None:
        """The share of routes that are the same."""
        return self.same_routes / self.routes if self.routes else None

    def add_logits(self, text: Text, a: Tensor, b: Tensor) -> None:
        """Take in the logits of a text."""
        difference = (a - b).abs().max().item()
        if not math.isnan(self.difference) and not difference <= self.difference:  # NaN is greater, and stays
            self.difference = difference
        name = text.lang or "random tokens"
        self.tokens[name] = self.tokens.get(name, 0) + text.ids.numel()

    def add_routes(self, ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> None:
        """Take in the experts that tokens went to, (T, K) by block, of the trained model and of the written one; that
        may have silent experts in more blocks."""
        for block, a_TK in ours.items():
            b_TK = theirs.get(block)
            self.routes += len(a_TK)
            if b_TK is not None and a_TK.shape == b_TK.shape:
                self.same_routes += int((a_TK.sort(-1).values == b_TK.sort(-1).values).all(-1).sum())

    def check(self, where: str) -> None:
        """Whether this is a proof.

        Raises:
            ExportError: a logit differs by more than the bound, or is no number.
        """
        if not self.difference <= self.bound:
            routes = "" if self.agreement is None else f", and {self.agreement:.2%} of the routes are the same"
            raise ExportError(
                f"{where}: reloaded, its logits differ by {self.difference:.2e} (bound {self.bound:.0e}){routes}; "
                "please report"
            )

    def sentence(self) -> str:
        """For screen and card."""
        texts = ", ".join(f"{lang} {count:,}" for lang, count in self.tokens.items())
        equal = "bit for bit equal" if self.difference == 0 else f"differ by at most {self.difference:.1e}"
        routes = "" if self.agreement is None else f"; {self.agreement:.2%} of the routes are the same"
        how = ", block by block" if self.by_block else ""
        return f"logits in fp32{how}: {equal}{routes} (tokens: {texts})"


class RoutesOfStock:
    """Collects the experts that a stock mixture's tokens go to, (T, K) by block, in one pass."""

    def __init__(self, model: nn.Module):
        self.chosen: dict[int, Tensor] = {}
        self._hooks = []
        for name, module in model.named_modules():
            if match := re.search(r"layers\.(\d+)\..*\bexperts$", name):
                self._hooks.append(module.register_forward_pre_hook(partial(self._take, int(match[1]))))

    def remove(self) -> None:
        """Collect no more."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, block: int, module: nn.Module, args: tuple) -> None:
        self.chosen[block] = args[1]


def routes_of(record: ForwardRecord) -> dict[int, Tensor]:
    """The experts that tokens went to, (T, K) by block."""
    return {index: block.indices_TK for index, block in record.blocks.items()}


def random_text(vocab_size: int, length: int, number: int) -> Text:
    """Token ids from the whole vocabulary."""
    generator = torch.Generator().manual_seed(number)
    return Text(None, torch.randint(vocab_size, (1, length), generator=generator))
