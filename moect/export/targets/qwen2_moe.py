"""qwen2_moe: f + sum w_k E_k with softmax scores, for bases without norms in their attention.

Its shared expert has a gate, sigmoid(g·u). With a g so small that it rounds to exactly 1/2, the shared down projection
is doubled. It is not 0: llama.cpp computes the gate as silu(x) / x.
"""

from __future__ import annotations

from functools import partial

from moect.export.targets.form import Piece, Subject, power_of_two
from moect.export.targets.stock import StockMixture, expert_pieces, filled, head_reason, inexact, names_of, scale, zeros

TINY = 2.0**-60


class Qwen2Moe(StockMixture):
    """Its router takes logits in the dtype of the activations: in bf16, near ties may go to other experts."""

    name, architecture, router = "qwen2_moe", "Qwen2MoeForCausalLM", "softmax"
    families = ("llama", "qwen2", "mistral")

    def reason(self, subject: Subject) -> str | None:
        return head_reason(subject) or inexact(subject, 2 * subject.factors[0], subject.factors[1])

    def bitwise(self, subject: Subject) -> bool:
        return subject.moe.fusion == "add" and power_of_two(subject.factors[1])

    def note(self, subject: Subject) -> str:
        notes = ["its router computes in the dtype of the weights: in bf16 near ties may go to other experts"]
        if any(subject.windowed):
            notes.append("transformers applies the sliding window, another engine may not")
        if subject.moe.renormalise:
            notes.append("llama.cpp does not renormalise for this class, and answers wrongly")
        elif len(subject.blocks) < subject.base.num_hidden_layers:
            notes.append("llama.cpp takes it only with a module in every block")
        return "; ".join(notes)

    def values(self, subject: Subject) -> dict:
        moe, base = subject.moe, subject.base
        without = [i for i in range(base.num_hidden_layers) if i not in subject.blocks]
        return {
            "qkv_bias": True,  # of zeros where the base has none: engines expect them
            "moe_intermediate_size": subject.expert_width,
            "shared_expert_intermediate_size": base.intermediate_size,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.renormalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": without,
            "use_sliding_window": any(subject.windowed),
            "sliding_window": base.sliding_window if any(subject.windowed) else None,
            "max_window_layers": base.num_hidden_layers,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in subject.windowed],
        }

    def block(self, subject: Subject, index: int, names: list[str]) -> list[Piece]:
        pieces = super().block(subject, index, names)
        if subject.biases:
            return pieces
        width = {"q": subject.base.num_attention_heads, "k": subject.base.num_key_value_heads}
        start = f"model.layers.{index}.self_attn"
        for part in "qkv":
            heads = width.get(part, width["k"])
            pieces.append(zeros(subject, f"{start}.{part}_proj.bias", heads * subject.head_dim))
        return pieces

    def mixture(self, subject: Subject, index: int) -> list[Piece]:
        start, (ffn, moe) = f"model.layers.{index}.mlp", names_of(index)
        frozen, routed = subject.factors
        return [
            *expert_pieces(subject, index, f"{start}.experts", routed),
            Piece(f"{start}.gate.weight", (moe["router"],)),
            filled(subject, f"{start}.shared_expert_gate.weight", TINY, 1, subject.base.hidden_size),
            Piece(f"{start}.shared_expert.gate_proj.weight", (ffn["gate"],)),
            Piece(f"{start}.shared_expert.up_proj.weight", (ffn["up"],)),
            Piece(f"{start}.shared_expert.down_proj.weight", (ffn["down"],), partial(scale, factor=2 * frozen)),
        ]

    def plain(self, subject: Subject, index: int) -> list[Piece]:
        return [Piece(name, (name,)) for name in names_of(index)[0].values()]
