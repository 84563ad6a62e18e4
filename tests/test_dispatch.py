"""Every dispatch backend against the obvious loop in float64."""

import logging
import random

import pytest
import torch
from dispatch_problems import problem, relative, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moect.dispatch import backends, choose, dispatch, register, registry, unavailable
from moect.dispatch.extension import load
from moect.errors import DispatchError

SHAPES = [  # T, D, F, E, K
    (0, 16, 8, 4, 2),
    (1, 16, 8, 1, 1),
    (7, 16, 24, 3, 3),
    (33, 32, 16, 8, 2),
    (20, 8, 8, 64, 8),
    (64, 8, 16, 256, 4),
]
FAST = ["segments", "grouped", "cpu"]


def exact(args):
    """The loop, in float64, on the same numbers."""
    return run("reference", *(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_output_and_gradients_agree_with_the_loop_in_float64(backend, shape, dtype, bound):
    args = problem(*shape, dtype)
    for got, expected in zip(run(backend, *args), exact(args), strict=True):
        assert got.shape == expected.shape
        assert relative(got, expected) < bound


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", ["segments", "cpu"])
def test_random_shapes_and_routings_agree_with_the_loop(backend, seed):
    """Widths that are no multiple of anything, idle experts, one expert with nearly all tokens."""
    rng = random.Random(seed)
    E = rng.choice([1, 2, 5, 16, 100])
    shape = (rng.randrange(200), rng.randrange(1, 70), rng.randrange(1, 70), E, rng.randrange(1, min(E, 6) + 1))
    x, indices, w, up, down = problem(*shape, torch.float32, seed=seed)
    if seed % 3 == 0:
        most = torch.rand(indices.shape, generator=torch.Generator().manual_seed(seed)) < 0.9
        indices = torch.where(most, indices[:1].expand_as(indices), indices)
    args = (x, indices, w, up, down)
    for got, expected in zip(run(backend, *args), exact(args), strict=True):
        assert relative(got, expected) < 2e-6


@pytest.mark.parametrize("backend", ["segments", "cpu"])
def test_backends_pass_gradcheck_in_float64(backend):
    x, indices, w, up, down = problem(5, 4, 3, 3, 2, torch.float64)
    fn = lambda x, w, up, down: dispatch(x, indices, w, up, down, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x, w, up, down))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_an_expert_without_tokens_gets_an_exactly_zero_gradient(backend):
    x, _, w, up, down = problem(12, 16, 8, 4, 1, torch.float32)
    indices = torch.full((12, 1), 2)
    _, _, _, d_up, d_down = run(backend, x, indices, w, up, down)
    for grad in (d_up, d_down):
        assert grad[2].abs().sum() > 0
        assert (grad[[0, 1, 3]] == 0).all()


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("shape", [(64, 32, 16, 8, 2), (24, 13, 9, 8, 1), (48, 512, 257, 16, 1)], ids=str)
@pytest.mark.parametrize("backend", ["segments", "grouped", "cpu"])
def test_the_same_input_gives_the_same_bits_whichever_thread_takes_which_expert(backend, shape, number, threads):
    args = problem(*shape, torch.float32)
    if unavailable(backend, args[0], args[3]):
        pytest.skip("not for these widths")
    threads(number)
    first = run(backend, *args)
    for _ in range(30 if backend == "cpu" else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(backend, *args), strict=True))


