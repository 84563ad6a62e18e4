"""The obvious loop over experts: the oracle of every other backend, in any dtype, float64 too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def reference(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """See `moect.dispatch.dispatch`."""
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=sum_dtype)
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD.unbind(0), down_EDF.unbind(0), strict=True)):
        token, slot = (indices_TK == expert).nonzero(as_tuple=True)
        gate, up = (x_TD[token] @ gate_up_2FD.T).chunk(2, dim=-1)
        out = (silu(gate) * up) @ down_DF.T
        y_TD = y_TD.index_add(0, token, out.to(sum_dtype) * weights_TK[token, slot, None].to(sum_dtype))
    return y_TD.to(x_TD.dtype)
