"""The default on a CPU: all of it in one compiled operator, `csrc/cpu_experts.cpp`; `segments` is its slow twin.

T tokens, K experts per token, E experts, D width, F expert width
"""

from __future__ import annotations

from torch import Tensor

from moect.dispatch import experts_op
from moect.dispatch.extension import load, when_loaded


def cpu_unavailable(x_TD: Tensor, gate_up_E2FD: Tensor) -> str | None:
    """Why this backend cannot take tensors like these; None where it can. The first call may compile the kernels."""
    if not x_TD.is_cpu:
        return f"the tokens are on {x_TD.device}"
    if x_TD.dtype not in experts_op.DTYPES:
        return f"it does not take {x_TD.dtype}"
    return load("cpu")


def cpu(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """See `moect.dispatch.dispatch`."""
    return experts_op.call("experts", x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF)


when_loaded(lambda: experts_op.define("experts"))
