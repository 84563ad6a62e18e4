"""Two matrix products over all experts at once, by torch's `grouped_mm`: no wait for the device on the way.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from moect.dispatch.sorting import order_by_expert, sum_to_tokens
from moect.errors import DispatchError


def grouped_unavailable(x_TD: Tensor, gate_up_E2FD: Tensor) -> str | None:
    """Why `grouped_mm` cannot take tensors like these; None where it can."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "torch has no grouped_mm before 2.10"
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"grouped_mm does not take {x_TD.dtype}"
    E, F2, D = gate_up_E2FD.shape
    multiple = 16 // x_TD.element_size()
    if not D or not F2 or D % multiple or (F2 // 2) % multiple:
        return f"grouped_mm needs widths that are multiples of {multiple} in {x_TD.dtype}, got D={D}, F={F2 // 2}"
    if x_TD.is_cuda and E >= 1024:
        return f"on a GPU grouped_mm takes fewer than 1024 experts, got {E}"
    return None


def grouped_refuses(*experts: Tensor) -> str | None:
    """Why `grouped_mm` cannot take experts that lie in memory like these; None where it can."""
    if not all(t.is_contiguous() for t in experts):
        return "grouped_mm needs experts that are contiguous"
    if any(t.is_cuda and t.data_ptr() % 16 for t in experts):
        return "on a GPU grouped_mm needs experts at addresses that are multiples of 16"
    return None


def grouped_loops(x_TD: Tensor) -> str | None:
    """Why `grouped_mm` should not be used on this GPU, though it can; None where it is one kernel."""
    if x_TD.dtype != torch.bfloat16:
        return f"on a GPU grouped_mm is a loop in {x_TD.dtype}, and waits for the device"
    major, minor = torch.cuda.get_device_capability(x_TD.device)
    if major == 10:  # github.com/pytorch/pytorch/issues/172439
        return "on sm100 grouped_mm may give experts without tokens a gradient"
    if major != 9:
        return f"on sm{major}{minor} grouped_mm is a loop, and waits for the device"
    return None


def grouped(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """See `moect.dispatch.dispatch`."""
    if not torch.compiler.is_compiling() and (reason := grouped_refuses(gate_up_E2FD, down_EDF)):
        raise DispatchError(f"moe.dispatch: grouped cannot be used here: {reason}; use segments")
    E, _, F = down_EDF.shape
    order_N, token_N, counts_E = order_by_expert(indices_TK, E)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    h_N2F = torch.nn.functional.grouped_mm(x_TD[token_N], gate_up_E2FD.transpose(1, 2), offs=ends_E)
    a_NF = silu(h_N2F[:, :F]) * h_N2F[:, F:]
    y_ND = torch.nn.functional.grouped_mm(a_NF, down_EDF.transpose(1, 2), offs=ends_E)
    w_N1 = weights_TK.reshape(-1)[order_N, None]
    return sum_to_tokens(y_ND * w_N1, order_N, indices_TK.shape).to(x_TD.dtype)
