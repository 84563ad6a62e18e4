"""Who takes part: a function of the same tensors with its gradients, or the reason why it is left out.

T tokens, K experts per token, E experts, D width, F expert width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moect.bench.cases import Problem
from moect.dispatch import dispatch, unavailable
from moect.errors import DispatchError

# relative in norm: far above rounding, far below a row or a term that is missing
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
RESULTS = ("output", "gradient of the tokens", "gradient of the weights", "gate_up gradient", "down gradient")


@dataclass(frozen=True)
class Contestant:
    """Something to be timed.

    Attributes:
        kind: `floor`, `moect` or `transformers`.
        forward: the output, without gradients.
        forward_backward: output, and gradients of tokens, weights, gate_up and down; None of the floor.
    """

    name: str
    kind: str
    forward: Callable[[], Tensor]
    forward_backward: Callable[[], tuple[Tensor, ...] | None]


@dataclass(frozen=True)
class LeftOut:
    """A contestant that is not timed, and why."""

    name: str
    kind: str
    reason: str


def differentiated(name: str, kind: str, function: Callable[..., Tensor], problem: Problem, inputs) -> Contestant:
    """A contestant from a differentiable function of the indices and these inputs.

    Args:
        function: of (x_TD, indices_TK, weights_TK, gate_up_E2FD, down_EDF).
        inputs: leaves x_TD, weights_TK, gate_up_E2FD and down_EDF that require a gradient.
    """
    x_TD, weights_TK, gate_up_E2FD, down_EDF = inputs
    call = partial(function, x_TD, problem.indices_TK, weights_TK, gate_up_E2FD, down_EDF)

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    def forward_backward() -> tuple[Tensor, ...]:
        y_TD = call()
        return y_TD.detach(), *torch.autograd.grad(y_TD, inputs, problem.dy_TD)

    return Contestant(name, kind, forward, forward_backward)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same storage, asking for gradients."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def of_backends(names: list[str], problem: Problem) -> list[Contestant | LeftOut]:
    """Our backends, or why they cannot take this problem."""
    inputs = leaves(problem.x_TD, problem.weights_TK, problem.gate_up_E2FD, problem.down_EDF)
    found: list[Contestant | LeftOut] = []
    for name in names:
        if reason := unavailable(name, problem.x_TD, problem.gate_up_E2FD):
            found.append(LeftOut(name, "moect", reason))
        else:
            found.append(differentiated(name, "moect", partial(dispatch, backend=name), problem, inputs))
    return found


def exact_results(problem: Problem) -> tuple[Tensor, ...]:
    """Output and gradients of the obvious loop in float64, on all tokens."""
    tensors = (problem.x_TD, problem.weights_TK, problem.gate_up_E2FD, problem.down_EDF)
    x_TD, *others = inputs = tuple(t.double().requires_grad_() for t in tensors)
    y_TD = dispatch(x_TD, problem.indices_TK, *others, backend="reference")
    return y_TD.detach(), *torch.autograd.grad(y_TD, inputs, problem.dy_TD.double())


def require_agreement(contestant: Contestant, exact: tuple[Tensor, ...], problem: Problem) -> None:
    """Refuse a contestant whose output or gradients are not those of the obvious loop in float64.

    Raises:
        DispatchError: it names the contestant, the tensor and how far off it is.
    """
    bound = BOUNDS[problem.dtype]
    for what, got, right in zip(RESULTS, contestant.forward_backward(), exact, strict=True):
        error = ((got - right).norm() / right.norm()).item() if got.shape == right.shape else float("inf")
        if not error <= bound:  # NaN too
            raise DispatchError(
                f"{contestant.name} is wrong at {problem.shape} in {problem.dtype_name}: its {what} is off by "
                f"{error:.1e} (relative, allowed {bound:.0e}); mend it, or leave it out with --backend"
            )
