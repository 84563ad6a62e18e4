"""One matrix product per expert segment, written straight into its place, in torch alone: runs anywhere.

A single autograd.Function, because autograd over `weight[e]` would write a full-size zero gradient per expert. It saves
the tokens and the pre-activation, recomputes the activation, and gives an expert without tokens an exactly zero
gradient.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from moect.dispatch.sorting import order_by_expert, sum_to_tokens
from moect.errors import DispatchError


def segments(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """See `moect.dispatch.dispatch`."""
    return _Segments.apply(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)


def _segments_of(counts: list[int]):
    """(expert, slice) of every expert that has tokens."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF):
        E, D, F = down_EDF.shape
        order_N, token_N, counts_E = order_by_expert(indices_TK, E)
        counts = counts_E.tolist()
        N = len(order_N)

        x_ND = x_TD[token_N]
        h_N2F = x_TD.new_empty(N, 2 * F)
        for e, rows in _segments_of(counts):
            torch.mm(x_ND[rows], gate_up_E2FD[e].T, out=h_N2F[rows])
        a_NF = silu(h_N2F[:, :F]).mul_(h_N2F[:, F:])
        y_ND = x_TD.new_empty(N, D)
        for e, rows in _segments_of(counts):
            torch.mm(a_NF[rows], down_EDF[e].T, out=y_ND[rows])
        w_N1 = weights_TK.reshape(-1)[order_N, None]
        y_TD = sum_to_tokens(y_ND * w_N1, order_N, indices_TK.shape)

        ctx.save_for_backward(x_TD, order_N, w_N1, h_N2F, gate_up_E2FD, down_EDF)
        ctx.counts, ctx.shape_TK = counts, indices_TK.shape
        return y_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx, dy_TD):
        if torch.is_grad_enabled():  # create_graph=True
            raise DispatchError("`segments` cannot be differentiated twice; use moe.dispatch: reference")
        x_TD, order_N, w_N1, h_N2F, gate_up_E2FD, down_EDF = ctx.saved_tensors
        counts, shape_TK = ctx.counts, ctx.shape_TK
        needs_x, _, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad
        D, F = down_EDF.shape[1:]
        N = len(order_N)
        dtype = x_TD.dtype
        token_N = order_N // max(shape_TK[1], 1)

        dy_ND = dy_TD[token_N]
        s_NF = torch.sigmoid(h_N2F[:, :F])
        silu_NF = s_NF * h_N2F[:, :F]
        a_NF = silu_NF * h_N2F[:, F:]

        d_down_EDF = None
        if needs_down:
            d_down_EDF = torch.empty_like(down_EDF)
            weighted_NF = (a_NF * w_N1).to(dtype)
            for e, rows in _segments_of(counts):
                torch.mm(dy_ND[rows].T, weighted_NF[rows], out=d_down_EDF[e])
            _zero_idle(d_down_EDF, counts)

        # gradient at the activation, before the token's weight is put on it: that product is the weight's own gradient
        da_NF = torch.empty_like(a_NF)
        for e, rows in _segments_of(counts):
            torch.mm(dy_ND[rows], down_EDF[e], out=da_NF[rows])
        d_weights_TK = None
        if needs_weights:
            d_w_N = (da_NF * a_NF).sum(1, dtype=torch.promote_types(dtype, torch.float32))
            d_weights_TK = torch.empty_like(w_N1[:, 0])
            d_weights_TK[order_N] = d_w_N.to(w_N1.dtype)
            d_weights_TK = d_weights_TK.view(shape_TK)
        da_NF = (da_NF * w_N1).to(dtype)

        dh_N2F = torch.empty_like(h_N2F)
        torch.mul(da_NF, silu_NF, out=dh_N2F[:, F:])
        da_NF.mul_(h_N2F[:, F:])
        dh_N2F[:, :F] = da_NF.mul_(s_NF + silu_NF - s_NF * silu_NF)  # silu' = s + silu·(1 - s)

        d_gate_up_E2FD = None
        if needs_gate_up:
            d_gate_up_E2FD = torch.empty_like(gate_up_E2FD)
            x_ND = x_TD[token_N]
            for e, rows in _segments_of(counts):
                torch.mm(dh_N2F[rows].T, x_ND[rows], out=d_gate_up_E2FD[e])
            _zero_idle(d_gate_up_E2FD, counts)

        dx_TD = None
        if needs_x:
            dx_ND = dy_ND.new_empty(N, D)
            for e, rows in _segments_of(counts):
                torch.mm(dh_N2F[rows], gate_up_E2FD[e], out=dx_ND[rows])
            dx_TD = sum_to_tokens(dx_ND, order_N, shape_TK).to(dtype)
        return dx_TD, None, d_weights_TK, d_gate_up_E2FD, d_down_EDF


def _zero_idle(grad_EXX: Tensor, counts: list[int]) -> None:
    for expert, count in enumerate(counts):
        if not count:
            grad_EXX[expert].zero_()
