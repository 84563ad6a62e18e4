"""kill -9, at a moment that the run's own progress decides: afterwards `resume=auto` goes on as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import assert_same_bits, events, figures, losses, start

from moect.train.checkpoints.reading import list_checkpoints
from moect.train.loop import train

# far more steps than any test waits for, under a schedule that they do not change
SETTINGS = {"steps": 5000, "schedule": "constant", "save_every": 4, "keep_last": 0}
MONITOR = {"enabled": True}


def last_step(run: Path) -> int:
    """The last step whose line is complete in log.jsonl."""
    try:
        lines = (run / "log.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return max((line.get("step", 0) for line in map(json.loads, lines)), default=0)


def wait_until(happened, process) -> None:
    while not happened():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode} before it could be killed\n{process.communicate()}")
        time.sleep(0.001)


def kill(process) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def compare_with_an_uninterrupted_run(place, run: Path, **sections) -> None:
    """Go on for five steps beyond the last checkpoint, and compare with a run that was never killed."""
    saved = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]
    stop = max(saved, default=0) + 5
    settings = {**SETTINGS, **sections.pop("train", {}), "stop_after": stop}
    config = place.config("run", **sections, train=settings, monitor=MONITOR, resume="auto")
    assert config.folder == run
    train(config)
    resumed = [line["step"] for line in events(run) if line["event"] == "resume"]
    assert resumed == [max(saved, default=0)]
    whole = train(place.config("whole", **sections, train=settings, monitor=MONITOR))
    assert losses(run) == losses(whole) and sorted(figures(run)) == list(range(1, stop + 1))
    assert_same_bits(run, whole, stop)
    rows = [(folder / "monitor" / "forgetting.jsonl").read_text().splitlines() for folder in (run, whole)]
    upto = [[row for row in map(json.loads, part) if row["step"] <= stop] for part in rows]
    assert upto[0] == upto[1] and len(upto[0]) >= 4


@pytest.mark.slow  # the harness below does the like, and more of it
@pytest.mark.parametrize("seed", [0, 1])
def test_run_killed_at_a_random_step_ends_with_the_bits_of_one_that_was_not(place, seed):
    rng = random.Random(seed)
    config = place.config(train=SETTINGS, monitor=MONITOR)
    process = start(place.write(config))
    moment, delay = rng.randrange(1, 15), rng.random() * 0.05
    wait_until(lambda: last_step(config.folder) >= moment, process)
    time.sleep(delay)
    kill(process)
    assert last_step(config.folder) >= moment
    compare_with_an_uninterrupted_run(place, config.folder)


def test_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(place):
    config = place.config(train={**SETTINGS, "save_every": 2}, monitor=MONITOR)
    process = start(place.write(config))
    folder = config.folder / "checkpoints"

    def is_writing() -> bool:
        """Seen, and still so with the process stopped: then it cannot end before it is killed."""
        if not (list(folder.glob("step-*")) and list(folder.glob(".writing-step-*"))):
            return False
        os.kill(process.pid, signal.SIGSTOP)
        _wait_for_state(process.pid, "T")
        if list(folder.glob(".writing-step-*")):
            return True
        os.kill(process.pid, signal.SIGCONT)
        return False

    wait_until(is_writing, process)
    kill(process)
    assert list(folder.glob(".writing-step-*")), "it was not killed while writing"
    compare_with_an_uninterrupted_run(place, config.folder, train={"save_every": 2})


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_begins_again(place):
    config = place.config(train={**SETTINGS, "save_every": 5000}, monitor=MONITOR)
    process = start(place.write(config))
    wait_until(lambda: last_step(config.folder) >= 2, process)
    kill(process)
    assert list_checkpoints(config.folder / "checkpoints") == []
    compare_with_an_uninterrupted_run(place, config.folder, train={"save_every": 5000})


def harness(*arguments: str) -> str:
    """What tests/kill_harness.py says; every run must have ended like the one that was never killed."""
    command = [sys.executable, str(Path(__file__).with_name("kill_harness.py")), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "every run ended as the one never killed" in result.stdout
    return result.stdout


def test_runs_killed_at_random_moments_end_with_the_bits_of_one_that_was_not():
    """Inside a write, a rename, a measurement, a line of the log …: see kill_moments.py."""
    assert "killed " in harness("--moments", "2", "--variants", "plain", "--seed", "0")


@pytest.mark.slow
def test_runs_of_every_variant_killed_at_random_moments_end_with_the_bits_of_one_that_was_not():
    """Two of each; `python tests/kill_harness.py --moments 50 --seed N` kills more."""
    assert "killed " in harness("--moments", "14", "--seed", "1")


def test_half_a_line_at_the_end_of_the_log_is_not_continued(place):
    settings = {**SETTINGS, "stop_after": 4}
    run = train(place.config(train=settings))
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(place.config(train={**settings, "stop_after": 5}, resume="auto"))
    lines = (run / "log.jsonl").read_text().splitlines()
    assert [line for line in lines if line.startswith('{"step": 5, "lo')][0] == '{"step": 5, "lo'
    assert json.loads(lines[-1])["step"] == 5


@pytest.mark.slow
def test_killing_one_of_two_ranks_ends_the_other_and_resume_is_exact(place):
    config = place.config(train=SETTINGS, monitor=MONITOR)
    process = start(place.write(config), 2)
    wait_until(lambda: last_step(config.folder) >= 6, process)
    ranks = [int(p.name) for p in Path("/proc").glob("[0-9]*") if _is_rank(p, str(place.output))]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not [p for p in Path("/proc").glob("[0-9]*") if _is_rank(p, str(place.output))]
    stop = max(int(path.name.removeprefix("step-")) for path in list_checkpoints(config.folder / "checkpoints")) + 5
    settings = [f"train.stop_after={stop}"]
    for name, more in (("run", ["resume=auto"]), ("whole", ["name=whole"])):
        again = start(place.output / "run.yaml", 2, *settings, *more)
        again.communicate(timeout=300)
        assert again.returncode == 0 and (place.output / name).is_dir()
    assert_same_bits(place.output / "run", place.output / "whole", stop)


def _is_rank(path: Path, mark: str) -> bool:
    try:
        command = (path / "cmdline").read_text().split("\0")
    except OSError:
        return False
    return any(mark in part for part in command) and any("--local_rank" in part for part in command)


def _wait_for_state(pid: int, state: str) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in (state, "Z"):
        time.sleep(0.001)
