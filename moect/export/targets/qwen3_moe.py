"""qwen3_moe: Qwen3 without a sliding window; blocks without a module keep their FFN."""

from __future__ import annotations

from moect.export.targets.form import Piece, Subject
from moect.export.targets.routed import RoutedMixture
from moect.export.targets.stock import names_of


class Qwen3Moe(RoutedMixture):
    """The attention is Qwen3's own, biases on all projections among it."""

    name, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"

    def bias_reason(self, subject: Subject) -> str | None:
        return None

    def reason(self, subject: Subject) -> str | None:
        base = subject.base
        if base.model_type != "qwen3":
            return f"its attention normalises queries and keys, and {base.model_type}'s does not"
        if any(subject.windowed) and base.max_position_embeddings > base.sliding_window:
            return f"it has one window for all blocks or none, and the base's sees {base.sliding_window:,} in some"
        if subject.moe.balance == "bias":
            return "its router has no selection bias (moe.balance: bias)"
        return None

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

    def config_of_blocks(self, subject: Subject, blocks: range):
        config = super().config_of_blocks(subject, blocks)
        config.mlp_only_layers = [n for n, i in enumerate(blocks) if i in config.mlp_only_layers]
        return config

    def mixture(self, subject: Subject, index: int) -> list[Piece]:
        start = f"model.layers.{index}.mlp"
        experts = self.experts(subject, index, f"{start}.experts", "gate_proj", "up_proj", "down_proj")
        return [*experts, Piece(f"{start}.gate.weight", (names_of(index)[1]["router"],))]

    def plain(self, subject: Subject, index: int) -> list[Piece]:
        return [Piece(name, (name,)) for name in names_of(index)[0].values()]
