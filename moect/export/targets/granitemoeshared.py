"""granitemoeshared: f + sum w_k E_k, the weights a softmax over the chosen K logits, for llama and mistral."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moect.export.targets.form import Piece, Subject
from moect.export.targets.stock import StockMixture, head_reason, inexact, names_of, scale, window_reason, zeros


class GraniteMoeShared(StockMixture):
    """A softmax over K logits is the softmax over all E, renormalised over the chosen."""

    name, architecture, router = "granitemoeshared", "GraniteMoeSharedForCausalLM", "softmax"
    families = ("llama", "mistral")

    def reason(self, subject: Subject) -> str | None:
        if not subject.moe.renormalise:
            return "its weights sum to 1, and moe.renormalise is false"
        return window_reason(subject) or head_reason(subject) or inexact(subject, *subject.factors)

    def bitwise(self, subject: Subject) -> bool:
        return False  # another order of softmax and choice

    def note(self, subject: Subject) -> str:
        return "its router computes in the dtype of the weights: in bf16 near ties may go to other experts"

    def values(self, subject: Subject) -> dict:
        return {
            "intermediate_size": subject.expert_width,
            "shared_intermediate_size": subject.base.intermediate_size,
            "num_local_experts": subject.moe.experts,
            "num_experts_per_tok": subject.moe.top_k,
            "attention_multiplier": subject.head_dim**-0.5,
            "attention_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }

    def mixture(self, subject: Subject, index: int) -> list[Piece]:
        start, (_, moe) = f"model.layers.{index}.block_sparse_moe", names_of(index)
        frozen, routed = subject.factors
        return [
            Piece(f"{start}.router.layer.weight", (moe["router"],)),
            Piece(f"{start}.input_linear.weight", (moe["gate_up"],)),
            Piece(f"{start}.output_linear.weight", (moe["down"],), partial(scale, factor=routed)),
            *self._shared(index, frozen),
        ]

    def plain(self, subject: Subject, index: int) -> list[Piece]:
        start, E = f"model.layers.{index}.block_sparse_moe", subject.moe.experts
        D, F = subject.base.hidden_size, subject.expert_width
        return [
            zeros(subject, f"{start}.router.layer.weight", E, D),
            zeros(subject, f"{start}.input_linear.weight", E, 2 * F, D),
            zeros(subject, f"{start}.output_linear.weight", E, D, F),
            *self._shared(index, 1.0),
        ]

    def _shared(self, index: int, factor: float) -> list[Piece]:
        start, (ffn, _) = f"model.layers.{index}.shared_mlp", names_of(index)
        return [
            Piece(f"{start}.input_linear.weight", (ffn["gate"], ffn["up"]), _stacked),
            Piece(f"{start}.output_linear.weight", (ffn["down"],), partial(scale, factor=factor)),
        ]


def _stacked(gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    return torch.cat([gate_FD, up_FD])
