"""The CUDA kernels, run on a CPU block by block and thread by thread, and the backend made of them.

What takes a GPU to know, and is not known without one: its speed, that the host never waits, races between threads.

T tokens, K experts per token, E experts, D width, F expert width, N = T·K assignments
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dispatch_problems import problem, relative, run
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.nn.functional import silu
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS
from torch.utils.flop_counter import FlopCounterMode

from moect.dispatch import backends, registry, unavailable
from moect.dispatch.build import CSRC, NVCC_FLAGS
from moect.dispatch.cuda import cuda, cuda_unavailable
from moect.dispatch.extension import load

OPS = torch.ops.moect
DTYPES = [
    pytest.param(torch.float64, 1e-12, id="fp64"),
    pytest.param(torch.float32, 1e-6, id="fp32"),
    pytest.param(torch.bfloat16, 1e-2, id="bf16"),
    pytest.param(torch.float16, 1e-3, id="fp16"),
]
WIDTHS = [
    1,
    7,
    8,
    24,
    64,
    2056,
]  # in numbers: no vector, a short one, a team of threads, its whole block in every dtype
HEADERS = Path(torch.__path__[0]) / "include"
CHUNK = 512  # assignments that a block sorts


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    if reason := load("cpu"):
        pytest.skip(reason)
    monkeypatch.delitem(registry._UNAVAILABLE, "cuda")  # it is refused on a CPU, being slow there


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def route(T, E, K, seed=0):
    return torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(seed))


def gradients(y, inputs, seed=9):
    return torch.autograd.grad((y * rand(*y.shape, seed=seed).to(y.dtype)).sum(), inputs)


def assert_close(got, expected, bound):
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert relative(g, e) < bound


# ---- order ----


@pytest.mark.parametrize(
    ("T", "E", "K"),
    [(0, 3, 2), (1, 1, 1), (CHUNK, 4, 1), (CHUNK + 1, 4, 1), (700, 32, 4), (3000, 256, 8), (999, 1, 1), (800, 2500, 3)],
)
def test_the_order_is_that_of_a_stable_sort(T, E, K):
    indices_TK = route(T, E, K)
    source_N, position_N, ends_E = OPS.sort_by_expert(indices_TK, E)
    keys_N, order_N = indices_TK.flatten().sort(stable=True)
    assert torch.equal(source_N.long(), order_N)
    assert torch.equal(position_N.long()[order_N], torch.arange(T * K))
    assert torch.equal(ends_E.long(), torch.searchsorted(keys_N, torch.arange(E), right=True))


def test_one_expert_may_take_all_tokens_and_tokens_stay_in_order():
    source_N, position_N, ends_E = OPS.sort_by_expert(torch.full((1300, 1), 5), 8)
    assert source_N.tolist() == position_N.tolist() == list(range(1300))
    assert ends_E.tolist() == [0] * 5 + [1300] * 3


@pytest.mark.parametrize("bad", [-1, 7, 2**31, -(2**40), 2**62])
def test_keys_out_of_range_come_last_and_say_so(bad):
    """Complements: every row is still written exactly once, so that nothing is left as the memory was."""
    indices_TK = route(600, 7, 2)
    indices_TK[::5, 1] = bad
    source_N, position_N, ends_E = OPS.sort_by_expert(indices_TK, 7)
    keys_N = indices_TK.flatten()
    good_N = (keys_N >= 0) & (keys_N < 7)
    order_N = torch.where(good_N, keys_N, 7).sort(stable=True).indices
    assert ends_E[-1] == good_N.sum() < 1200
    assert torch.equal(torch.where(source_N < 0, ~source_N, source_N).long(), order_N)
    assert torch.equal(source_N < 0, torch.arange(1200) >= ends_E[-1])
    assert torch.equal(position_N < 0, ~good_N)
    assert torch.equal(torch.where(position_N < 0, ~position_N, position_N).long()[order_N], torch.arange(1200))


def test_rows_behind_all_experts_are_zero_and_not_what_the_memory_was():
    indices_TK = route(50, 4, 2)
    indices_TK[::3, 0] = 4
    source_N, position_N, ends_E = OPS.sort_by_expert(indices_TK, 4)
    x, w, h, da = rand(50, 8) + 10, rand(50, 2), rand(100, 16), rand(100, 8)
    h[ends_E[-1] :], da[ends_E[-1] :] = torch.nan, torch.nan  # no product writes them
    x_ND = OPS.permute(x, position_N, 2)
    dx_ND, dw = OPS.combine_backward(x, x_ND, position_N, w)
    dh, weighted, dw_too = OPS.swiglu_backward(da, h, w, source_N)
    for rows in (x_ND, dx_ND, dh, weighted):
        assert (rows[ends_E[-1] :] == 0).all() and rows[: ends_E[-1]].all()
    for grad in (dw, dw_too):
        assert torch.equal(grad.isnan(), indices_TK == 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_with_an_index_out_of_range_gets_nan_and_others_what_they_would(dtype):
    x, indices, w, up, down = problem(70, 16, 8, 5, 2, dtype)
    bad = indices.clone()
    bad[3, 1], bad[68, 0] = 5, -1
    hit = torch.zeros(70, dtype=torch.bool)
    hit[[3, 68]] = True
    y, clean = cuda(x, bad, w, up, down), cuda(x, indices, w, up, down)
    assert y[hit].isnan().all() and torch.equal(y[~hit], clean[~hit])
    dy = torch.ones_like(y)
    dx, dw, dup, ddown = torch.autograd.grad(y, (x, w, up, down), dy)
    dx_clean, dw_clean = torch.autograd.grad(clean, (x, w), dy)
    assert dx[hit].isnan().all() and torch.equal(dx[~hit], dx_clean[~hit])
    assert dw[3, 1].isnan() and dw[68, 0].isnan()
    assert torch.equal(dw[~hit], dw_clean[~hit])
    assert dup.isfinite().all() and ddown.isfinite().all()


# ---- parts, against float64 autograd of plain torch ----


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_permute_copies_rows_and_its_gradient_adds_them_up(dtype, bound, D):
    indices_TK = route(37, 5, 3)
    source_N, position_N, _ = OPS.sort_by_expert(indices_TK, 5)
    x = rand(37, D, dtype=dtype).requires_grad_()
    x_ND = OPS.permute(x, position_N, 3)
    plain = x.double()[source_N.long() // 3]
    assert torch.equal(x_ND.double(), plain)
    assert_close(gradients(x_ND, x), gradients(plain, x), bound)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("weights", ["wide", "as y", "none"])
def test_combine_weights_and_adds_up_rows_and_so_does_its_gradient(dtype, bound, D, weights):
    T, K = 23, 6  # a batch of four rows and two more
    position_N = torch.randperm(T * K, generator=torch.Generator().manual_seed(2)).int()
    y = rand(T * K, D, dtype=dtype).requires_grad_()
    w = rand(
        T, K, seed=1, dtype=torch.promote_types(dtype, torch.float32) if weights == "wide" else dtype
    ).requires_grad_()
    exact_y, exact_w = y.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    rows_TKD = exact_y[position_N.long()].view(T, K, D)
    if weights == "none":
        out, exact = OPS.combine(y, position_N, None, K), rows_TKD.sum(1)
        inputs, exact_inputs = (y,), (exact_y,)
    else:
        out, exact = OPS.combine(y, position_N, w, K), (rows_TKD * exact_w[..., None]).sum(1)
        inputs, exact_inputs = (y, w), (exact_y, exact_w)
    assert out.dtype == dtype
    assert_close([out], [exact], bound)
    got = gradients(out, inputs)
    assert [g.dtype for g in got] == [t.dtype for t in inputs]
    target = rand(T, D, seed=9).to(dtype).double()
    assert_close(got, torch.autograd.grad((exact * target).sum(), exact_inputs), bound)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("F", WIDTHS)
def test_swiglu_and_its_weighted_gradient(dtype, bound, F):
    N, K = 30, 3
    h = (3 * rand(N, 2 * F)).to(dtype).requires_grad_()
    w = rand(N // K, K, seed=1, dtype=torch.promote_types(dtype, torch.float32))
    source_N = torch.randperm(N, generator=torch.Generator().manual_seed(2)).int()
    exact_h = h.detach().double().requires_grad_()
    exact_w = w.double().requires_grad_()
    exact_a = silu(exact_h[:, :F]) * exact_h[:, F:]
    exact_weighted = exact_a * exact_w.flatten()[source_N.long(), None]
    da = rand(N, F, seed=3, dtype=dtype)

    a = OPS.swiglu(h)
    assert_close([a], [exact_a], bound)
    plain_dh = torch.autograd.grad(exact_a, exact_h, da.double(), retain_graph=True)
    assert_close(torch.autograd.grad(a, h, da), plain_dh, bound)

    dh, weighted, dw = OPS.swiglu_backward(da, h.detach(), w, source_N)
    exact_dh, exact_dw = torch.autograd.grad(exact_weighted, (exact_h, exact_w), da.double())
    assert_close([dh, weighted, dw], [exact_dh, exact_weighted, exact_dw], bound)


def test_rows_that_lie_askew_in_memory_are_moved_number_by_number():
    """A pointer that is no multiple of 16 bytes: one vector access there would be a fault on a GPU."""
    askew = rand(5 * 16 + 1, dtype=torch.float32)[1:].view(5, 16)
    position_N = torch.arange(5).int().flip(0)
    assert torch.equal(OPS.permute(askew, position_N, 1), askew.flip(0))
    assert_close([OPS.combine(askew, position_N, None, 1)], [askew.flip(0).double()], 1e-12)
    assert torch.equal(OPS.swiglu(askew), OPS.swiglu(askew.clone()))


@pytest.mark.parametrize("part", ["permute", "combine", "combine without weights", "swiglu"])
def test_parts_pass_gradcheck_in_float64(part):
    position_N = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int()
    x, y, w, h = (rand(*shape, seed=i).requires_grad_() for i, shape in enumerate([(4, 3), (12, 3), (4, 3), (5, 6)]))
    fn, inputs = {
        "permute": (lambda x: OPS.permute(x, position_N, 3), (x,)),
        "combine": (lambda y, w: OPS.combine(y, position_N, w, 3), (y, w)),
        "combine without weights": (lambda y: OPS.combine(y, position_N, None, 3), (y,)),
        "swiglu": (OPS.swiglu, (h,)),
    }[part]
    assert gradcheck(fn, inputs)


def test_tensors_that_do_not_fit_are_refused_before_any_kernel_runs():
    position_N, x, h = torch.arange(6).int(), rand(3, 4), rand(6, 8)
    with pytest.raises(ValueError, match="int64"):
        OPS.sort_by_expert(torch.zeros(2, 2, dtype=torch.int32), 2)
    with pytest.raises(ValueError, match="permute: expected x"):
        OPS.permute(x, position_N, 3)
    with pytest.raises(ValueError, match="combine: expected y"):
        OPS.combine(h, position_N, torch.ones(2, 2), 2)
    with pytest.raises(ValueError, match="swiglu: expected gate and up"):
        OPS.swiglu(h[:, :7])
    with pytest.raises(ValueError, match="or neither"):
        OPS.swiglu_backward(rand(6, 4), h, torch.ones(3, 2), None)


# ---- the whole ----

SHAPES = [
    (0, 16, 8, 4, 2),
    (1, 16, 8, 1, 1),
    (7, 16, 24, 3, 3),
    (300, 32, 16, 8, 4),
    (20, 8, 8, 256, 8),
    (33, 13, 9, 5, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("products", ["grouped", "one by one"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=["fp32", "bf16", "fp16"],
)
def test_output_and_gradients_agree_with_the_loop_in_float64(products, shape, dtype, bound, monkeypatch):
    if products == "one by one":
        monkeypatch.setattr(sys.modules[cuda.__module__], "_one_kernel", lambda *_: False)
    args = problem(*shape, dtype)
    doubles = (t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args)
    assert_close(run("cuda", *args), run("reference", *doubles), bound)


def test_the_whole_passes_gradcheck_in_float64():
    x, indices, w, up, down = problem(5, 4, 3, 3, 2, torch.float64)
    assert gradcheck(lambda x, w, up, down: cuda(x, indices, w, up, down), (x, w, up, down))


def test_two_runs_give_the_same_bits():
    args = problem(300, 32, 16, 8, 4, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(run("cuda", *args), run("cuda", *args), strict=True))


@pytest.mark.parametrize("wanted", ["x", "w", "up", "down", "x up"])
def test_only_the_gradients_that_are_wanted_are_computed(wanted, monkeypatch):
    tensors = dict(zip(("x", "indices", "w", "up", "down"), problem(40, 16, 8, 4, 2, torch.float32), strict=True))
    all_grads = dict(zip(("x", "w", "up", "down"), run("cuda", *tensors.values())[1:], strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted.split())
    computed = []
    module = sys.modules[cuda.__module__]

    def counting(*inputs, make=module._product):
        product = make(*inputs)
        return lambda a, b: computed.append(a.shape) or product(a, b)

    monkeypatch.setattr(module, "_product", counting)
    y = cuda(*tensors.values())
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad((y * target).sum(), [tensors[name] for name in wanted.split()])
    assert all(torch.equal(g, all_grads[name]) for g, name in zip(grads, wanted.split(), strict=True))
    assert len(computed) == 2 + 1 + len(set(wanted.split()) - {"w"})  # forward, da, and one for each but the weights
    products = 1 + sum({"x": 2, "up": 2, "down": 1, "w": 0}[name] for name in wanted.split())
    assert counter.get_total_flops() == products * 2 * 80 * 16 * 8


def test_without_gradients_nothing_is_kept():
    x, indices, w, up, down = (t.detach() for t in problem(10, 16, 8, 4, 2, torch.float32))
    y, h, *_ = OPS.experts_by_kernels(x, indices, w, up, down, False)
    assert len(h) == 0
    assert torch.equal(y, OPS.experts_by_kernels(x, indices, w, up, down, True)[0])
    with torch.no_grad():
        assert cuda(x.requires_grad_(), indices, w, up, down).grad_fn is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_function_has_no_break_and_computes_the_same(dynamic):
    def layer(x, indices, w, up, down):
        return torch.tanh(cuda(2 * x, indices, w, up, down))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (40, 24):
        x, indices, w, up, down = problem(T, 16, 8, 4, 2, torch.float32)
        results = [
            (y, *gradients(y, (x, w, up, down))) for y in (fn(x, indices, w, up, down) for fn in (layer, compiled))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("error")
def test_operators_keep_the_rules_of_torch():
    """Schemas, fake kernels and gradients say what the kernels do."""
    x, indices, w, up, down = problem(6, 8, 4, 3, 2, torch.float32)
    source, position, ends = OPS.sort_by_expert(indices, 3)
    h, y, a = (rand(12, n, dtype=torch.float32) for n in (8, 8, 4))
    opcheck(OPS.sort_by_expert.default, (indices, 3))
    opcheck(OPS.permute.default, (x, position, 2))
    opcheck(OPS.combine.default, (y.requires_grad_(), position, w, 2))
    opcheck(OPS.combine.default, (y, position, None, 2))
    opcheck(OPS.combine_backward.default, (x.detach(), y.detach(), position, w.detach()))
    opcheck(OPS.swiglu.default, (h.clone().requires_grad_(),))
    opcheck(OPS.swiglu_backward.default, (a, h, None, None))
    opcheck(OPS.swiglu_backward.default, (a, h, w.detach(), source))
    opcheck(OPS.segment_mm.default, (y.detach(), up.detach().transpose(1, 2), ends))
    opcheck(OPS.segment_mm.default, (y.detach().T, a, ends))
    opcheck(OPS.experts_by_kernels.default, (x, indices, w, up, down, True))
    saved = OPS.experts_by_kernels(*(t.detach() for t in (x, indices, w, up, down)), True)[1:]
    inputs = [t.detach() for t in (x, x, w, up, down)]
    opcheck(OPS.experts_by_kernels_backward.default, (*inputs, *saved, [True, False, True, False]))


# ---- the CUDA build ----


@pytest.fixture(scope="module")
def compiled_kernels(tmp_path_factory):
    """The object file that nvcc makes of the kernels, and what it says of them."""
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc")
    place = tmp_path_factory.mktemp("nvcc") / "kernels.o"
    flags = [*COMMON_NVCC_FLAGS, *NVCC_FLAGS, "-std=c++20", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-fPIC"]
    command = ["nvcc", *flags, "-Xptxas", "-v", "-I", HEADERS, "-c", CSRC / "kernels.cu", "-o", place]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return place, built.stdout + built.stderr


def test_nvcc_compiles_the_kernels_without_a_warning_and_no_register_spills(compiled_kernels):
    _, report = compiled_kernels
    for arch in ("sm_80", "sm_90"):
        assert len(re.findall(f"Compiling entry function .* for '{arch}'", report)) == 39
    assert set(re.findall(r"(\d+) bytes spill stores", report)) == {"0"}
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 64


def test_the_gpu_binding_compiles_and_finds_every_kernel_it_launches(compiled_kernels, tmp_path):
    """All but the link with torch's own CUDA libraries, which a torch for CPUs does not have."""
    kernels, _ = compiled_kernels
    macros = Path("c10") / "cuda" / "impl" / "cuda_cmake_macros.h"
    if not (HEADERS / macros).is_file():  # nor has it this one, which holds a build's options
        (tmp_path / macros).parent.mkdir(parents=True)
        (tmp_path / macros).touch()
    folders = (HEADERS, HEADERS / "torch" / "csrc" / "api" / "include", cuda_headers(), tmp_path)
    command = ["g++", "-std=c++20", "-Wall", "-Werror", "-fPIC", *(f"-isystem{folder}" for folder in folders)]
    built = subprocess.run(
        [*command, "-c", CSRC / "cuda.cpp", "-o", tmp_path / "cuda.o"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    wanted, there = launches(tmp_path / "cuda.o", "U"), launches(kernels, "W")
    assert wanted and wanted == there


def cuda_headers() -> Path:
    roots = (Path(shutil.which("nvcc")).resolve().parent.parent, Path("/usr/local/cuda"))
    return next(root / "include" for root in roots if (root / "include" / "cuda_runtime_api.h").is_file())


def launches(file: Path, kind: str) -> set[str]:
    """The launch functions that an object file wants (U) or has (W)."""
    symbols = subprocess.run(["nm", file], capture_output=True, text=True, check=True).stdout
    return set(re.findall(rf" {kind} (_ZN5moect7kernels6launch\w+)", symbols))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES, (2000, 128, 64, 32, 4)], ids=str)