@pytest.mark.parametrize("tokens_of_first", [0, 60, 300], ids=["even", "uneven", "all-on-one"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
def test_any_number_of_threads_shares_out_the_experts_without_changing_the_result(
    tokens_of_first, dtype, bound, threads
):
    x, indices, w, up, down = args = problem(300, 24, 40, 7, 2, dtype)
    indices[:tokens_of_first] = torch.tensor([3, 3])
    expected = exact(args)
    for number in (1, 2, 5, 9):
        threads(number)
        for got, truth in zip(run("cpu", *args), expected, strict=True):
            assert relative(got, truth) < bound


def test_a_long_segment_is_done_by_all_threads_together_and_the_short_ones_apart(threads):
    x, indices, w, up, down = args = problem(2600, 16, 24, 9, 1, torch.float32)
    indices[:1100] = 4
    expected = exact(args)
    for number in (1, 2, 4):
        threads(number)
        assert all(relative(a, b) < 1e-6 for a, b in zip(run("cpu", *args), expected, strict=True))


def test_inference_mode_is_served_on_several_threads(threads):
    args = [t.detach() for t in problem(60, 16, 24, 5, 2, torch.float32)]
    threads(3)
    with torch.inference_mode():
        y = dispatch(*args, backend="cpu")
    assert relative(y, dispatch(*args, backend="reference").double()) < 1e-6


@pytest.mark.parametrize("backend", FAST)
def test_extreme_gates_are_as_in_the_loop(backend):
    """silu is 0 far below zero and x far above; nothing overflows on the way."""
    gates = torch.tensor([-1e38, -1e4, -100.0, -89.0, -88.5, -88.0, -87.0, -50.0, 0.0, 50.0, 88.0, 89.0, 1e4, 1e18])
    x = torch.zeros(len(gates), 8)
    x[:, 0], x[:, 1] = gates, 1.0
    up = torch.zeros(1, 16, 8)
    up[0, :8, 0], up[0, 8:, 1] = 1.0, 1.0  # gate = x_0, up = 1
    down = torch.zeros(1, 8, 8)
    down[0, 0, 0] = 1.0
    args = (x, torch.zeros(len(gates), 1).long(), torch.ones(len(gates), 1))
    got, truth = (dispatch(*args, up, down, backend=b)[:, 0] for b in (backend, "reference"))
    assert (got - truth).abs().le(1e-6 * truth.abs() + 1e-30).all()


@pytest.mark.parametrize("backend", ["segments", "cpu", "cuda"])
def test_differentiating_twice_is_refused_and_not_silently_wrong(backend, monkeypatch):
    monkeypatch.setitem(registry._UNAVAILABLE, "cuda", lambda x, up: load("cpu"))
    x, indices, w, up, down = problem(6, 16, 8, 3, 2, torch.float32)
    y = dispatch(x, indices, w, up, down, backend=backend)
    with pytest.raises(DispatchError, match="differentiated twice"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_grouped_can_be_differentiated_twice():
    second = []
    for backend in ("grouped", "reference"):
        x, indices, w, up, down = problem(6, 16, 8, 3, 2, torch.float32)
        y = dispatch(x, indices, w, up, down, backend=backend)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(g.square().sum() + y.square().sum(), (x, w, up, down)))
    assert all(relative(a, b) < 1e-5 for a, b in zip(*second, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_only_wanted_gradients_are_computed_and_they_are_the_same(backend, wanted):
    x, indices, *rest = problem(40, 16, 24, 4, 2, torch.float32)
    all_of_them = run(backend, x, indices, *rest)[1:]
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, *rest))]
    y = dispatch(leaves[0], indices, *leaves[1:], backend=backend)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    (y * target).sum().backward()
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, all_of_them[i]) if i in wanted else leaf.grad is None


def test_without_gradients_the_result_has_the_same_bits_and_nothing_is_kept():
    args = problem(40, 16, 24, 4, 2, torch.bfloat16)
    bare = [t.detach() for t in args]
    with Outputs() as with_grad:
        y = dispatch(*args, backend="cpu")
    for inputs, mode in ((args, torch.no_grad()), (bare, torch.enable_grad())):
        with mode, Outputs() as without_grad:
            again = dispatch(*inputs, backend="cpu")
        assert torch.equal(y, again) and not again.requires_grad
        assert with_grad.kept == [80 * 48] and without_grad.kept == [0]


class Outputs(TorchDispatchMode):
    """How many numbers of h the compiled operator returned, for each call."""

    def __enter__(self):
        self.kept = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.moect.experts.default:
            self.kept.append(out[1].numel())
        return out


def test_weights_of_either_dtype_are_taken_and_their_gradient_is_of_that_dtype():
    x, indices, w, up, down = problem(40, 16, 24, 4, 2, torch.bfloat16)
    for weights in (w.detach().float().requires_grad_(), w):
        for backend in FAST:
            y, _, d_w, *_ = run(backend, x, indices, weights, up, down)
            assert y.dtype == torch.bfloat16 and d_w.dtype == weights.dtype


def test_strided_tokens_weights_and_experts_are_taken():
    x, indices, w, up, down = problem(20, 16, 8, 4, 2, torch.float32)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in (x, w, up, down)]
    for plain, other in zip(
        run("cpu", x, indices, w, up, down), run("cpu", strided[0], indices, *strided[1:]), strict=True
    ):
        assert relative(other, plain.double()) < 1e-6


