"""One gate value a token, from frozen features: does this token need the new-language experts at all?

Computed once, in the first block that has a module, from features that the module has not touched; shared by every
block above it. So the decision is consistent through the network and depends on the past only.

T tokens, D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LanguageGate(nn.Module):
    """q = sigmoid(g(u)),  g = D -> D -> tanh -> 1, in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.in_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, 1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Input map with variance 1/D; output map small and without bias, so q starts near 1/2."""
        width = self.in_proj.weight.shape[0]
        self.in_proj.weight.copy_(torch.randn(width, width, generator=generator) * width**-0.5)
        self.out_proj.weight.copy_(torch.randn(1, width, generator=generator) * 0.02)
        self.in_proj.bias.zero_()
        self.out_proj.bias.zero_()

    def forward(self, u_TD: Tensor) -> Tensor:
        """The logit of q, (T,) fp32."""
        linear = nn.functional.linear
        hidden_TD = torch.tanh(linear(u_TD.float(), self.in_proj.weight.float(), self.in_proj.bias.float()))
        return linear(hidden_TD, self.out_proj.weight.float(), self.out_proj.bias.float())[:, 0]
