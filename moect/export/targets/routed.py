"""What mixtral and qwen3_moe have in common: the frozen FFN is expert 0 of those routed, as in MoE-LPR.

Their sum over the chosen experts takes the FFN's part at another place than ours, so they agree to rounding.
"""

from __future__ import annotations

from functools import partial

from moect.export.targets.form import Piece, Subject
from moect.export.targets.stock import StockMixture, names_of, one, rows


class RoutedMixture(StockMixture):
    """Softmax scores, the chosen ones divided by their sum; routers in the dtype of the weights."""

    router = "softmax"

    def fusion_reason(self, fusion: str) -> str | None:
        return None if fusion == "routed" else f"its FFN is one of the routed experts, and moe.fusion is `{fusion}`"

    def bitwise(self, subject: Subject) -> bool:
        return False

    def note(self, subject: Subject) -> str:
        return "its router computes in the dtype of the weights: in bf16 near ties may go to other experts"

    def experts(self, subject: Subject, index: int, start: str, gate: str, up: str, down: str) -> list[Piece]:
        """The frozen FFN and the experts that trained, three matrices each, under these names."""
        ffn, moe = names_of(index)
        F = subject.expert_width
        pieces = [
            Piece(f"{start}.0.{gate}.weight", (ffn["gate"],)),
            Piece(f"{start}.0.{up}.weight", (ffn["up"],)),
            Piece(f"{start}.0.{down}.weight", (ffn["down"],)),
        ]
        for e in range(subject.moe.trained_experts):
            pieces += [
                Piece(f"{start}.{e + 1}.{gate}.weight", (moe["gate_up"],), partial(rows, expert=e, first=0, last=F)),
                Piece(f"{start}.{e + 1}.{up}.weight", (moe["gate_up"],), partial(rows, expert=e, first=F, last=2 * F)),
                Piece(f"{start}.{e + 1}.{down}.weight", (moe["down"],), partial(one, expert=e)),
            ]
        return pieces
