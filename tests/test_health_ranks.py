"""Ranks that drift apart are named, and a rank that hangs tells where; with real ranks."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch
from small_runs import REPOSITORY, checkpoint, launch, start

from moect.train.health.ranks import checksum
from moect.train.health.watchdog import Watchdog

HERE = socket.gethostname()
WORKER = """
import os, sys, time
from pathlib import Path
from moect.cli import process
from moect.data.batches.loader import Loader
from moect.train.step import Steps

plain_next, plain_take = Loader.next_step, Steps.take

def next_step_that_hangs(self):
    if self.rank == 1 and self.rows == 2 * self.config.train.batch_size:
        while not Path(os.environ["GO_ON"]).exists():
            time.sleep(0.05)
    return plain_next(self)

def take(self, step, notes):
    plain_take(self, step, notes)
    if self.rank == 1 and step == 4:
        name, parameter = [p for p in self.objective.model.named_parameters() if p[1].requires_grad][3]
        import torch
        bits = parameter.data.view(-1).view(torch.int32)
        bits[5] ^= 1
        print(f"flipped {name}", flush=True)

Loader.next_step, Steps.take = next_step_that_hangs, take
process(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_ranks_that_differ_are_named_with_the_first_tensor_that_does(tmp_path):
    launch(tmp_path / "said", 3, script=REPOSITORY / "tests" / "health_worker.py")
    first, *others = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(3)]
    assert others == [first, first]
    expected = {
        "lowest bit": (f"rank 1 on {HERE} differs from the others", "second (1 of 5 tensors differ)"),
        "places": (f"rank 2 on {HERE} differs from the others", "first (1 of 5 tensors differ)"),
        "buffer": (f"rank 0 on {HERE} differs from the others", "block.moe.running_mean (1 of 5 tensors differ)"),
        "frozen": (f"rank 1 on {HERE} differs from the others", "base (1 of 6 tensors differ)"),
        "two tensors": (f"rank 1 on {HERE} differs from the others", "first (2 of 5 tensors differ)"),
        "all apart": (" and ".join(f"rank {n} on {HERE}" for n in range(3)) + " differ", "first (1 of 5 tensors"),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, (who, what) in expected.items():
            assert first.pop(f"{name} {dtype}").startswith(f"here: {who} in {what}")
    assert first == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksum_is_the_sum_of_bits_by_their_places(dtype, monkeypatch):
    monkeypatch.setattr("moect.train.health.ranks.CHUNK", 7)
    tensor = (torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    size = tensor.element_size()
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    words = [int.from_bytes(content[i : i + size], "little", signed=True) for i in range(0, len(content), size)]
    total = sum(word * (2 * i + 1) for i, word in enumerate(words))
    assert (checksum(tensor).item() - total) % 2**64 == 0


def until(happened, process) -> None:
    """Wait for something, generously."""
    end = time.monotonic() + 240
    while not happened():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def test_a_hang_shows_where_each_rank_stands_and_a_flipped_bit_ends_the_run_without_a_checkpoint_of_it(
    place, monkeypatch
):
    health = {"hang_minutes": 0.05, "check_ranks_every": 1}
    config = place.config(train={"zero_stage": 2, "steps": 8, "save_every": 1, "keep_last": 0}, health=health)
    script = place.output / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setenv("GO_ON", str(place.output / "go on"))
    process = start(place.write(config), 2, script=script)
    files = [config.folder / "hangs" / f"rank-{rank}.txt" for rank in (0, 1)]
    until(lambda: all(path.exists() and "at step 3" in path.read_text() for path in files), process)
    (place.output / "go on").touch()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, f"{out}\n{err}"
    for rank, where in ((0, "in count"), (1, "in next_step_that_hangs")):
        told = err.split(f"rank {rank} on {HERE}: nothing new for ")
        assert any("at step 3. The run is not ended" in block and where in block for block in told)
        assert f"rank {rank} on {HERE} goes on after " in err
        assert "Timeout (0:00:03)!" in files[rank].read_text() and where in files[rank].read_text()
    (flipped,) = [line.removeprefix("flipped ") for line in out.splitlines() if line.startswith("flipped ")]
    (line,) = [line for line in err.splitlines() if "moect: error" in line]
    assert f"at step 5: rank 0 on {HERE} and rank 1 on {HERE} differ in {flipped} (1 of " in line
    assert checkpoint(config.folder, 4).is_dir() and not checkpoint(config.folder, 5).exists()


def test_a_watchdog_that_saw_nothing_leaves_nothing(tmp_path):
    for minutes in (0, 1000):
        dog = Watchdog(tmp_path, 3, minutes)
        dog.beat("step 1")
        dog.beat("step 2")
        assert (tmp_path / "hangs" / "rank-3.txt").exists() == bool(minutes)
        dog.close()
        assert list(tmp_path.iterdir()) == []
