"""Which backend computes the experts, and the checks that stand before all of them.

    dispatch(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF) -> y_TD
    y_t = sum_k w_tk * SwiGLU_{indices_tk}(x_t),     SwiGLU_e(x) = down_e (silu(gate_e x) * up_e x)

Every backend is dropless and deterministic, takes any T (0 too), and differentiates tokens, weights and experts.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from moect.dispatch.grouped import grouped, grouped_loops, grouped_unavailable
from moect.dispatch.reference import reference
from moect.dispatch.segments import segments
from moect.errors import DispatchError

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Unavailable = Callable[[Tensor, Tensor], str | None]  # (x_TD, gate_up_E2FD) -> why not, or None

_BACKENDS: dict[str, Backend] = {"reference": reference, "segments": segments, "grouped": grouped}
_UNAVAILABLE: dict[str, Unavailable] = {"grouped": grouped_unavailable}
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "grouped")}  # by device, best first; then segments, which runs anywhere
_told: set[str] = set()
_log = logging.getLogger("moect.dispatch")


def register(name: str, backend: Backend, unavailable: Unavailable | None = None) -> None:
    """Add a backend under a name that `moe.dispatch` can then choose.

    Args:
        name: as in the configuration.
        backend: computes what `dispatch` does, from arguments that have been checked.
        unavailable: says why it cannot take tensors like these, from x_TD and gate_up_E2FD; None where it can.

    Raises:
        DispatchError: the name is `auto`, which means the choice among all.
    """
    if name == "auto":
        raise DispatchError("a backend cannot have the name `auto`; give another")
    _BACKENDS[name] = backend
    _UNAVAILABLE.pop(name, None)
    if unavailable:
        _UNAVAILABLE[name] = unavailable


def backends() -> list[str]:
    """Names of all registered backends."""
    return list(_BACKENDS)


def unavailable(name: str, x_TD: Tensor, gate_up_E2FD: Tensor) -> str | None:
    """Why the backend of that name cannot take tensors like these; None where it can.

    Raises:
        DispatchError: no backend of that name.
    """
    if name not in _BACKENDS:
        raise DispatchError(f"moe.dispatch: no backend `{name}`; there are auto, {', '.join(_BACKENDS)}")
    reason = _UNAVAILABLE.get(name)
    return reason(x_TD, gate_up_E2FD) if reason else None


def choose(name: str, x_TD: Tensor, gate_up_E2FD: Tensor) -> str:
    """The backend that `name` means for tensors like these; what `auto` takes is logged once, with its reasons.

    On a CPU that is `cpu` where it can be compiled; on a GPU `cuda`, else `grouped` where it is fast; else `segments`.
    Only shapes, dtypes and the device of `x_TD` are looked at.

    Raises:
        DispatchError: no backend of that name, or one that cannot take them.
    """
    if name != "auto":
        if reason := unavailable(name, x_TD, gate_up_E2FD):
            raise DispatchError(f"moe.dispatch: `{name}` cannot be used here: {reason}; use auto")
        return name
    chosen, reasons = "segments", []
    for candidate in _AUTO.get(x_TD.device.type, ()):
        if candidate not in _BACKENDS:
            continue
        reason = unavailable(candidate, x_TD, gate_up_E2FD)
        if reason is None and candidate == "grouped":
            reason = grouped_loops(x_TD)
        if reason is None:
            chosen = candidate
            break
        reasons.append(f"not `{candidate}`: {reason}")
    _tell_once(f"experts by `{chosen}` on {x_TD.device.type} in {str(x_TD.dtype)[6:]}", reasons)
    return chosen


def dispatch(
    x_TD: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    backend: str = "auto",
    check_indices: bool | None = None,
) -> Tensor:
    """Send each token through its K experts and sum what they return, weighted.

    Args:
        x_TD: tokens, any floating dtype.
        indices_TK: int64, the experts of each token, in [0, E).
        weights_TK: their weights, of any floating dtype; fp32 as the router gives them.
        gate_up_E2FD: gate and up projections of all experts, dtype of x; rows [0, F) are the gate.
        down_EDF: down projections of all experts, dtype of x.
        backend: `auto`, or a name from `backends()`.
        check_indices: look whether all indices are in range before anything else. None: on a CPU only, because on a
            GPU the host would have to wait; there `cuda` gives NaN to a token with an index out of range.

    Returns:
        y_TD, dtype of x; the weighted sum is taken in fp32 at least.

    Raises:
        DispatchError: shapes, dtypes, devices or indices that do not fit together.
    """
    _check(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)
    if not torch.compiler.is_compiling() and (indices_TK.is_cpu if check_indices is None else check_indices):
        _check_indices(indices_TK, down_EDF.shape[0])
    return _BACKENDS[choose(backend, x_TD, gate_up_E2FD)](x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)


def _check(x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF) -> None:
    if x_TD.dim() != 2 or down_EDF.dim() != 3:
        raise DispatchError(
            f"tokens of shape {tuple(x_TD.shape)}, down projections {tuple(down_EDF.shape)}: "
            "expected (T, D) and (E, D, F)"
        )
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
    if not (x_TD.is_floating_point() and weights_TK.is_floating_point()):
        raise DispatchError(f"tokens are {x_TD.dtype}, weights {weights_TK.dtype}: expected floating point")
    devices = {str(t.device) for t in (x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)}
    if len(devices) > 1:
        raise DispatchError(f"tokens, routing and experts are on {', '.join(sorted(devices))}: expected one device")


def _check_indices(indices_TK: Tensor, num_experts: int) -> None:
    if indices_TK.numel():
        low, high = indices_TK.aminmax()
        if low < 0 or high >= num_experts:
            raise DispatchError(f"expert indices run from {low} to {high}: there are {num_experts} experts")


def _tell_once(choice: str, reasons: list[str]) -> None:
    """The choice once, by the main rank; where better ones had to be passed over a warning, by each node."""
    line = "; ".join([choice, *reasons])
    if line in _told:
        return
    _told.add(line)
    if os.environ.get("LOCAL_RANK" if reasons else "RANK", "0") == "0":
        _log.log(logging.WARNING if reasons else logging.INFO, line)
