"""One gate value a token, from frozen features: does this token need the new-language experts at all?

Computed once, in the first block that has a module, from features that the module has not touched (only behind tokens
that open it by themselves they have changed, see `moect.model.embeddings`); shared by every block above it. So the
decision is consistent through the network and depends on the past only. One token tells little of its language: what
the block's attention reads of all tokens so far, evenly, tells more (`moect.model.even_attention`).

T tokens, D width, C inputs: D, or 2D with the context
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONTEXT_LENGTH = 8  # typical of the context's components, as those of u have 1
OPEN = 40.0  # the logit at a token that opens the gate by itself: above that of every threshold below 1
PIECE = 2**20  # numbers of a weight that a CPU converts to fp32 at once


class LanguageGate(nn.Module):
    """q = sigmoid(g(u)) or sigmoid(g(u, context)),  g = C -> D -> tanh -> 1, in fp32."""

    def __init__(self, width: int, sees_context: bool = True):
        super().__init__()
        self.in_proj = Fp32Linear(2 * width if sees_context else width, width)
        self.out_proj = Fp32Linear(width, 1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Input map with variance 1/D, the context's less as that is longer; output map small and without bias, so q
        starts near 1/2."""
        width, inputs = self.in_proj.weight.shape
        self.in_proj.weight.copy_(torch.randn(width, inputs, generator=generator) * width**-0.5)
        self.in_proj.weight[:, width:] /= CONTEXT_LENGTH
        self.out_proj.weight.copy_(torch.randn(1, width, generator=generator) * 0.02)
        self.in_proj.bias.zero_()
        self.out_proj.bias.zero_()

    def forward(self, u_TD: Tensor, context_TD: Tensor | None = None) -> Tensor:
        """The logit of q, (T,) fp32.

        Args:
            u_TD: inputs of the block's FFN.
            context_TD: fp32, what its attention reads evenly; None where the gate sees tokens only.
        """
        seen_TC = u_TD if context_TD is None else torch.cat([u_TD.float(), context_TD], -1)
        return self.out_proj(torch.tanh(self.in_proj(seen_TC)))[:, 0]


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
