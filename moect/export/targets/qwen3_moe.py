"""qwen3_moe: Qwen3 without a sliding window; blocks without a module keep their FFN."""

from __future__ import annotations

from moect.export.targets.form import Piece, Subject
from moect.export.targets.routed import RoutedMixture
from moect.export.targets.stock import names_of, window_reason


class Qwen3Moe(RoutedMixture):
    """The attention is Qwen3's own, biases on all projections among it."""

    name, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    families = ("qwen3",)

    def bias_reason(self, subject: Subject) -> str | None:
        return None

    def reason(self, subject: Subject) -> str | None:
        return window_reason(subject)

    def values(self, subject: Subject) -> dict:
        base = subject.base
        return {
            "head_dim": subject.head_dim,
            "attention_bias": bool(subject.biases),
            "moe_intermediate_size": subject.expert_width,
            "num_experts": subject.moe.experts,
            "num_experts_per_tok": subject.moe.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(base.num_hidden_layers) if i not in subject.blocks],
            "use_sliding_window": False,
        }

    def mixture(self, subject: Subject, index: int) -> list[Piece]:
        start = f"model.layers.{index}.mlp"
        experts = self.experts(subject, index, f"{start}.experts", ("gate_proj", "up_proj", "down_proj"))
        return [*experts, Piece(f"{start}.gate.weight", (names_of(index)[1]["router"],))]

    def plain(self, subject: Subject, index: int) -> list[Piece]:
        return [Piece(name, (name,)) for name in names_of(index)[0].values()]
