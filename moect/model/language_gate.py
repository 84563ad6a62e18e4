"""One gate value a token, from frozen features: does this token need the new-language experts at all?

Computed once, in the first block that has a module, from features that the module has not touched; shared by every
block above it. So the decision is consistent through the network and depends on the past only.

T tokens, D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PIECE = 2**20  # numbers of a weight that a CPU converts to fp32 at once


class LanguageGate(nn.Module):
    """q = sigmoid(g(u)),  g = D -> D -> tanh -> 1, in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.in_proj = Fp32Linear(width, width)
        self.out_proj = Fp32Linear(width, 1)

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
        return self.out_proj(torch.tanh(self.in_proj(u_TD)))[:, 0]


class Fp32Linear(nn.Module):
    """A linear map that computes in fp32, whatever its parameters are stored in.

    Not an `nn.Linear`: serving engines and quantisers put their own in the place of those, which compute in the
    parameters' dtype. And a module of its own: offloaded weights are fetched as their module is called.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, linear = self.weight, self.bias, nn.functional.linear
        if weight.dtype == torch.float32 or weight.numel() <= PIECE or not weight.is_cpu or torch.is_grad_enabled():
            return linear(x.float(), weight.float(), bias.float())
        # a whole copy would be new memory in every pass: at a width of 4096 that takes as long as the block's own FFN
        rows = max(1, PIECE // weight.shape[1])
        pieces = zip(weight.split(rows), bias.split(rows), strict=True)
        return torch.cat([linear(x.float(), w.float(), b.float()) for w, b in pieces], -1)
