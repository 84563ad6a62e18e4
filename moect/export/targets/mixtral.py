"""mixtral: Llama and Mistral, with or without a sliding window, and a module in every block."""

from __future__ import annotations

from moect.export.targets.form import Piece, Subject
from moect.export.targets.routed import RoutedMixture
from moect.export.targets.stock import names_of


class Mixtral(RoutedMixture):
    """All of its blocks are mixtures."""

    name, architecture = "mixtral", "MixtralForCausalLM"
    families = ("llama", "mistral")

    def bias_reason(self, subject: Subject) -> str | None:
        return "its attention has no biases, and the base's has" if subject.biases else None

    def reason(self, subject: Subject) -> str | None:
        if len(subject.blocks) < subject.base.num_hidden_layers:
            return "all of its blocks are mixtures, and moe.layers leaves some out"
        return None

    def values(self, subject: Subject) -> dict:
        return {
            "head_dim": subject.head_dim,
            "num_local_experts": subject.moe.experts,
            "num_experts_per_tok": subject.moe.top_k,
            "sliding_window": subject.base.sliding_window if any(subject.windowed) else None,
        }

    def mixture(self, subject: Subject, index: int) -> list[Piece]:
        start = f"model.layers.{index}.block_sparse_moe"
        experts = self.experts(subject, index, f"{start}.experts", ("w1", "w3", "w2"))
        return [*experts, Piece(f"{start}.gate.weight", (names_of(index)[1]["router"],))]

    def plain(self, subject: Subject, index: int) -> list[Piece]:
        raise AssertionError("every block has a module")
