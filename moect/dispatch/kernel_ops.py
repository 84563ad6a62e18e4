"""What torch must know of the compiled parts: what they return for fake tensors, and how they differentiate.

    sort_by_expert(indices_TK, E) -> source_N, position_N, ends_E     counting sort, stable; int32
    permute(x_TD, position_N, K) -> x_ND                              each token's row at each of its K positions
    combine(y_ND, position_N, weights_TK or None, K) -> y_TD          weighted sum of each token's rows
    swiglu(h_N2F) -> a_NF                                             silu(gate) * up
    segment_mm(a, b, ends_E) -> products                              one per expert segment; ends on the CPU

`csrc/ops.cpp` has their signatures, `csrc/row_kernels.h` and `csrc/sort_kernels.h` what they compute, on either device.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments in the order of their experts
"""

from __future__ import annotations

import torch


def define() -> None:
    """Register fake kernels and gradients. Called once, when the operators are loaded."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"moect::{name}", fake)
    for name, (setup_context, backward) in _GRADIENTS.items():
        torch.library.register_autograd(f"moect::{name}", backward, setup_context=setup_context)


def _sort_fake(indices_TK, experts):
    N = indices_TK.numel()
    return tuple(indices_TK.new_empty(n, dtype=torch.int32) for n in (N, N, experts))


def _swiglu_backward_fake(da_NF, h_N2F, weights_TK, source_N):
    dweights = da_NF.new_empty(0) if weights_TK is None else torch.empty_like(weights_TK)
    return torch.empty_like(h_N2F), torch.empty_like(da_NF), dweights


def _segment_mm_fake(a, b, ends_E):
    return a.new_empty(a.shape[0], b.shape[2]) if b.dim() == 3 else a.new_empty(len(ends_E), a.shape[0], b.shape[1])


_FAKES = {
    "sort_by_expert": _sort_fake,
    "permute": lambda x_TD, position_N, top_k: x_TD.new_empty(len(position_N), x_TD.shape[1]),
    "combine": lambda y_ND, position_N, weights_TK, top_k: y_ND.new_empty(len(position_N) // top_k, y_ND.shape[1]),
    "combine_backward": lambda dy_TD, y_ND, position_N, weights_TK: (
        torch.empty_like(y_ND),
        torch.empty_like(weights_TK),
    ),
    "swiglu": lambda h_N2F: h_N2F.new_empty(len(h_N2F), h_N2F.shape[1] // 2),
    "swiglu_backward": _swiglu_backward_fake,
    "segment_mm": _segment_mm_fake,
}


def _save_permute(ctx, inputs, output):
    _, position_N, ctx.top_k = inputs
    ctx.save_for_backward(position_N)


def _permute_backward(ctx, dx_ND):
    return torch.ops.moect.combine(dx_ND, *ctx.saved_tensors, None, ctx.top_k), None, None


def _save_combine(ctx, inputs, output):
    y_ND, position_N, weights_TK, ctx.top_k = inputs
    ctx.save_for_backward(position_N, *(() if weights_TK is None else (y_ND, weights_TK)))


def _combine_backward(ctx, dy_TD):
    position_N, *rest = ctx.saved_tensors
    if not rest:
        return torch.ops.moect.permute(dy_TD, position_N, ctx.top_k), None, None, None
    y_ND, weights_TK = rest
    dy_ND, dweights_TK = torch.ops.moect.combine_backward(dy_TD, y_ND, position_N, weights_TK)
    return dy_ND, None, dweights_TK, None


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, da_NF):
    return torch.ops.moect.swiglu_backward(da_NF, *ctx.saved_tensors, None, None)[0]


_GRADIENTS = {
    "permute": (_save_permute, _permute_backward),
    "combine": (_save_combine, _combine_backward),
    "swiglu": (_save_swiglu, _swiglu_backward),
}
