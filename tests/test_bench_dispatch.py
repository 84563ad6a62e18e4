"""`moect bench dispatch`: that it times the right thing, refuses what is wrong, and names everybody. Never how long."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moect.bench import peers as peers_module
from moect.bench import result_file as result_file_module
from moect.bench import table
from moect.bench.cases import CPU_SHAPES, Shape, make_problem, parse_shape
from moect.bench.contestants import Contestant, LeftOut, exact_results, of_backends, require_agreement
from moect.bench.dispatch import _measure_case, read_options
from moect.bench.floor import Floor
from moect.bench.memory import peak_extra_bytes
from moect.bench.peers import batched_bytes, peers
from moect.bench.turns import take_turns
from moect.cli import _parser, main
from moect.dispatch import dispatch, register, registry
from moect.dispatch.segments import segments
from moect.errors import DispatchError

SMALL = Shape(12, 16, 8, 6, 2)
RIVALS = ["hf eager", "hf batched_mm", "hf grouped_mm"]
NOT_TIMED = ["hf deepgemm", "hf sonicmoe"]


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


# the rivals


def timed_peers(problem):
    return [peer for peer in peers(problem) if isinstance(peer, Contestant)]


def test_what_else_is_registered_with_transformers_is_named_and_not_timed(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "another", lambda *_: None)
    left_out = {peer.name: peer.reason for peer in peers(make_problem(SMALL, "fp32", "cpu")) if peer.name not in RIVALS}
    assert list(left_out) == [*NOT_TIMED, "hf another"]  # and not `moect`, which is ours
    assert "not one of the three that need no further package" in left_out["hf sonicmoe"]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 5e-3)])
def test_transformers_experts_compute_what_our_reference_computes(dtype, bound):
    problem = make_problem(Shape(33, 32, 16, 8, 3), dtype, "cpu")
    exact = exact_results(problem)
    rivals = timed_peers(problem)
    assert [rival.name for rival in rivals] == RIVALS
    for rival in rivals:
        for got, right in zip(rival.forward_backward(), exact, strict=True):
            assert ((got - right).norm() / right.norm()).item() < bound
        torch.testing.assert_close(rival.forward(), rival.forward_backward()[0])


def test_each_rival_runs_the_implementation_that_it_is_named_for():
    seen = {}
    for rival in timed_peers(make_problem(SMALL, "fp32", "cpu")):
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
    _, batched, *_ = peers(problem)
    assert needs <= peak_extra_bytes(batched.forward_backward, "cpu") < 1.2 * needs
    monkeypatch.setattr(peers_module, "free_bytes", lambda device: 4 * needs - 1)
    _, batched, *_ = peers(problem)
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
        assert list(case) == ["floor", *names, *RIVALS, *NOT_TIMED]
        left_out = {name for name, record in case.items() if record["reason"]}
        odd = {"grouped", "hf grouped_mm"} if (shape, dtype) == (shapes[1], "bf16") else set()
        assert left_out == {"never", *NOT_TIMED} | odd
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
    assert all(out.count(f"{name} is left out: not one of the three") == 1 for name in NOT_TIMED)
    assert out.count("multiples of 8") == 2  # of ours and of transformers
    for name in ["floor", *names[:3], *RIVALS]:
        assert sum(line.split("  ")[0] == name for line in out.splitlines()) == (3 if "grouped" in name else 4)
    assert written["versions"]["torch"] == torch.__version__
    assert written["machine"]["threads"] == 1 and written["seed"] == 5 and written["device"] == "cpu"
    assert written["complete"] is True
    assert out.rstrip().endswith(f"wrote {output}")

    again = _parser().parse_args(shlex.split(written["command"])[1:])
    assert again.shape == [str(shape) for shape in shapes] and again.backend == names and again.rounds == 2


def test_without_rounds_the_command_that_is_kept_says_the_seconds():
    again = _parser().parse_args(shlex.split(read_options(device="cpu", seconds=2.5).command())[1:])
    assert again.rounds is None and again.seconds == 2.5


def test_seconds_and_seed_of_the_command_line_reach_the_turns(monkeypatch):
    given = []

    def one_round(contestants, device, rounds, seconds, seed, tell):
        given.append((rounds, seconds, seed))
        return take_turns(contestants, device, 1, tell=tell)

    monkeypatch.setattr("moect.bench.dispatch.take_turns", one_round)
    words = ["--shape", str(SMALL), "--dtype", "fp32", "--backend", "segments"]
    assert bench(*words, "--seconds", "0.5", "--seed", "7") == 0
    assert given == [(None, 0.5, 7)]


def test_the_closing_table_sets_the_automatic_choice_against_floor_and_rival(registered, capsys, monkeypatch):
    monkeypatch.setattr("moect.bench.dispatch.choose", lambda name, x, up: "segments")
    assert bench("--shape", str(SMALL), "--dtype", "fp32", "--backend", "segments", "reference", "--rounds", "1") == 0
    out = capsys.readouterr().out
    assert "segments (auto)" in out and "reference (auto)" not in out
    *_, row, below = out.rstrip().splitlines()
    row = row.split()
    assert row[:3] == ["12,16,8,6,2", "fp32", "segments"] and row[4] == "hf" and len(row) == 9
    assert below == "best of hf: the fastest of eager, batched_mm, grouped_mm"
    assert bench("--shape", str(SMALL), "--dtype", "fp32", "--backend", "reference", "--rounds", "1") == 0
    assert "not timed" in capsys.readouterr().out.rstrip().splitlines()[-2]


def test_memory_is_compared_as_a_whole_and_beyond_the_results(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("moect.bench.dispatch.choose", lambda name, x, up: "segments")
    output = tmp_path / "out.json"
    shape = Shape(64, 32, 16, 4, 2)
    words = ["--shape", str(shape), "--dtype", "fp32", "--backend", "segments", "--rounds", "1"]
    assert bench(*words, "--output", str(output)) == 0
    records = {record["contestant"]: record for record in json.loads(output.read_text())["results"]}
    ours, rival = records["segments"], records["hf grouped_mm"]
    ratios = [
        f"{ours['peak_extra_bytes'] / rival['peak_extra_bytes']:.2f}",
        f"{(ours['peak_extra_bytes'] - ours['result_bytes']) / (rival['peak_extra_bytes'] - ours['result_bytes']):.2f}",
    ]
    assert ratios[0] != ratios[1]
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("segments (auto)")]
    assert row[-3:] == [*ratios, "1"]
    (rivals_row,) = [line.split() for line in lines if line.startswith("hf grouped_mm  ")]
    assert rivals_row[-3:] == ["1.00", "1.00", "1"]
    (closing,) = [line.split() for line in lines if line.startswith(str(shape))]
    assert closing[-2:] == ratios


def test_the_share_of_the_dense_rate_is_given_in_the_dtype_of_that_rate_alone():
    options = read_options(device="cpu", names=["segments"], rounds=1)
    endings = {}
    for dtype in ("bf16", "fp32"):
        records = _measure_case(options, SMALL, dtype, dense=1e9)
        heading, _, *rows = table.render_case(records, dense=True).splitlines()
        assert heading.endswith("f+b of dense")
        endings[dtype] = {row.endswith("%") for row in rows}
        assert "of dense" not in table.render_case(records, dense=False)
    assert endings == {"bf16": {True}, "fp32": {False}}


def fails(x, indices, w, up, down):
    return segments(x, indices, w, up, down) * (2 if x.dtype == torch.bfloat16 else 1)


def is_interrupted(x, indices, w, up, down):
    if x.dtype == torch.bfloat16:
        raise KeyboardInterrupt
    return segments(x, indices, w, up, down)


@pytest.mark.parametrize(("backend", "code"), [(fails, 2), (is_interrupted, 130)])
def test_what_was_measured_is_kept_when_a_later_case_ends_the_command(backend, code, registered, capsys, tmp_path):
    registered("swift", backend)
    output = tmp_path / "out.json"
    words = ["--shape", str(SMALL), "--dtype", "fp32", "bf16", "--backend", "swift", "--rounds", "1"]
    assert bench(*words, "--output", str(output)) == code
    written = json.loads(output.read_text())
    assert {record["dtype"] for record in written["results"]} == {"fp32"} and written["complete"] is False
    assert f"wrote {output}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]


def test_every_shape_is_held_against_the_free_memory_before_the_first_is_measured(capsys, tmp_path):
    huge = f"{10**7},8192,8192,256,8"
    output = tmp_path / "out.json"
    assert bench("--shape", str(SMALL), huge, "--rounds", "1", "--output", str(output)) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"--shape {huge} in fp32 needs" in err and not output.exists()


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(capsys, tmp_path):
    output = tmp_path / ("a" * 300)
    assert bench("--shape", str(SMALL), "--output", str(output)) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"--output {output}: cannot be written: File name too long" in err


def test_a_disk_that_fills_up_is_said_and_leaves_no_half_file(capsys, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_file_module.os, "replace", full)
    words = ["--shape", str(SMALL), "--dtype", "fp32", "--backend", "segments", "--rounds", "1"]
    assert bench(*words, "--output", str(tmp_path / "out.json")) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_log_says_what_auto_takes_and_nothing_else_and_not_among_the_tables():
    words = ["bench", "dispatch", "--device", "cpu", "--shape", str(SMALL), "--dtype", "fp32", "--rounds", "1"]
    run = subprocess.run([sys.executable, "-m", "moect.cli", *words], capture_output=True, text=True, check=True)
    said = [line for line in run.stderr.splitlines() if not re.match("compil(ing the expert kernels|ed in)", line)]
    assert [line.partition(";")[0] for line in said] == [f"experts by `{auto_of(run.stdout)}` on cpu in float32"]
    assert "experts by" not in run.stdout


def auto_of(out: str) -> str:
    (name,) = re.findall(r"^(\w+) \(auto\)", out, re.MULTILINE)
    return name


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
        (["--threads", "100000"], "--threads 100000: this machine has "),
        (["--seed", str(2**63)], "--seed 9223372036854775808: expected a whole number of 64 bits"),
        (["--skew", "nan"], "--skew nan: expected a number"),
        (["--skew=-inf"], "--skew -inf: expected a number"),
        (["--skew", "1e300"], "--skew 1e+300: expected a number"),
        (["--seconds", "0"], "--seconds 0.0: expected a number above 0"),
        (["--seconds", "inf"], "--seconds inf: expected a number above 0"),
        (["--seconds", "nan"], "--seconds nan: expected a number above 0"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(words, said, capsys):
    assert bench("--shape", str(SMALL), "--rounds", "1", *words) == 2
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


def test_the_timed_backends_go_through_dispatch_itself():
    problem = make_problem(SMALL, "fp32", "cpu")
    (ours,) = of_backends(["segments"], problem)
    tensors = (problem.x_TD, problem.indices_TK, problem.weights_TK, problem.gate_up_E2FD, problem.down_EDF)
    assert torch.equal(ours.forward(), dispatch(*tensors, backend="segments"))
