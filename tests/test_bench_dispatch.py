"""`moect bench dispatch`: that it times the right thing, refuses what is wrong, and names everybody. Never how long."""

import dataclasses
import json
import shlex
import threading
from itertools import accumulate, pairwise

import pytest
import torch
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moect.bench import peers as peers_module
from moect.bench.cases import CPU_SHAPES, Shape, free_bytes, make_problem, parse_shape
from moect.bench.contestants import Contestant, LeftOut, exact_results, of_backends, require_agreement
from moect.bench.floor import Floor
from moect.bench.memory import peak_extra_bytes
from moect.bench.peers import batched_bytes, peers
from moect.bench.turns import dense_flops_per_second, take_turns
from moect.cli import _parser, main
from moect.dispatch import dispatch, register, registry
from moect.dispatch.segments import segments
from moect.errors import DispatchError

MIB = 2**20
SMALL = Shape(12, 16, 8, 6, 2)
RIVALS = ["hf eager", "hf batched_mm", "hf grouped_mm"]


@pytest.fixture
def registered(monkeypatch):
    """Register a backend for the length of a test."""
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setattr(registry, "_UNAVAILABLE", dict(registry._UNAVAILABLE))
    return register


def in_float64(problem):
    """The same problem with every floating tensor in float64."""
    tensors = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    doubled = {name: t.double() for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return dataclasses.replace(problem, **doubled)


def bench(*arguments: str) -> int:
    return main(["bench", "dispatch", "--device", "cpu", *arguments])


# the floor


def test_the_floor_is_the_matrix_products_of_the_dispatch_itself():
    problem = in_float64(make_problem(Shape(9, 16, 8, 12, 2), "fp32", "cpu", seed=3))
    floor = Floor(problem)
    busy = [e for e, _ in floor.segments]
    idle = [e for e in range(12) if e not in busy]
    assert idle, "the case must have an expert without tokens"
    for tensor in (floor.h_N2F, floor.y_ND, floor.da_NF, floor.dx_ND):
        tensor.fill_(torch.nan)
    for tensor in (floor.d_gate_up_E2FD, floor.d_down_EDF):
        tensor[busy] = torch.nan
    floor.forward_backward()

    y_TD, dx_TD, _, d_gate_up_E2FD, d_down_EDF = exact_results(problem)
    expert_N = problem.indices_TK.flatten()[floor.order_N]
    w_N = problem.weights_TK.flatten()[floor.order_N]
    for n, (token, e) in enumerate(zip(floor.token_N, expert_N, strict=True)):
        h_2F = problem.gate_up_E2FD[e] @ problem.x_TD[token]
        a_F = silu(h_2F[:8]) * h_2F[8:]
        torch.testing.assert_close(floor.h_N2F[n], h_2F)
        torch.testing.assert_close(floor.y_ND[n], problem.down_EDF[e] @ a_F)
        torch.testing.assert_close(floor.da_NF[n], (w_N[n] * problem.dy_TD[token]) @ problem.down_EDF[e])
    summed = torch.zeros_like(y_TD)
    torch.testing.assert_close(summed.index_add(0, floor.token_N, floor.y_ND * w_N[:, None]), y_TD)
    torch.testing.assert_close(summed.index_add(0, floor.token_N, floor.dx_ND), dx_TD)
    torch.testing.assert_close(floor.d_gate_up_E2FD, d_gate_up_E2FD)
    torch.testing.assert_close(floor.d_down_EDF, d_down_EDF)


def test_the_floor_does_nothing_but_matrix_products_into_memory_that_is_there():
    shape = Shape(40, 64, 32, 6, 3)
    floor = Floor(make_problem(shape, "fp32", "cpu"))
    with Operators() as operators:
        floor.forward_backward()
    views = {"aten.slice.Tensor", "aten.permute.default", "aten.select.int"}
    assert operators.seen - views == {"aten.mm.out"}
    assert peak_extra_bytes(floor.forward_backward, "cpu") == 0


@pytest.mark.parametrize("backward", [False, True])
def test_the_counted_operations_are_those_that_the_floor_performs(backward):
    shape = Shape(40, 64, 32, 6, 3)
    floor = Floor(make_problem(shape, "fp32", "cpu"))
    with FlopCounterMode(display=False) as counter:
        (floor.forward_backward if backward else floor.forward)()
    assert counter.get_total_flops() == shape.flops(backward)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


# memory


def eight_then_four():
    first = torch.empty(8 * MIB, dtype=torch.uint8)
    del first
    return torch.empty(4 * MIB, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)


def test_peak_memory_is_the_highest_moment_not_the_sum():
    assert peak_extra_bytes(eight_then_four, "cpu") == 8 * MIB


def test_peak_memory_sees_what_other_threads_allocate():
    def call():
        kept = torch.empty(MIB, dtype=torch.uint8)
        thread = threading.Thread(target=eight_then_four)
        thread.start()
        thread.join()
        return kept

    assert peak_extra_bytes(call, "cpu") == 9 * MIB


def test_peak_memory_sees_what_operators_and_the_backward_pass_allocate():
    x = torch.randn(256, 256, requires_grad=True)
    size = x.nbytes
    # highest where the product is differentiated: the gradient that arrives there and those of both factors; relu has
    # given back what it saved; beside them the sum and the 1 that starts the backward pass
    assert peak_extra_bytes(lambda: torch.autograd.grad((x @ x).relu().sum(), x), "cpu") == 3 * size + 2 * 4


def test_peak_memory_is_that_of_the_profiler_where_one_thread_allocates_all():
    problem = make_problem(Shape(48, 32, 16, 8, 3), "bf16", "cpu")
    for contestant in [*of_backends(["reference", "segments", "grouped"], problem), *peers(problem)]:
        contestant.forward_backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = contestant.forward_backward()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert max(accumulate(e.nbytes() for e in events)) == peak_extra_bytes(contestant.forward_backward, "cpu")
        del results


def test_tensors_that_were_there_before_the_call_do_not_count():
    before = [torch.empty(4 * MIB, dtype=torch.uint8)]
    of_an_earlier_count = []
    assert peak_extra_bytes(lambda: of_an_earlier_count.append(torch.empty(2 * MIB, dtype=torch.uint8)), "cpu") == (
        2 * MIB
    )

    def call():
        before.clear()
        of_an_earlier_count.clear()
        return torch.empty(MIB, dtype=torch.uint8)

    assert peak_extra_bytes(call, "cpu") == MIB


def test_without_a_compiler_memory_is_left_out_and_the_log_says_so(monkeypatch, caplog):
    from moect.bench.memory import _counter

    monkeypatch.setenv("CXX", "no-such-compiler")
    _counter.cache_clear()
    try:
        assert peak_extra_bytes(eight_then_four, "cpu") is None
        assert peak_extra_bytes(eight_then_four, "cpu") is None
        (record,) = [r for r in caplog.records if r.name == "moect.bench"]
        assert "no-such-compiler" in record.message
    finally:
        _counter.cache_clear()


# the rivals


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_transformers_experts_compute_what_our_reference_computes(dtype, bound):
    problem = make_problem(Shape(33, 32, 16, 8, 3), dtype, "cpu")
    exact = exact_results(problem)
    rivals = peers(problem)
    assert [rival.name for rival in rivals] == RIVALS
    for rival in rivals:
        for got, right in zip(rival.forward_backward(), exact, strict=True):
            assert ((got - right).norm() / right.norm()).item() < bound
        torch.testing.assert_close(rival.forward(), rival.forward_backward()[0])


def test_each_rival_runs_the_implementation_that_it_is_named_for():
    seen = {}
    for rival in peers(make_problem(SMALL, "fp32", "cpu")):
        with Operators() as operators:
            rival.forward()
        seen[rival.name] = operators.seen & {"aten.bmm.default", "aten._grouped_mm.default", "aten.index_add_.default"}
    assert seen == {
        "hf eager": {"aten.index_add_.default"},
        "hf batched_mm": {"aten.bmm.default"},
        "hf grouped_mm": {"aten._grouped_mm.default"},
    }


def test_batched_mm_is_left_out_by_name_where_its_copies_would_fill_the_memory(monkeypatch):
    problem = make_problem(Shape(64, 64, 64, 4, 2), "fp32", "cpu")
    needs = batched_bytes(problem)
    _, batched, _ = peers(problem)
    assert needs <= peak_extra_bytes(batched.forward_backward, "cpu") < 1.2 * needs
    monkeypatch.setattr(peers_module, "free_bytes", lambda device: 4 * needs - 1)
    _, batched, _ = peers(problem)
    assert isinstance(batched, LeftOut) and "more than a quarter of the free memory" in batched.reason


# agreement before speed


def louder(x, indices, w, up, down):
    return 1.01 * segments(x, indices, w, up, down)


def wrong_gradient(x, indices, w, up, down):
    return segments(x, indices, w, up, 2 * down - down.detach())


def nan_row(x, indices, w, up, down):
    return segments(x, indices, w, up, down).index_fill(0, torch.tensor([0]), torch.nan)


@pytest.mark.parametrize(
    ("wrong", "what"), [(louder, "output"), (wrong_gradient, "down gradient"), (nan_row, "output is off by nan")]
)
def test_a_wrong_kernel_is_refused_by_name_before_anything_is_timed(wrong, what, registered, capsys, tmp_path):
    registered("swift", wrong)
    output = tmp_path / "out.json"
    assert bench("--shape", str(SMALL), "--dtype", "fp32", "--rounds", "1", "--output", str(output)) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "swift is wrong at 12,16,8,6,2 in fp32" in line and what in line
    assert "floor" not in out and not output.exists()


def test_agreement_is_with_float64_on_all_tokens():
    problem = make_problem(Shape(300, 16, 8, 4, 2), "fp32", "cpu")
    (right,) = of_backends(["segments"], problem)
    require_agreement(right, exact_results(problem), problem)
    spoilt = [result.clone() for result in right.forward_backward()]
    spoilt[0][299] *= 1.1
    last_token = Contestant("last", "moect", right.forward, lambda: tuple(spoilt))
    with pytest.raises(DispatchError, match="last is wrong at 300,16,8,4,2 in fp32: its output"):
        require_agreement(last_token, exact_results(problem), problem)


# turns


def scripted(costs):
    """Contestants, a clock that gives each its cost, and the order in which they were called."""
    called = []

    def measure(call):
        name, part = call()
        called.append((name, part))
        return costs[name] * (1 if part == "forward" else 3)

    contestants = [
        Contestant(name, "moect", lambda name=name: (name, "forward"), lambda name=name: (name, "both"))
        for name in costs
    ]
    return contestants, measure, called


def test_each_round_is_everybody_once_and_begins_with_another():
    contestants, measure, called = scripted({"floor": 1.0, "a": 2.0, "b": 3.0})
    times = take_turns(contestants, "cpu", rounds=4, measure=measure)
    assert {name: (t.forward, t.forward_backward) for name, t in times.items()} == {
        "floor": ([1.0] * 4, [3.0] * 4),
        "a": ([2.0] * 4, [6.0] * 4),
        "b": ([3.0] * 4, [9.0] * 4),
    }
    names = [name for name, part in called if part == "forward"]
    rounds = [names[n : n + 3] for n in range(0, len(names), 3)][1:]  # after the warm-up
    assert rounds == [["floor", "a", "b"], ["a", "b", "floor"], ["b", "floor", "a"], ["floor", "a", "b"]]
    assert called[1::2] == [(name, "both") for name in names]


def test_the_very_slow_take_part_in_a_quarter_of_the_rounds_evenly_spread():
    contestants, measure, called = scripted({"floor": 1.0, "slow": 8.1, "fair": 7.9})
    times = take_turns(contestants, "cpu", rounds=40, measure=measure)
    assert {name: t.rounds for name, t in times.items()} == {"floor": 40, "slow": 10, "fair": 40}
    floors = [sum(c == ("floor", "both") for c in called[:n]) for n, c in enumerate(called) if c == ("slow", "both")]
    assert {b - a for a, b in pairwise(floors[1:])} <= {3, 4, 5}
    times = take_turns(contestants, "cpu", rounds=6, measure=measure)
    assert times["slow"].rounds == 5


@pytest.mark.parametrize(("cost", "rounds"), [(0.01, 101), (250.0, 10), (60_000.0, 5)])
def test_rounds_are_what_the_time_allows(cost, rounds):
    contestants, measure, _ = scripted({"floor": cost, "ours": cost})  # a round takes 8 x cost, in ms
    assert take_turns(contestants, "cpu", measure=measure)["ours"].rounds == rounds


def test_the_dense_rate_is_a_rate():
    assert dense_flops_per_second("cpu", size=32, rounds=2) > 0


# tensors


def test_tensors_and_routing_follow_the_seed():
    one, same, other = (make_problem(SMALL, "bf16", "cpu", seed) for seed in (0, 0, 1))
    for field in ("x_TD", "indices_TK", "weights_TK", "gate_up_E2FD", "down_EDF", "dy_TD"):
        assert torch.equal(getattr(one, field), getattr(same, field))
        assert not torch.equal(getattr(one, field), getattr(other, field))
    assert all(len(set(row)) == SMALL.K for row in one.indices_TK.tolist())
    torch.testing.assert_close(one.weights_TK.sum(-1), torch.ones(SMALL.T))


def test_skew_makes_the_routing_uneven():
    def most(skew):
        indices = make_problem(Shape(1000, 8, 8, 10, 1), "fp32", "cpu", skew=skew).indices_TK
        return indices.flatten().bincount(minlength=10).max().item()

    assert most(0.0) < 150 and most(2.0) > 300


# the command


def test_every_contestant_is_in_table_and_file_or_has_its_reason(registered, capsys, tmp_path):
    registered("never", segments, lambda x, up: "it is only a name")
    output = tmp_path / "out.json"
    names = ["reference", "segments", "grouped", "never"]
    shapes = [SMALL, Shape(5, 12, 12, 3, 3)]  # the second has widths that grouped_mm does not take in bf16
    words = ["--shape", *map(str, shapes), "--dtype", "fp32", "bf16", "--backend", *names, "--threads", "1"]
    assert bench(*words, "--rounds", "2", "--seed", "5", "--output", str(output)) == 0
    out = capsys.readouterr().out
    written = json.loads(output.read_text())

    records = {}
    for record in written["results"]:
        case = records.setdefault((Shape(**record["shape"]), record["dtype"]), {})
        case[record["contestant"]] = record
    assert list(records) == [(shape, dtype) for shape in shapes for dtype in ("fp32", "bf16")]
    for (shape, dtype), case in records.items():
        assert list(case) == ["floor", *names, *RIVALS]
        left_out = {name for name, record in case.items() if record["reason"]}
        odd = {"grouped", "hf grouped_mm"} if (shape, dtype) == (shapes[1], "bf16") else set()
        assert left_out == {"never"} | odd
        for name, record in case.items():
            assert record["forward_backward_flops"] == 3 * record["forward_flops"] == shape.flops(backward=True)
            if name in left_out:
                assert record["rounds"] is record["forward_ms"] is record["peak_extra_bytes"] is None
                continue
            assert record["rounds"] == 2
            assert 0 < record["forward_min_ms"] <= record["forward_ms"]
            assert 0 < record["forward_backward_min_ms"] <= record["forward_backward_ms"]
            assert name == "floor" or record["peak_extra_bytes"] >= record["result_bytes"] * 0.9
    assert out.count("never is left out: it is only a name") == 1
    assert out.count("multiples of 8") == 2  # of ours and of transformers
    for name in ["floor", *names[:3], *RIVALS]:
        assert sum(line.split("  ")[0] == name for line in out.splitlines()) == (3 if "grouped" in name else 4)
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == 1 and written["seed"] == 5 and written["device"] == "cpu"
    assert out.rstrip().endswith(f"wrote {output}")

    again = _parser().parse_args(shlex.split(written["command"])[1:])
    assert again.shape == [str(shape) for shape in shapes] and again.backend == names and again.rounds == 2


def test_the_closing_table_sets_the_automatic_choice_against_floor_and_rival(registered, capsys, monkeypatch):
    monkeypatch.setattr("moect.bench.dispatch.choose", lambda name, x, up: "segments")
    assert bench("--shape", str(SMALL), "--dtype", "fp32", "--backend", "segments", "reference", "--rounds", "1") == 0
    out = capsys.readouterr().out
    assert "segments (auto)" in out and "reference (auto)" not in out
    row = out.rstrip().splitlines()[-1].split()
    assert row[:3] == ["12,16,8,6,2", "fp32", "segments"] and row[4] == "hf" and len(row) == 8
    assert bench("--shape", str(SMALL), "--dtype", "fp32", "--backend", "reference", "--rounds", "1") == 0
    assert "not timed" in capsys.readouterr().out.rstrip().splitlines()[-1]


def test_an_existing_file_is_not_overwritten(capsys, tmp_path):
    output = tmp_path / "out.json"
    output.write_text("mine")
    assert bench("--shape", str(SMALL), "--output", str(output)) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "8,16,8,4"], "--shape 8,16,8,4: expected T,D,F,E,K"),
        (["--shape", "8,16,8,4,2,1"], "expected T,D,F,E,K"),
        (["--shape", "8,16,8,4,two"], "expected T,D,F,E,K"),
        (["--shape", "8,16,8.5,4,2"], "expected T,D,F,E,K"),
        (["--shape", "0,16,8,4,2"], "five whole numbers from 1"),
        (["--shape", "8,16,8,4,5"], "K=5 experts, but there are E=4"),
        (["--dtype", "fp64"], "--dtype fp64: there are fp32, bf16, fp16"),
        (["--backend", "fast"], "--backend fast: there are reference, segments, grouped"),
        (["--output", "no/such/folder/out.json"], "there is no folder"),
        (["--shape", f"{10**7},8192,8192,256,8"], "GiB free; give a smaller one"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(words, said, capsys):
    assert bench(*words) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("moect: error: ") == 1 and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said(capsys):
    assert main(["bench", "dispatch", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["bench", "dispatch", "--help"]], ids=" ".join)
def test_help_leads_from_level_to_level(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert {1: "bench", 2: "dispatch", 3: "example: moect bench dispatch --shape"}[len(words)] in out


def test_default_shapes_are_shapes_that_the_command_line_takes():
    assert [parse_shape(str(shape)) for shape in CPU_SHAPES] == list(CPU_SHAPES)
    assert free_bytes("cpu") > MIB


def test_the_timed_backends_go_through_dispatch_itself():
    problem = make_problem(SMALL, "fp32", "cpu")
    (ours,) = of_backends(["segments"], problem)
    tensors = (problem.x_TD, problem.indices_TK, problem.weights_TK, problem.gate_up_E2FD, problem.down_EDF)
    assert torch.equal(ours.forward(), dispatch(*tensors, backend="segments"))
