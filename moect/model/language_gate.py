"""One gate value a token, from frozen features: does this token need the new-language experts at all?

Two of the three gates; the third, which counts, is in `moect.model.counting_gate`.

Computed once, in the first block that has a module, from features that the module has not touched (only behind tokens
that open it by themselves they have changed, see `moect.model.embeddings`); shared by every block above it. So the
decision is consistent through the network and depends on the past only.

One token tells little of its language, but what each token so far speaks for adds up. `EvidenceGate` adds up, over what
the block's attention sees, a linear function of each token's value there (`moect.model.even_attention`);
`moect.train.gate_start` begins it with what the tokens' frequencies say.

T tokens, D width, C of the context
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moect.errors import UnsupportedModelError

LIMIT = 30.0  # of evidence, below OPEN: thresholds are probabilities, and above this they cannot be told apart
OPEN = 40.0  # the logit at a token that opens the gate by itself: above that of every threshold below 1
PIECE = 2**20  # numbers of a weight that a CPU converts to fp32 at once


class EvidenceGate(nn.Module):
    """q = sigmoid(limited(w · context + a)) in fp32: what the tokens so far speak for, added up.

    For `moe.gate_sees: context`. limited(x) = LIMIT tanh(x / LIMIT), which is x where anything is to be decided.
    """

    highest = LIMIT  # logit that text can reach

    def __init__(self, context: int):
        super().__init__()
        self.evidence = Fp32Linear(context, 1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """A small map without bias, so q starts near 1/2."""
        weight = self.evidence.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        self.evidence.bias.zero_()

    def forward(self, u_TD: Tensor, context_TC: Tensor) -> Tensor:
        """The logit of q, (T,) fp32.

        Args:
            u_TD: not looked at.
            context_TC: fp32, of `context_of`.

        Raises:
            UnsupportedModelError: only some of the attention's heads are here.
        """
        if context_TC.shape[-1] != self.evidence.weight.shape[-1]:
            raise UnsupportedModelError(
                "the language gate adds up what all heads of its block hear, and only some are here: serve without "
                "dividing tensors among GPUs (no --tensor-parallel-size in vLLM)"
            )
        return LIMIT * torch.tanh(self.evidence(context_TC)[:, 0] / LIMIT)


class TokenGate(nn.Module):
    """q = sigmoid(g(u)),  g = D -> D -> tanh -> 1, in fp32: by the token's own features. `moe.gate_sees: token`."""

    highest = float("inf")

    def __init__(self, width: int):
        super().__init__()
        self.in_proj = Fp32Linear(width, width)
        self.out_proj = Fp32Linear(width, 1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Input map with variance 1/D; output map small and without bias, so q starts near 1/2."""
        width = len(self.in_proj.weight)
        self.in_proj.weight.copy_(torch.randn(width, width, generator=generator) * width**-0.5)
        self.out_proj.weight.copy_(torch.randn(1, width, generator=generator) * 0.02)
        self.in_proj.bias.zero_()
        self.out_proj.bias.zero_()

    def forward(self, u_TD: Tensor, context_TC: None = None) -> Tensor:
        """The logit of q, (T,) fp32, from the inputs of the block's FFN."""
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
