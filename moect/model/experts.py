"""The experts of one block: stacked SwiGLU FFNs, in the layout that Hugging Face and the fast kernels use.

T tokens, K experts per token, E experts, D width, F expert width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moect.dispatch import choose, dispatch


class Experts(nn.Module):
    """E SwiGLU experts as two stacked tensors: gate_up_proj (E, 2F, D), gate rows first, and down_proj (E, D, F)."""

    def __init__(self, experts: int, width: int, expert_width: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.shape = (experts, expert_width, width)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * expert_width, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, expert_width))

    def forward(self, u_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, (T, D) in the dtype of u."""
        return dispatch(u_TD, indices_TK, weights_TK, self.gate_up_proj, self.down_proj, backend=self.backend)

    def choose(self) -> str:
        """The backend that will compute these experts where they are; `auto` compiles kernels and logs its choice."""
        E, F, D = self.shape
        x_TD = self.down_proj.new_empty(0, D)
        return choose(self.backend, x_TD, torch.empty(E, 2 * F, D, device="meta"))  # a divided parameter has no shape

    @torch.no_grad()
    def copy_from(self, ffn: nn.Module) -> None:
        """Make every expert an exact copy of a Hugging Face SwiGLU FFN of the same width."""
        gate_up_2FD = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])
        self.gate_up_proj.copy_(gate_up_2FD.expand_as(self.gate_up_proj))
        self.down_proj.copy_(ffn.down_proj.weight.expand_as(self.down_proj))

    @torch.no_grad()
    def start_silent(self, generator: torch.Generator) -> None:
        """Random gate and up projections, variance 1/D, and a zero down projection: the experts return exactly 0."""
        noise = torch.randn(self.gate_up_proj.shape, generator=generator) * self.gate_up_proj.shape[-1] ** -0.5
        self.gate_up_proj.copy_(noise)
        self.down_proj.zero_()
