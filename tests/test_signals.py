"""Signals: the step is finished and saved, and the exit code says so; the same signal once more ends at once."""

import os
import signal
import time
from pathlib import Path

import pytest
from small_runs import assert_same_bits, events, start

from moect.train.checkpoints.reading import list_checkpoints, step_of
from moect.train.loop import train

SETTINGS = {"steps": 5000, "schedule": "constant", "save_every": 1000, "keep_last": 0}


def wait_for_step(process, run: Path, step: int = 1) -> None:
    """Until log.jsonl has the line of a step."""
    log = run / "log.jsonl"
    while not (log.exists() and f'{{"step": {step},' in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def ranks_of(place) -> list[int]:
    """The processes that train with a configuration of this test."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if any(str(place.output) in part for part in command) and any("--local_rank" in part for part in command):
            found.append(int(path.name))
    return found


SLOWLY = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGINT, *SLOWLY])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_a_code_of_its_own(place, number):
    config = place.config(train=SETTINGS, monitor={"enabled": True}, data={"workers": 1})
    process = start(place.write(config))
    wait_for_step(process, config.folder)
    os.killpg(process.pid, number)  # to the worker processes too, as a terminal and a launcher do
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    (saved,) = list_checkpoints(config.folder / "checkpoints")
    last = events(config.folder)[-1]
    assert last == {"event": "stop", "step": step_of(saved), "signal": number.name}
    lines = [line for line in err.splitlines() if "moect" in line or number.name in line]
    assert lines == [
        f"{number.name}: stops after this step, with a checkpoint; once more, and it stops at once",
        f"moect: stopped: {config.folder}: by {number.name} at step {step_of(saved)}, with a checkpoint; "
        "go on with resume=auto",
    ]
    if number == signal.SIGINT:
        stop = step_of(saved) + 2
        parts = {"train": {**SETTINGS, "stop_after": stop}, "monitor": {"enabled": True}}
        run, whole = train(place.config(**parts, resume="auto")), train(place.config("whole", **parts))
        assert_same_bits(run, whole, stop)


def test_the_same_signal_twice_ends_at_once_though_the_step_never_does(place):
    """The process is inside a step that waits for ever, as it would for a lost rank."""
    script = place.output / "stuck.py"
    script.write_text(
        "import sys, threading\n"
        "from moect.train.step import Steps\n"
        "def stuck(self, step, notes):\n"
        "    print('in the step', flush=True)\n"
        "    threading.Lock().acquire() and threading.Event().wait()\n"
        "Steps.take = stuck\n"
        "from moect.cli import process\n"
        "process(['train', *sys.argv[1:]])\n"
    )
    process = start(place.write(place.config(train=SETTINGS)), script=script)
    while "in the step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    while "stops after this step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)  # another one: as a launcher does after the terminal
    while process.poll() is None:  # at once, but not within the seconds in which launchers send theirs twice
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.returncode == 128 + signal.SIGTERM
    assert list_checkpoints(place.output / "run" / "checkpoints") == []


def test_a_signal_to_one_rank_stops_all_at_the_same_step(place):
    config = place.config(train={**SETTINGS, "micro_batch": 2, "async_save": True})
    process = start(place.write(config), 2)
    wait_for_step(process, config.folder)
    first, second = sorted(ranks_of(place))
    os.kill(second, signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    (saved,) = list_checkpoints(config.folder / "checkpoints")
    assert events(config.folder)[-1] == {
        "event": "stop",
        "step": step_of(saved),
        "signal": "a signal on another rank",
    }
    assert {path.name for path in saved.glob("module*")} == {"module-1-of-2.safetensors", "module-2-of-2.safetensors"}
    assert ranks_of(place) == []


@pytest.mark.slow
def test_ctrl_c_under_the_launcher_leaves_a_checkpoint(place):
    """The terminal sends SIGINT to all of the foreground, and the launcher then SIGTERM to its ranks."""
    config = place.config(train={**SETTINGS, "micro_batch": 2})
    process = start(place.write(config), 2)
    wait_for_step(process, config.folder)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (saved,) = list_checkpoints(config.folder / "checkpoints")
    assert events(config.folder)[-1]["step"] == step_of(saved), out + err
    assert ranks_of(place) == []
