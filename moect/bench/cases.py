"""What a benchmark of the dispatch runs on: shapes, and tensors of a shape drawn from a seed.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moect.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """One mixture of experts: T tokens of width D, each through K of E experts of width F."""

    T: int
    D: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @property
    def N(self) -> int:
        """Assignments of a token to an expert."""
        return self.T * self.K

    def flops(self, backward: bool) -> int:
        """Of the matrix products alone: a multiplication and an addition are two."""
        return 2 * self.N * 3 * self.D * self.F * (3 if backward else 1)


CPU_SHAPES = (
    Shape(2048, 512, 1024, 8, 2),
    Shape(2048, 512, 256, 32, 4),
    Shape(256, 512, 128, 64, 8),
    Shape(4096, 1024, 3072, 4, 2),
    Shape(16, 512, 256, 32, 4),
)
CUDA_SHAPES = (Shape(16384, 2048, 1024, 32, 4), Shape(16384, 4096, 2048, 8, 2))


@dataclass(frozen=True)
class Problem:
    """Tensors that all contestants of a shape and dtype share; none of them requires a gradient.

    Attributes:
        indices_TK: int64.
        weights_TK: fp32, positive, each token's sum to 1.
        dy_TD: the gradient that arrives at the output.
    All others are in the dtype of the case.
    """

    shape: Shape
    dtype_name: str
    x_TD: Tensor
    indices_TK: Tensor
    weights_TK: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    dy_TD: Tensor

    @property
    def result_bytes(self) -> int:
        """Of the output and the gradients, which every contestant has to hold in the end."""
        inputs = (self.x_TD, self.weights_TK, self.gate_up_E2FD, self.down_EDF)
        return self.dy_TD.nbytes + sum(tensor.nbytes for tensor in inputs)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_TD.dtype

    @property
    def device(self) -> torch.device:
        return self.x_TD.device


def parse_shape(text: str) -> Shape:
    """`T,D,F,E,K` as a shape.

    Raises:
        ConfigError: not five positive whole numbers, or K above E.
    """
    try:
        shape = Shape(*map(int, text.split(",")))
    except (ValueError, TypeError):
        shape = None
    if shape is None or min(shape) < 1:
        raise ConfigError(f"--shape {text}: expected T,D,F,E,K, five whole numbers from 1, as in 2048,512,1024,8,2")
    if shape.K > shape.E:
        raise ConfigError(f"--shape {text}: a token goes to K={shape.K} experts, but there are E={shape.E}; lower K")
    return shape


def make_problem(shape: Shape, dtype_name: str, device: str, seed: int = 0, skew: float = 0.0) -> Problem:
    """Tensors of a shape: the same numbers on every device, up to the rounding to the dtype.

    Each token goes to the K largest of E normal logits, which is nearly balanced, as a trained router is; `skew` times
    one normal number an expert is added to them for a router that is not.
    """
    T, D, F, E, K = shape
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    logits_TK, indices_TK = (normal(T, E) + skew * normal(E)).topk(K)
    place = {"device": device, "dtype": DTYPES[dtype_name]}
    return Problem(
        shape=shape,
        dtype_name=dtype_name,
        x_TD=normal(T, D).to(**place),
        indices_TK=indices_TK.to(device),
        weights_TK=logits_TK.softmax(-1).to(device),
        gate_up_E2FD=normal(E, 2 * F, D).div_(D**0.5).to(**place),
        down_EDF=normal(E, D, F).div_(F**0.5).to(**place),
        dy_TD=normal(T, D).to(**place),
    )


def needed_bytes(shape: Shape, dtype_name: str) -> int:
    """A rough lower bound of what a case needs at once: its tensors and the float64 check with its gradients."""
    T, D, F, E, _ = shape
    weights, activations = 3 * E * D * F, shape.N * (3 * D + 6 * F)
    return (weights + activations) * DTYPES[dtype_name].itemsize + (2 * weights + activations) * 8
