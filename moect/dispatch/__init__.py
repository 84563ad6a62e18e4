"""Tokens to experts and back: one signature, several backends, one obvious reference.

    dispatch(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF) -> y_TD
    y_t = sum_k weights_tk * SwiGLU_{indices_tk}(x_t),     SwiGLU_e(x) = down_e (silu(gate_e x) * up_e x)

Every backend is dropless and deterministic, takes any T (0 too), and differentiates tokens, weights and experts.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moect.dispatch.grouped import grouped, grouped_unavailable
from moect.dispatch.reference import reference
from moect.dispatch.segments import segments
from moect.errors import DispatchError

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_BACKENDS: dict[str, Backend] = {"reference": reference, "segments": segments, "grouped": grouped}


def register(name: str, backend: Backend) -> None:
    """Add a backend under a name that `moe.dispatch` can then choose."""
    _BACKENDS[name] = backend


def backends() -> list[str]:
    """Names of all registered backends."""
    return list(_BACKENDS)


def choose(name: str, x_TD: Tensor, gate_up_E2FD: Tensor) -> str:
    """The backend that `name` means for tensors like these: `auto` is `grouped` where it is fast, else `segments`.

    Raises:
        DispatchError: no backend of that name.
    """
    if name == "auto":
        fast = x_TD.is_cuda and grouped_unavailable(x_TD, gate_up_E2FD) is None
        return "grouped" if fast else "segments"
    if name not in _BACKENDS:
        raise DispatchError(f"moe.dispatch: no backend `{name}`; there are auto, {', '.join(_BACKENDS)}")
    return name


def dispatch(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Send each token through its K experts and sum what they return, weighted.

    Args:
        x_TD: tokens, any floating dtype.
        indices_TK: int64, the experts of each token, in [0, E), no expert twice for one token.
        weights_TK: fp32 (or the dtype of x), their weights.
        gate_up_E2FD: gate and up projections of all experts, dtype of x; rows [0, F) are the gate.
        down_EDF: down projections of all experts, dtype of x.
        backend: `auto`, or a name from `backends()`.

    Returns:
        y_TD, dtype of x; the weighted sum is taken in fp32 at least.

    Raises:
        DispatchError: shapes or dtypes that do not fit together.
    """
    _check(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)
    return _BACKENDS[choose(backend, x_TD, gate_up_E2FD)](x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)


def _check(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF) -> None:
    T, D = x_TD.shape
    E, F = down_EDF.shape[0], down_EDF.shape[-1]
    if gate_up_E2FD.shape != (E, 2 * F, D) or down_EDF.shape != (E, D, F):
        raise DispatchError(
            f"experts of shape {tuple(gate_up_E2FD.shape)} and {tuple(down_EDF.shape)} for tokens of width {D}: "
            "expected (E, 2F, D) and (E, D, F)"
        )
    if indices_TK.shape != weights_TK.shape or indices_TK.dim() != 2 or indices_TK.shape[0] != T:
        raise DispatchError(
            f"indices {tuple(indices_TK.shape)} and weights {tuple(weights_TK.shape)} for {T} tokens: expected (T, K)"
        )
    if indices_TK.dtype != torch.int64:
        raise DispatchError(f"indices are {indices_TK.dtype}: expected torch.int64")
    if not x_TD.dtype == gate_up_E2FD.dtype == down_EDF.dtype:
        raise DispatchError(
            f"tokens are {x_TD.dtype}, experts {gate_up_E2FD.dtype} and {down_EDF.dtype}: give one dtype"
        )
    if indices_TK.device.type == "cpu" and indices_TK.numel():  # on a GPU this would wait for the device
        low, high = indices_TK.aminmax()
        if low < 0 or high >= E:
            raise DispatchError(f"expert indices run from {low} to {high}: there are {E} experts")
