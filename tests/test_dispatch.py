"""Every dispatch backend against the obvious loop in float64."""

import pytest
import torch

from moect.dispatch import backends, dispatch, register
from moect.errors import DispatchError

SHAPES = [  # T, D, F, E, K
    (0, 16, 8, 4, 2),
    (1, 16, 8, 1, 1),
    (7, 16, 24, 3, 3),
    (33, 32, 16, 8, 2),
    (20, 8, 8, 64, 8),
]


def problem(T, D, F, E, K, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    indices_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.empty(0, K).long()
    tensors = [rand(T, D), rand(T, K).softmax(-1), rand(E, 2 * F, D) / D**0.5, rand(E, D, F) / F**0.5]
    x, w, up, down = (t.to(dtype).requires_grad_() for t in tensors)
    return x, indices_TK, w, up, down


def run(backend, x, indices, w, up, down):
    y = dispatch(x, indices, w, up, down, backend=backend)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad((y * target).sum(), (x, w, up, down))


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["reference", "segments", "grouped"])
def test_output_and_gradients_agree_with_the_loop_in_float64(backend, shape, dtype, bound):
    x, indices, w, up, down = problem(*shape, dtype)
    exact = run(
        "reference",
        *(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in (x, indices, w, up, down)),
    )
    for got, expected in zip(run(backend, x, indices, w, up, down), exact, strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) < bound


def test_segments_pass_gradcheck_in_float64():
    x, indices, w, up, down = problem(5, 4, 3, 3, 2, torch.float64)
    fn = lambda x, w, up, down: dispatch(x, indices, w, up, down, backend="segments")  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x, w, up, down))


@pytest.mark.parametrize("backend", ["reference", "segments", "grouped"])
def test_an_expert_without_tokens_gets_an_exactly_zero_gradient(backend):
    x, _, w, up, down = problem(12, 16, 8, 4, 1, torch.float32)
    indices = torch.full((12, 1), 2)
    _, _, _, d_up, d_down = run(backend, x, indices, w, up, down)
    for grad in (d_up, d_down):
        assert grad[2].abs().sum() > 0
        assert (grad[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize("backend", ["segments", "grouped"])
def test_two_runs_give_the_same_bits(backend):
    args = problem(64, 32, 16, 8, 2, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run(backend, *args), run(backend, *args), strict=True))


def test_bad_shapes_dtypes_and_indices_are_named():
    x, indices, w, up, down = problem(4, 16, 8, 3, 2, torch.float32)
    with pytest.raises(DispatchError, match=r"expected \(E, 2F, D\)"):
        dispatch(x, indices, w, up[:, :-1], down)
    with pytest.raises(DispatchError, match=r"expected \(T, K\)"):
        dispatch(x, indices[:3], w, up, down)
    with pytest.raises(DispatchError, match="give one dtype"):
        dispatch(x.bfloat16(), indices, w, up, down)
    with pytest.raises(DispatchError, match="there are 3 experts"):
        dispatch(x, indices + 2, w, up, down)
    with pytest.raises(DispatchError, match="no backend `fast`"):
        dispatch(x, indices, w, up, down, backend="fast")


def test_a_registered_backend_is_used():
    calls = []

    def mine(x, *rest):
        calls.append(x.shape)
        return x

    register("mine", mine)
    x, indices, w, up, down = problem(4, 16, 8, 3, 2, torch.float32)
    assert dispatch(x, indices, w, up, down, backend="mine") is x
    assert calls == [(4, 16)] and "mine" in backends()
