"""The rivals: the experts of Hugging Face transformers, as its Qwen3-MoE runs them, on the same tensors.

The class is transformers' own, and so is the choice among its implementations; only the weights are ours. They allocate
as PyTorch does for everybody who uses them: on a CPU in small pages, unless THP_MEM_ALLOC_ENABLE is set, where our
kernels and the floor ask for large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moect.bench.cases import Problem
from moect.bench.contestants import Contestant, LeftOut, differentiated, leaves
from moect.dispatch.grouped import grouped_unavailable
from moect.dispatch.transformers_experts import NAME as OUR_NAME
from moect.free_memory import free_bytes

PREFIX = "hf "
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # those that need nothing beyond torch
MEMORY_SHARE = 0.25  # of what is free, that a rival may ask for


def peers(problem: Problem) -> list[Contestant | LeftOut]:
    """transformers' implementations of the experts; of what is registered there beside the three, only the names.

    The routing weights are given in the dtype of the tokens, as transformers' models do.
    """
    room = MEMORY_SHARE * free_bytes(problem.device.type)
    needs = batched_bytes(problem)
    reasons = {"grouped_mm": grouped_unavailable(problem.x_TD, problem.gate_up_E2FD)}
    if needs > room:
        reasons["batched_mm"] = (
            f"it copies the experts' weights for every assignment, {needs / 2**30:.1f} GiB at {problem.shape} "
            f"in {problem.dtype_name}, more than a quarter of the free memory"
        )
    found: list[Contestant | LeftOut] = []
    for implementation in IMPLEMENTATIONS:
        name = PREFIX + implementation
        if reason := reasons.get(implementation):
            found.append(LeftOut(name, "transformers", reason))
        else:
            found.append(_peer(name, implementation, problem))
    reason = f"not one of the three that need no further package ({', '.join(IMPLEMENTATIONS)})"
    return found + [LeftOut(PREFIX + name, "transformers", reason) for name in _others()]


def batched_bytes(problem: Problem) -> int:
    """What batched_mm holds at its highest: gathered gate_up (N, 2F, D) and a gradient as large, in backward.

    In the forward pass it is gate_up and down, (N, 2F, D) and (N, D, F), which is less.
    """
    shape = problem.shape
    return 4 * shape.N * shape.F * shape.D * problem.dtype.itemsize


def _others() -> list[str]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return [name for name in ALL_EXPERTS_FUNCTIONS if name not in (*IMPLEMENTATIONS, OUR_NAME)]


def _peer(name: str, implementation: str, problem: Problem) -> Contestant:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.D,
        moe_intermediate_size=shape.F,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = nn.Parameter(problem.gate_up_E2FD)
    experts.down_proj = nn.Parameter(problem.down_EDF)

    def function(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, *_: Tensor) -> Tensor:
        return experts(x_TD, indices_TK, weights_TK)

    x_TD, weights_TK = leaves(problem.x_TD, problem.weights_TK.to(problem.dtype))
    inputs = (x_TD, weights_TK, experts.gate_up_proj, experts.down_proj)
    return differentiated(name, "transformers", function, problem, inputs)
