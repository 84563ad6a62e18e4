"""The default on a GPU: our own kernels around grouped products, and nothing kept for backward that can be had again.

    forward     order, permute x -> products with gate_up -> SwiGLU -> products with down -> combine
    backward    permute dy -> da -> SwiGLU's backward -> d_down; permute x -> d_gate_up; dx_ND -> combine

Kept for backward: the order, x and the pre-activation h. Where torch's grouped_mm is one kernel, the host never waits
for the device; elsewhere it waits once each way, for the ends of the experts' segments, and calls one product per
segment. The kernels also run on a CPU, slowly, so that tests there hold for all of this but the speed.

An index out of range makes its token's output NaN, and the gradients of its token and weight too.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moect.dispatch import experts_op, kernel_ops
from moect.dispatch.extension import load, when_loaded
from moect.dispatch.grouped import grouped_loops, grouped_refuses, grouped_unavailable

NAME = "experts_by_kernels"


def cuda_unavailable(x_TD: Tensor, gate_up_E2FD: Tensor) -> str | None:
    """Why this backend is not for tensors like these; None where it is. The first call may compile the kernels."""
    if not x_TD.is_cuda:
        return f"the tokens are on {x_TD.device}"
    if x_TD.dtype not in experts_op.DTYPES:
        return f"it does not take {x_TD.dtype}"
    return load("cuda")


def cuda(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """See `moect.dispatch.dispatch`. Runs on a CPU too, for tests."""
    return experts_op.call(NAME, x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)


def define() -> None:
    """Register the whole as an operator. Called once, when its parts are loaded."""
    torch.library.define(f"moect::{NAME}", experts_op.SCHEMA)
    torch.library.define(f"moect::{NAME}_backward", experts_op.BACKWARD_SCHEMA)
    torch.library.impl(f"moect::{NAME}", ("cpu", "cuda"), _experts)
    torch.library.impl(f"moect::{NAME}_backward", ("cpu", "cuda"), _experts_backward)
    experts_op.define(NAME)


def _experts(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF, keep):
    ops, (T, K) = torch.ops.moect, indices_TK.shape
    E, F2, _ = gate_up_E2FD.shape
    source_N, position_N, ends_E = ops.sort_by_expert(indices_TK, E)
    if T * K == 0:
        return x_TD.new_zeros(x_TD.shape), x_TD.new_empty(0, F2), source_N, position_N, ends_E
    product = _product(x_TD, gate_up_E2FD, down_EDF, ends_E)
    h_N2F = product(ops.permute(x_TD, position_N, K), gate_up_E2FD.transpose(1, 2))
    a_NF = ops.swiglu(h_N2F)
    if not keep:
        h_N2F = x_TD.new_empty(0, F2)
    y_ND = product(a_NF, down_EDF.transpose(1, 2))
    del a_NF
    return ops.combine(y_ND, position_N, weights_TK, K), h_N2F, source_N, position_N, ends_E


def _experts_backward(
    dy_TD, x_TD, weights_TK, gate_up_E2FD, down_EDF, h_N2F, source_N, position_N, ends_E, needs
) -> tuple[Tensor, ...]:
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    ops, (T, K) = torch.ops.moect, weights_TK.shape
    inputs = (x_TD, weights_TK, gate_up_E2FD, down_EDF)
    if T * K == 0:
        return tuple(t.new_zeros(t.shape if need else (0, *t.shape[1:])) for t, need in zip(inputs, needs, strict=True))
    dx_TD, dweights_TK, dgate_up_E2FD, ddown_EDF = (t.new_empty(0, *t.shape[1:]) for t in inputs)
    product = _product(x_TD, gate_up_E2FD, down_EDF, ends_E)
    dy_ND = ops.permute(dy_TD, position_N, K)
    da_NF = product(dy_ND, down_EDF)  # before the token's weight: with the activation, that is the weight's gradient
    dh_N2F, weighted_NF, dweights = ops.swiglu_backward(da_NF, h_N2F, weights_TK, source_N)
    del da_NF
    if needs_weights:
        dweights_TK = dweights
    if needs_down:
        ddown_EDF = product(dy_ND.T, weighted_NF)
    del dy_ND, weighted_NF
    if needs_gate_up:
        dgate_up_E2FD = product(dh_N2F.T, ops.permute(x_TD, position_N, K))
    if needs_x:
        dx_TD = ops.combine(product(dh_N2F, gate_up_E2FD), position_N, None, K)
    return dx_TD, dweights_TK, dgate_up_E2FD, ddown_EDF


def _product(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """One product per expert segment: of (N, I) with (E, I, O), or of (I, N) with (N, O) over each expert's columns."""
    if _one_kernel(x_TD, gate_up_E2FD, down_EDF):
        return lambda a, b: torch.nn.functional.grouped_mm(a, b, offs=ends_E)
    ends = ends_E.cpu()  # the host waits here
    return lambda a, b: torch.ops.moect.segment_mm(a, b, ends)


def _one_kernel(x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> bool:
    reasons = (
        grouped_unavailable(x_TD, gate_up_E2FD),
        grouped_refuses(gate_up_E2FD, down_EDF),
        grouped_loops(x_TD) if x_TD.is_cuda else None,
    )
    return not any(reasons)


when_loaded(kernel_ops.define)
when_loaded(define)
