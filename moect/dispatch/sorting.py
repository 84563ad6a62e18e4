"""Order the assignments by expert, so that each expert's tokens are one contiguous segment.

T tokens, K experts per token, E experts, N = T·K assignments
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Assignments in the order of their experts.

    Attributes:
        order_N: int64, position in (T, K) of the n-th assignment; stable, so tokens ascend within an expert.
        token_N: int64, its token.
        counts_E: int64, assignments of each expert.
    """

    order_N: Tensor
    token_N: Tensor
    counts_E: Tensor


def order_by_expert(indices_TK: Tensor, num_experts: int) -> Order:
    """The stable order of all assignments by expert."""
    expert_N, order_N = indices_TK.reshape(-1).sort(stable=True)
    token_N = order_N // max(indices_TK.shape[1], 1)
    # bincount has no deterministic CUDA form; the sorted keys give the same by bisection
    edges = torch.searchsorted(expert_N, torch.arange(num_experts + 1, device=expert_N.device))
    return Order(order_N, token_N, edges.diff())


def sum_to_tokens(y_ND: Tensor, order_N: Tensor, shape_TK: torch.Size) -> Tensor:
    """Undo the order and add up each token's K rows, in fp32 at least: deterministic, without atomics."""
    y_TKD = torch.empty_like(y_ND)
    y_TKD[order_N] = y_ND
    y_TKD = y_TKD.view(*shape_TK, y_ND.shape[-1])
    return y_TKD.sum(1, dtype=torch.promote_types(y_ND.dtype, torch.float32))
