"""Random dispatch problems, and a backend's answer to one, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from moect.dispatch import dispatch


def problem(T: int, D: int, F: int, E: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Tokens, indices, weights, gate-and-up and down projections; all but the indices want gradients."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    indices_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.empty(0, K).long()
    tensors = [rand(T, D), rand(T, K).softmax(-1), rand(E, 2 * F, D) / D**0.5, rand(E, D, F) / F**0.5]
    x, w, up, down = (t.to(dtype).requires_grad_() for t in tensors)
    return x, indices_TK, w, up, down


def run(backend: str, x, indices, w, up, down) -> tuple[Tensor, ...]:
    """The output, and the gradients of tokens, weights and experts for a fixed gradient of the output."""
    y = dispatch(x, indices, w, up, down, backend=backend)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad((y * target).sum(), (x, w, up, down))


def relative(a: Tensor, b: Tensor) -> float:
    """How far a is from b, in norm, as a share of b's."""
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()
