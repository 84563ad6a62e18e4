"""Which experts a token goes to, and with what weights. Always computed in fp32.

T tokens, K experts per token, E experts, D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moect.moe_config import MoeConfig


class Router(nn.Module):
    """A bias-free linear map to E logits, softmax or sigmoid scores, and the K best of them (MoE-CT, arXiv 2407.00875).

    With `balance: bias` experts are selected by score + bias but weighted by the score alone (arXiv 2408.15664); the
    trainer moves the bias, gradients never do.
    """

    def __init__(self, config: MoeConfig, experts: int, width: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(experts, width))
        if config.balance == "bias":
            self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32))
        else:
            self.selection_bias = None

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Weights normal with standard deviation 0.02, selection bias zero."""
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * 0.02)
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def forward(self, u_TD: Tensor, chosen_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            u_TD: inputs of the FFN.
            chosen_TK: int64, experts already chosen for these tokens (a recomputed block); None: choose.

        Returns:
            indices_TK int64, weights_TK fp32 and the raw logits_TE fp32.
        """
        logits_TE = nn.functional.linear(u_TD.float(), self.weight.float())
        scores_TE = self.scores(logits_TE)
        if chosen_TK is None:
            ranking_TE = scores_TE.detach()
            if self.selection_bias is not None:
                ranking_TE = ranking_TE + self.selection_bias
            chosen_TK = ranking_TE.topk(self.config.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, chosen_TK)
        if self.config.renormalise:
            # the floor keeps 0/0 out where all K sigmoid scores underflow
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return chosen_TK, weights_TK * self.config.routed_scale, logits_TE

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Scores from raw logits, fp32."""
        return logits_TE.softmax(-1) if self.config.router == "softmax" else logits_TE.sigmoid()
