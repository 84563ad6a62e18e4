"""glm4_moe: the DeepSeek-V3 form, f + s sum w_k E_k with sigmoid scores and a selection bias, for all four families.

The frozen FFN becomes the shared experts: n of them side by side are one FFN of width n·F, which is padded with zeros
where it is wider than the base's.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from moect.export.targets.form import Piece, Subject
from moect.export.targets.stock import StockMixture, expert_pieces, inexact, names_of, scale, window_reason, zeros

NEVER = -1e4  # selection bias of an expert that is never chosen: scores lie between 0 and 1


class Glm4Moe(StockMixture):
    """Computes routers in fp32 as the training does, so bf16 chooses the same experts."""

    name, architecture, router, ties = "glm4_moe", "Glm4MoeForCausalLM", "sigmoid", False
    selects_by_bias = True

    def reason(self, subject: Subject) -> str | None:
        return window_reason(subject) or inexact(subject, subject.factors[0])

    def bitwise(self, subject: Subject) -> bool:
        return not self._padding(subject) and subject.moe.fusion == "add" and subject.moe.experts > 1

    def note(self, subject: Subject) -> str:
        if self._shared(subject) == 1:
            return ""
        return "SGLang needs --disable-shared-experts-fusion, the FFN being several shared experts"

    def values(self, subject: Subject) -> dict:
        moe, base = subject.moe, subject.base
        first = next((i for i in range(base.num_hidden_layers) if i in subject.blocks), base.num_hidden_layers)
        return {
            "head_dim": subject.head_dim,
            "use_qk_norm": base.model_type == "qwen3",
            "attention_bias": bool(subject.biases),
            # absent, it becomes 1/2 without a word
            "rope_parameters": {**base.rope_parameters, "partial_rotary_factor": 1.0},
            "moe_intermediate_size": subject.expert_width,
            "n_routed_experts": max(2, moe.experts),  # its groups want two
            "num_experts_per_tok": moe.top_k,
            "n_shared_experts": self._shared(subject),
            "routed_scaling_factor": subject.factors[1],
            "norm_topk_prob": moe.renormalise,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": first,
            "num_nextn_predict_layers": 0,
        }

    def config_of_blocks(self, subject: Subject, blocks: range):
        config = super().config_of_blocks(subject, blocks)
        config.first_k_dense_replace = sum(i < config.first_k_dense_replace for i in blocks)
        return config

    def mixture(self, subject: Subject, index: int) -> list[Piece]:
        start, (_, moe) = f"model.layers.{index}.mlp", names_of(index)
        E, D, F = subject.moe.experts, subject.base.hidden_size, subject.expert_width
        pieces = expert_pieces(subject, index, f"{start}.experts")
        if E > 1:
            pieces.append(Piece(f"{start}.gate.weight", (moe["router"],)))
        else:  # and a second one that no token goes to
            pieces += self._silent(subject, f"{start}.experts", 1, F, D)
            pieces.append(Piece(f"{start}.gate.weight", (moe["router"],), lambda w_1D: pad(w_1D, (0, 0, 0, 1))))
        if subject.moe.balance == "bias":
            bias = Piece(f"{start}.gate.e_score_correction_bias", (moe["bias"],), partial(_never, experts=E))
        else:
            bias = Piece(
                f"{start}.gate.e_score_correction_bias", (), lambda: _never(torch.zeros(E, dtype=torch.float32), E)
            )
        return [*pieces, bias, *self._shared_pieces(subject, index)]

    def plain(self, subject: Subject, index: int) -> list[Piece]:
        if index < min(subject.blocks):  # the class has dense blocks at the bottom only
            return [Piece(name, (name,)) for name in names_of(index)[0].values()]
        start, D, E = f"model.layers.{index}.mlp", subject.base.hidden_size, max(2, subject.moe.experts)
        silent = [p for e in range(E) for p in self._silent(subject, f"{start}.experts", e, subject.expert_width, D)]
        return [
            *silent,
            zeros(subject, f"{start}.gate.weight", E, D),
            zeros(subject, f"{start}.gate.e_score_correction_bias", E, dtype=torch.float32),
            *self._shared_pieces(subject, index),
        ]

    def _silent(self, subject: Subject, start: str, e: int, F: int, D: int) -> list[Piece]:
        return [
            zeros(subject, f"{start}.{e}.gate_proj.weight", F, D),
            zeros(subject, f"{start}.{e}.up_proj.weight", F, D),
            zeros(subject, f"{start}.{e}.down_proj.weight", D, F),
        ]

    def _shared_pieces(self, subject: Subject, index: int) -> list[Piece]:
        start, (ffn, _) = f"model.layers.{index}.mlp.shared_experts", names_of(index)
        more = self._padding(subject)
        factor = subject.factors[0] if index in subject.blocks else 1.0
        return [
            Piece(f"{start}.gate_proj.weight", (ffn["gate"],), lambda w_FD: pad(w_FD, (0, 0, 0, more))),
            Piece(f"{start}.up_proj.weight", (ffn["up"],), lambda w_FD: pad(w_FD, (0, 0, 0, more))),
            Piece(f"{start}.down_proj.weight", (ffn["down"],), lambda w_DF: pad(scale(w_DF, factor), (0, more))),
        ]

    def _shared(self, subject: Subject) -> int:
        return math.ceil(subject.base.intermediate_size / subject.expert_width)

    def _padding(self, subject: Subject) -> int:
        return self._shared(subject) * subject.expert_width - subject.base.intermediate_size


def _never(bias_E: Tensor, experts: int) -> Tensor:
    return bias_E.float() if experts > 1 else pad(bias_E.float(), (0, 1), value=NEVER)
