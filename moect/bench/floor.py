"""The floor of every dispatch: its matrix products, one per expert segment of the actual routing, and nothing else.

    forward    h = x gate_up^T,  y = a down^T
    backward   d_down = dy^T a,  da = dy down,  d_gate_up = dh^T x,  dx = dh gate_up

The inputs are gathered, and a and dh computed, before anything is timed; the outputs have their place already, on large
pages where the system has them. So the floor has no gather, no activation, no combination, no allocation and no page
fault: what is above it is the price of those.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments in the order of their experts
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from moect.bench.cases import Problem
from moect.bench.large_pages import zeros
from moect.dispatch.sorting import order_by_expert


class Floor:
    """The matrix products of a problem, with the numbers that a real forward and backward pass would have.

    Attributes:
        order_N, token_N: where each row comes from, see `moect.dispatch.sorting.Order`.
        x_ND, a_NF, dy_ND, dh_N2F: inputs; dy_ND has the routing weight in it.
        h_N2F, y_ND, d_down_EDF, da_NF, d_gate_up_E2FD, dx_ND: outputs. An idle expert's gradient is zero.
    """

    def __init__(self, problem: Problem):
        self.gate_up_E2FD, self.down_EDF = problem.gate_up_E2FD, problem.down_EDF
        E, D, F = problem.down_EDF.shape
        order_N, self.token_N, counts_E = order_by_expert(problem.indices_TK, E)
        self.order_N = order_N
        ends = counts_E.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.segments = [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]

        N = len(order_N)
        shapes = {"x_ND": (N, D), "a_NF": (N, F), "dy_ND": (N, D), "dh_N2F": (N, 2 * F)}
        shapes |= {"h_N2F": (N, 2 * F), "y_ND": (N, D), "da_NF": (N, F), "dx_ND": (N, D)}
        shapes |= {"d_gate_up_E2FD": (E, 2 * F, D), "d_down_EDF": (E, D, F)}
        for name, tensor in zip(shapes, zeros(problem.x_TD, *shapes.values()), strict=True):
            setattr(self, name, tensor)

        self.x_ND.copy_(problem.x_TD[self.token_N])
        self._up()
        h_N2F = self.h_N2F.clone().requires_grad_()
        a_NF = silu(h_N2F[:, :F]) * h_N2F[:, F:]
        self.a_NF.copy_(a_NF.detach())
        w_N1 = problem.weights_TK.reshape(-1)[order_N, None]
        self.dy_ND.copy_(problem.dy_TD[self.token_N] * w_N1)
        self._down_gradient()
        self.dh_N2F.copy_(torch.autograd.grad(a_NF, h_N2F, self.da_NF)[0])

    def forward(self) -> Tensor:
        """Two products a segment; returns y_ND, neither weighted nor summed."""
        self._up()
        for e, rows in self.segments:
            torch.mm(self.a_NF[rows], self.down_EDF[e].T, out=self.y_ND[rows])
        return self.y_ND

    def backward(self) -> None:
        """Four products a segment."""
        for e, rows in self.segments:
            torch.mm(self.dy_ND[rows].T, self.a_NF[rows], out=self.d_down_EDF[e])
        self._down_gradient()
        for e, rows in self.segments:
            torch.mm(self.dh_N2F[rows].T, self.x_ND[rows], out=self.d_gate_up_E2FD[e])
        for e, rows in self.segments:
            torch.mm(self.dh_N2F[rows], self.gate_up_E2FD[e], out=self.dx_ND[rows])

    def forward_backward(self) -> None:
        """All six."""
        self.forward()
        self.backward()

    def _up(self) -> None:
        for e, rows in self.segments:
            torch.mm(self.x_ND[rows], self.gate_up_E2FD[e].T, out=self.h_N2F[rows])

    def _down_gradient(self) -> None:
        for e, rows in self.segments:
            torch.mm(self.dy_ND[rows], self.down_EDF[e], out=self.da_NF[rows])
