"""What mixtral and qwen3_moe have in common: the frozen FFN is expert 0 of those routed, as in MoE-LPR.

Their sum over the chosen experts takes the FFN's part at another place than ours, so they agree to rounding.
"""

from __future__ import annotations

from moect.export.targets.form import Piece, Subject
from moect.export.targets.stock import StockMixture, expert_pieces, names_of


class RoutedMixture(StockMixture):
    """Softmax scores, the chosen ones divided by their sum; routers in the dtype of the weights."""

    router = "softmax"

    def fusion_reason(self, fusion: str) -> str | None:
        return None if fusion == "routed" else f"its FFN is one of the routed experts, and moe.fusion is `{fusion}`"

    def bitwise(self, subject: Subject) -> bool:
        return False

    def note(self, subject: Subject) -> str:
        return "its router computes in the dtype of the weights: in bf16 near ties may go to other experts"

    def experts(self, subject: Subject, index: int, start: str, parts: tuple[str, str, str]) -> list[Piece]:
        """The frozen FFN and the experts that trained, their gate, up and down projections under these names."""
        ffn, _ = names_of(index)
        frozen = [Piece(f"{start}.0.{part}.weight", (name,)) for part, name in zip(parts, ffn.values(), strict=True)]
        return frozen + expert_pieces(subject, index, start, first=1, parts=parts)
