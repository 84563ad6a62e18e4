"""How the experts join the frozen FFN: from r, f and e = sum_k w_k E_k(u) to the block's output h'.

The mixture m is e where experts began as copies of the FFN, and f + e where they began silent ("around" the FFN), so
that in both cases m = f at step 0 and the block computes what the base's block computes.

    add        r + (f + e)
    fixed      r + (s·f + (1-s)·m)
    gate       r + (p·f + (1-p)·m),   p = sigmoid(w·z + b),  z = tanh(W1 (r+f) + b1 + W2 (r+m) + b2)
    discrete   r + (f if p >= 1/2 else m),  with a straight-through gradient through p
    routed     r + (w_0·f + sum_k w_k E_k):  the frozen FFN is expert 0 of those that the router chooses from

Sources: MoE-CT, arXiv 2407.00875, and its authors' earlier code for the gate's form; `routed` is the form of MoE-LPR,
arXiv 2408.11396. T tokens, D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moect.moe_config import MoeConfig


class Fusion(nn.Module):
    """One of the fusions. `around`: the mixture is taken around the frozen FFN, m = f + e."""

    def __init__(self, config: MoeConfig, width: int, around: bool):
        super().__init__()
        self.kind = config.fusion
        self.fixed_weight = config.fixed_weight
        self.around = around
        if self.kind in ("gate", "discrete"):
            hidden = max(width // 4, 1)
            self.frozen_proj = nn.Linear(width, hidden)  # W1, b1
            self.mixture_proj = nn.Linear(width, hidden)  # W2, b2
            self.out_proj = nn.Linear(hidden, 1)  # w, b

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Weights normal with standard deviation 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    def forward(
        self, r_TD: Tensor, f_TD: Tensor, e_TD: Tensor, frozen_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Join the paths.

        Args:
            r_TD: residual stream after attention.
            f_TD: output of the frozen FFN.
            e_TD: weighted sum of the experts.
            frozen_T: fp32, the router's weight w_0 on the frozen FFN; for `routed` only.

        Returns:
            h'_TD, and the frozen path's weight p_T in fp32 (None for `add`).
        """
        if self.kind == "routed":
            weighted_TD = (f_TD * frozen_T[:, None]).to(f_TD.dtype)
            return r_TD + (weighted_TD + e_TD), frozen_T.detach()
        if self.kind == "add":
            return r_TD + (f_TD + e_TD), None
        if self.kind == "fixed":
            p_T1 = torch.full_like(f_TD[:, :1], self.fixed_weight)
        else:
            p_T1 = self._gate(r_TD + f_TD, r_TD + (f_TD + e_TD if self.around else e_TD))
        share_T = p_T1.detach()[:, 0].float()
        if self.kind == "discrete":
            hard_T1 = (p_T1 >= 0.5).to(p_T1.dtype)
            share_T = hard_T1.detach()[:, 0].float()
            p_T1 = hard_T1 + (p_T1 - p_T1.detach())  # this bracketing: the difference is exactly 0
        if self.around:
            return r_TD + (f_TD + (1 - p_T1) * e_TD), share_T
        return r_TD + (p_T1 * f_TD + (1 - p_T1) * e_TD), share_T

    def _gate(self, frozen_TD: Tensor, mixture_TD: Tensor) -> Tensor:
        z_TH = torch.tanh(self.frozen_proj(frozen_TD) + self.mixture_proj(mixture_TD))
        return torch.sigmoid(self.out_proj(z_TH))
