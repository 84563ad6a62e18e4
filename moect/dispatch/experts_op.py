"""An operator that is all of the experts at once: what it returns, saves for its backward, and costs.

    NAME(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF, keep) -> y_TD, h_N2F, source_N, position_N, ends_E
    NAME_backward(dy_TD, x_TD, weights_TK, gate_up_E2FD, down_EDF, h_N2F, source_N, position_N, ends_E, needs)
        -> dx_TD, dweights_TK, dgate_up_E2FD, ddown_EDF        those not needed: without rows

`keep` says whether there will be a backward: without one, h_N2F comes back without rows.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

from __future__ import annotations

import torch
from torch import Tensor

from moect.errors import DispatchError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCHEMA = (
    "(Tensor x_TD, Tensor indices_TK, Tensor weights_TK, Tensor gate_up_E2FD, Tensor down_EDF, bool keep)"
    " -> (Tensor y_TD, Tensor h_N2F, Tensor source_N, Tensor position_N, Tensor ends_E)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy_TD, Tensor x_TD, Tensor weights_TK, Tensor gate_up_E2FD, Tensor down_EDF,"
    " Tensor h_N2F, Tensor source_N, Tensor position_N, Tensor ends_E, bool[4] needs)"
    " -> (Tensor dx_TD, Tensor dweights_TK, Tensor dgate_up_E2FD, Tensor ddown_EDF)"
)


def call(name: str, *inputs: Tensor) -> Tensor:
    """y_TD of the operator; what backward needs is kept where there can be one."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return getattr(torch.ops.moect, name)(*inputs, keep)[0]


def define(name: str) -> None:
    """Tell torch how the operator and its backward work on fake tensors, how they differentiate and what they cost."""
    from torch.utils.flop_counter import register_flop_formula

    forward, backward = (getattr(torch.ops.moect, n) for n in (name, f"{name}_backward"))

    def gradients(ctx, dy_TD, *_):
        if torch.is_grad_enabled():  # create_graph=True: the backward is no function of its inputs to autograd
            raise DispatchError("the expert kernels cannot be differentiated twice; use moe.dispatch: reference")
        if dy_TD is None:
            return (None,) * 6
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
        grads = backward(dy_TD, *ctx.saved_tensors, needs)
        dx, dweights, dgate_up, ddown = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return dx, None, dweights, dgate_up, ddown, None

    torch.library.register_fake(f"moect::{name}", _fake)
    torch.library.register_fake(f"moect::{name}_backward", _backward_fake)
    torch.library.register_autograd(f"moect::{name}", gradients, setup_context=_setup_context)
    register_flop_formula(forward)(_flops)
    register_flop_formula(backward)(_backward_flops)


def _fake(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF, keep):
    N, (E, F2, _) = indices_TK.numel(), gate_up_E2FD.shape
    source_N, position_N, ends_E = (indices_TK.new_empty(n, dtype=torch.int32) for n in (N, N, E))
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(N if keep else 0, F2), source_N, position_N, ends_E


def _backward_fake(dy_TD, x_TD, weights_TK, gate_up_E2FD, down_EDF, h_N2F, source_N, position_N, ends_E, needs):
    inputs = (x_TD, weights_TK, gate_up_E2FD, down_EDF)
    return tuple(t.new_empty(t.shape if need else (0, *t.shape[1:])) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx, inputs, output):
    x_TD, _, weights_TK, gate_up_E2FD, down_EDF, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weights_TK, gate_up_E2FD, down_EDF, *saved)


def _flops(x_shape, indices_shape, weights_shape, gate_up_shape, down_shape, *_, **__) -> int:
    (T, K), (_, D, F) = indices_shape, down_shape
    return 2 * T * K * 3 * D * F


def _backward_flops(dy_shape, x_shape, weights_shape, gate_up_shape, down_shape, *rest, **__) -> int:
    (T, K), (_, D, F) = weights_shape, down_shape
    *_, (needs_x, _, needs_gate_up, needs_down) = rest
    # the gradient at the activation is always needed: the weights' own gradient, and all before it, come through it
    return 2 * T * K * D * F * (1 + needs_down + 2 * needs_gate_up + 2 * needs_x)
