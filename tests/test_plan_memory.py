"""The memory that a plan announces, against the bytes of all tensors that a real training has at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_worker import LiveBytes
from small_runs import REPOSITORY, VOCABULARY, free_port
from tiny import tiny_model

from moect import distributed
from moect.model.build import build_model
from moect.train.engine import deepspeed_config, make_engine
from moect.train.memory import memory_per_rank
from moect.train.meters import greatest_peak_memory, peak_memory, reset_peak_memory
from moect.train.objective import Objective, StepCounts

BUCKET = 400_000  # numbers: more than the largest tensor, less than a quarter of what trains, as with real models
CASES = [(precision, stage) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
USUAL = [("fp32", 2), ("bf16", 2), ("bf16", 3)]


@pytest.fixture
def wide(place, inputs, tmp_path):
    """A base wide enough for its weights to outweigh the rest of a run on rows of eight tokens."""
    place.inputs = Path(shutil.copytree(inputs, tmp_path / "inputs"))
    shape = {"hidden_size": 96, "intermediate_size": 384, "head_dim": 24}
    tiny_model("qwen3", vocab_size=VOCABULARY, **shape).save_pretrained(place.inputs / "base")
    return place


def measured(place, cases: list[tuple], ranks: int, accumulation: int) -> dict[tuple, dict]:
    """`memory_worker.measure` of each case on so many ranks."""
    paths = []
    for precision, stage in cases:
        train = {"precision": precision, "zero_stage": stage, "micro_batch": 1, "batch_size": ranks * accumulation}
        config = place.config(f"{precision}-{stage}", moe={"fusion": "add"}, data={"sequence_length": 8}, train=train)
        paths.append(str(place.write(config)))
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--no_local_rank", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command += [REPOSITORY / "tests" / "memory_worker.py", str(BUCKET), ",".join(paths)]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    lines = [line.partition("measured ")[2] for line in done.stdout.splitlines() if "measured {" in line]
    return dict(zip(cases, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    "cases, ranks, accumulation",
    [
        pytest.param(USUAL, 2, 1, id="usual"),
        pytest.param(CASES, 1, 1, id="one-rank", marks=pytest.mark.slow),
        pytest.param(CASES, 2, 3, id="accumulated", marks=pytest.mark.slow),
    ],
)
def test_planned_memory_is_what_a_training_takes(wide, cases, ranks, accumulation):
    found = measured(wide, cases, ranks, accumulation)
    ratios = {case: round(sum(one["planned"].values()) / one["peak"], 3) for case, one in found.items()}
    assert all(0.93 < ratio < 1.1 for ratio in ratios.values()), f"planned / measured: {ratios}"
    for one in found.values():
        assert len(one["processes"]) == ranks and one["processes"] == sorted(one["processes"])
        assert one["greatest"] >= one["processes"][-1]  # asked for a moment later, when it may be a page more


def test_the_peak_of_a_process_holds_what_was_released_until_it_is_reset():
    cpu, block = torch.device("cpu"), 200_000_000
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    torch.ones(block, dtype=torch.uint8)
    held = peak_memory(cpu)
    assert 0.9 * block < held - before < 1.1 * block
    reset_peak_memory(cpu)
    assert peak_memory(cpu) - before < 0.1 * block
    assert greatest_peak_memory(cpu) > 0.9 * before > 2**20  # some of it may have been given back since


def test_the_bucket_is_as_large_as_what_trains_and_no_larger_than_deepspeed_s_own(place):
    config = place.config(train={"precision": "bf16", "zero_stage": 2})
    distributed.start()
    model = build_model(config)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine = make_engine(Objective(model, config), config.train, 1)
    assert engine.optimizer.reduce_bucket_size == trains
    engine.destroy()
    assert memory_per_rank(config, model, 2)["buffers"] < 10 * trains
    assert deepspeed_config(config.train, 2, 10**12)["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_zero_3_gathers_the_largest_module_whole(place):
    config = place.config(train={"precision": "bf16", "zero_stage": 3})
    small, large = (
        memory_per_rank(config, tiny_model("qwen3", num_hidden_layers=n).requires_grad_(True), 2) for n in (1, 4)
    )
    assert small["weights"] < large["weights"] and small["buffers"] < large["buffers"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_estimated_within_a_third(place, precision, recompute):
    """With the kernels that GPUs take, at widths in the proportions of a real model, and no logits to speak of."""
    shape = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32}
    tiny_model("qwen3", **shape).save_pretrained(place.output / "base")
    S, rows = 128, 2
    config = place.config(
        model={"base": str(place.output / "base")},
        moe={"fusion": "add", "language_gate": True, "width": 256, "dispatch": "grouped"},
        data={"sequence_length": S},
        train={"precision": precision, "micro_batch": rows, "activation_checkpointing": recompute},
    )
    model = build_model(config).train()
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 64, (rows, S), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(S // 2).repeat(rows, 2)
    role = torch.tensor([[0], [1]], dtype=torch.int8).expand(rows, S)
    with LiveBytes() as live:
        live.add_all()
        before = live.peak = live.now
        loss = Objective(model, config)(ids, ids, positions, role, StepCounts(256, 256, 128, 128), 1.0)
        kept = live.now - before
        loss.backward()
        at_most = live.peak - before - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert 0.75 < memory_per_rank(config, model, 1)["activations"] / max(kept, at_most) < 1.4