def test_operators_keep_the_promises_that_torch_compile_relies_on():
    args = problem(20, 16, 8, 4, 2, torch.float32)
    dispatch(*args, backend="cpu")
    torch.library.opcheck(torch.ops.moect.experts, (*args, True))


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_compiling_breaks_no_graph_and_changes_no_bit(backend):
    args = problem(20, 16, 8, 4, 2, torch.float32)
    inner = lambda *a: dispatch(*a, backend=backend).sin()  # noqa: E731
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    leaves = (args[0], *args[2:])
    expected, got = inner(*args), compiled(*args)
    assert torch.equal(expected, got)
    grads = [torch.autograd.grad(y.sum(), leaves) for y in (expected, got)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", ["segments", "cpu"])
def test_floating_point_operations_are_those_of_the_assignments_and_no_more(backend):
    T, D, F, E, K = 40, 16, 24, 4, 2
    args = problem(T, D, F, E, K, torch.float32)
    with FlopCounterMode(display=False) as forward:
        y = dispatch(*args, backend=backend)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * T * K * 3 * D * F
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_bad_shapes_dtypes_and_indices_are_named():
    x, indices, w, up, down = problem(4, 16, 8, 3, 2, torch.float32)
    with pytest.raises(DispatchError, match=r"expected \(E, 2F, D\)"):
        dispatch(x, indices, w, up[:, :-1], down)
    with pytest.raises(DispatchError, match=r"expected \(T, D\)"):
        dispatch(x[None], indices, w, up, down)
    with pytest.raises(DispatchError, match=r"expected \(T, K\)"):
        dispatch(x, indices[:3], w, up, down)
    with pytest.raises(DispatchError, match="give one dtype"):
        dispatch(x.bfloat16(), indices, w, up, down)
    with pytest.raises(DispatchError, match="expected floating point"):
        dispatch(x, indices, indices, up, down)
    with pytest.raises(DispatchError, match=r"expected torch\.int64"):
        dispatch(x, indices.int(), w, up, down)
    with pytest.raises(DispatchError, match="there are 3 experts"):
        dispatch(x, indices + 2, w, up, down)
    with pytest.raises(DispatchError, match="run from -1"):
        dispatch(x, indices - 1, w, up, down)
    with pytest.raises(DispatchError, match="expected one device"):
        dispatch(x.to("meta"), indices, w, up, down)
    with pytest.raises(DispatchError, match="no backend `fast`"):
        dispatch(x, indices, w, up, down, backend="fast")


def test_the_compiled_operator_itself_refuses_an_index_out_of_range():
    x, indices, w, up, down = problem(4, 16, 8, 3, 2, torch.float32)
    dispatch(x, indices, w, up, down, backend="cpu")
    for wrong in (indices + 2, indices - 1):
        with pytest.raises(IndexError, match="of 3"):
            torch.ops.moect.experts(x, wrong, w, up, down, True)


def test_the_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    monkeypatch.setattr(registry, "_told", set())
    monkeypatch.setitem(registry._UNAVAILABLE, "cpu", lambda x, up: "there is no compiler")
    x, _, _, up, _ = problem(4, 16, 8, 3, 2, torch.float32)
    with caplog.at_level(logging.INFO, "moect.dispatch"):
        assert [choose("auto", x, up) for _ in range(3)] == ["segments"] * 3
    assert caplog.messages == ["experts by `segments` on cpu in float32; not `cpu`: there is no compiler"]


def test_backends_say_why_they_cannot_take_tensors():
    x, _, _, up, _ = problem(4, 17, 8, 3, 2, torch.float32)
    assert unavailable("segments", x, up) is None
    assert "multiples of 4" in unavailable("grouped", x, up)
    assert "on meta" in unavailable("cpu", x.to("meta"), up)
    with pytest.raises(DispatchError, match="no backend `fast`"):
        unavailable("fast", x, up)


def test_a_backend_that_was_asked_for_and_cannot_serve_is_an_error_with_the_reason():
    x, indices, w, up, down = problem(4, 17, 8, 3, 2, torch.float32)
    with pytest.raises(DispatchError, match="`grouped` cannot be used here: .*multiples of 4.*; use auto"):
        dispatch(x, indices, w, up, down, backend="grouped")
    with pytest.raises(DispatchError, match="`cuda` cannot be used here: the tokens are on cpu; use auto"):
        dispatch(x, indices, w, up, down, backend="cuda")
    x, indices, w, up, down = problem(4, 16, 8, 3, 2, torch.float32)
    strided = up.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(DispatchError, match="grouped_mm needs experts that are contiguous"):
        dispatch(x, indices, w, strided, down, backend="grouped")


def test_operators_called_by_themselves_refuse_tensors_that_do_not_fit():
    x, indices, w, up, down = (t.detach() for t in problem(4, 16, 8, 3, 2, torch.float32))
    dispatch(x, indices, w, up, down, backend="cpu")
    for wrong in (
        (x, indices, w[:1], up, down),
        (x[:2], indices, w, up, down),
        (x, indices, w, up[:, :-1], down),
        (x, indices.int(), w, up, down),
        (x, indices, w, up.bfloat16(), down),
    ):
        with pytest.raises(ValueError, match="moect: expected"):
            torch.ops.moect.experts(*wrong, True)
    saved = torch.ops.moect.experts(x, indices, w, up, down, True)[1:]
    with pytest.raises(ValueError, match="as the forward pass left them"):
        torch.ops.moect.experts_backward(x[:, :8], x, w, up, down, *saved, [True] * 4)
    with pytest.raises(ValueError, match="as the forward pass left them"):
        torch.ops.moect.experts_backward(x, x, w, up, down, saved[0][:2], *saved[1:], [True] * 4)


def test_a_registered_backend_is_used(monkeypatch):
    for name in ("_BACKENDS", "_UNAVAILABLE"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    calls = []

    def mine(x, *rest):
        calls.append(x.shape)
        return x

    register("mine", mine, unavailable=lambda x, up: None if x.shape[1] == 16 else "too odd")
    x, indices, w, up, down = problem(4, 16, 8, 3, 2, torch.float32)
    assert dispatch(x, indices, w, up, down, backend="mine") is x
    assert calls == [(4, 16)] and "mine" in backends()
    with pytest.raises(DispatchError, match="cannot have the name `auto`"):
        register("auto", mine)
    assert unavailable("mine", x, up) is None and unavailable("mine", x[:, :3], up) == "too odd"