def test_on_a_gpu_every_backend_agrees_with_the_loop_in_float64(shape, dtype):
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]
    args = [t.detach().cuda().requires_grad_(t.requires_grad) for t in problem(*shape, dtype)]
    doubles = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in args]
    expected = [t.cpu() for t in run("reference", *doubles)]
    for backend in backends():
        if not unavailable(backend, args[0], args[3]):
            assert_close([t.cpu() for t in run(backend, *args)], expected, bound)
    assert cuda_unavailable(args[0], args[3]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [7, 264])
def test_on_a_gpu_each_part_gives_what_it_gives_on_a_cpu(width, dtype):
    """Order and copies to the bit; sums and activations but for the rounding of fused multiply-adds and of e^x."""
    assert load("cuda") is None
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float64: 1e-14}[dtype]
    T, E, K = 3000, 256, 8
    indices = route(T, E, K)
    indices[::7, 3] = -1
    source, position, _ = order = OPS.sort_by_expert(indices, E)
    on_gpu = OPS.sort_by_expert(indices.cuda(), E)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, order, strict=True))
    x, weights = rand(T, width, dtype=dtype), rand(T, K, seed=1).float()
    rows, h = OPS.permute(x, position, K), rand(T * K, 2 * width, seed=2, dtype=dtype)
    assert torch.equal(OPS.permute(x.cuda(), position.cuda(), K).cpu(), rows)
    for name, *inputs in (
        ("combine", rows, position, None, K),
        ("combine", rows, position, weights, K),
        ("combine_backward", x, rows, position, weights),
        ("swiglu", h),
        ("swiglu_backward", rows, h, weights, source),
    ):
        expected = getattr(OPS, name)(*inputs)
        got = getattr(OPS, name)(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in inputs))
        pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
        for g, e in pairs:
            assert torch.equal(g.isnan().cpu(), e.isnan())
            assert relative(g.cpu().nan_to_num(), e.double().nan_to_num()) < bound, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_host_never_waits_where_grouped_products_are_one_kernel():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only on sm90 they are")
    args = [t.detach().cuda().requires_grad_(t.requires_grad) for t in problem(256, 64, 32, 8, 2, torch.bfloat16)]
    run("cuda", *args)  # builds and loads
    y = cuda(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda(*args).backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
