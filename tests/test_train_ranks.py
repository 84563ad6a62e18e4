"""Several ranks under DeepSpeed's launcher: the same losses, exact resume, clean ends."""

import os
from pathlib import Path

import pytest
from small_runs import assert_same_bits, checkpoint, events, figures, launch, losses

from moect.config import config_from_dict
from moect.train.checkpoints.reading import read_info
from moect.train.loop import train

EVERYTHING = {
    "moe": {"fusion": "add", "experts": 4, "top_k": 2, "language_gate": True},
    "loss": {"balance": 0.05, "z": 0.01, "gate": 1.0},
}
FIGURES = ("loss", "balance", "z", "gate", "grad_norm", "greatest_load", "old_share")


@pytest.fixture(autouse=True)
def there_before():
    """Processes of before the test: what other tests left of theirs is not this one's."""
    return {path.name for path in Path("/proc").glob("[0-9]*")}


def left_over(place, there_before: set[str]) -> list[str]:
    """Processes that still run with a configuration of this test, or are zombies of this process that it made."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text()
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # ended meanwhile
            continue
        zombie = state == "Z" and int(parent) == os.getpid() and path.name not in there_before
        if str(place.output) in command or zombie:
            found.append(f"{path.name} {state} {command}")
    return found


def test_one_rank_and_two_ranks_give_the_same_losses(place, there_before):
    settings = {"steps": 20, "micro_batch": 4}
    alone = train(place.config("alone", **EVERYTHING, train=settings))  # accumulates twice
    launch(place.write(place.config("two", **EVERYTHING, train=settings)), 2)
    two = place.output / "two"
    assert events(two)[0]["plan"]["ranks"] == 2 and events(two)[0]["plan"]["accumulation_steps"] == 1
    assert events(alone)[0]["plan"]["accumulation_steps"] == 2
    assert sorted(figures(two)) == list(range(1, 21))
    for step, line in figures(alone).items():
        for key in FIGURES:
            assert figures(two)[step][key] == pytest.approx(line[key], abs=1e-4), (step, key)
    assert losses(alone)[-1] < losses(alone)[0] - 0.5
    assert left_over(place, there_before) == []


def test_resume_on_two_ranks_under_zero_3_is_exact(place):
    settings = {"zero_stage": 3, "micro_batch": 2}
    launch(place.write(place.config("whole", train=settings)), 2)
    path = place.write(place.config("run", train=settings))
    launch(path, 2, "train.stop_after=3")
    launch(path, 2, "resume=auto")
    run, whole = place.output / "run", place.output / "whole"
    assert [line["event"] for line in events(run)].count("resume") == 1
    assert losses(run) == losses(whole) and len(losses(run)) == 6
    assert_same_bits(run, whole, 6)
    assert losses(run) == pytest.approx(losses(train(place.config("alone"))), abs=1e-4)


@pytest.mark.slow
def test_default_precision_and_stage_work_under_the_launcher_and_leave_no_process(place, there_before):
    values = place.values(monitor={"enabled": True})
    del values["train"]["precision"]
    config = config_from_dict(values)
    assert (config.train.precision, config.train.zero_stage) == ("bf16", 2)
    out, _ = launch(place.write(config), 1)
    assert "finished at step 6" in out and events(config.folder)[-1]["event"] == "end"
    assert left_over(place, there_before) == []


def test_a_user_error_on_two_ranks_is_one_line_and_the_launcher_fails(place, there_before):
    config = place.config(train={"batch_size": 6, "micro_batch": 2})
    # each rank ends with 2; DeepSpeed's launcher passes on the first code that is not 0
    out, err = launch(place.write(config), 2, code=2)
    told = [line for line in (out + err).splitlines() if "moect: error" in line]
    assert len(told) == 1 and "`train.batch_size` 6 is no multiple of `train.micro_batch` x ranks = 2 x 2" in told[0]
    assert "Traceback" not in out + err
    assert not config.folder.exists() and left_over(place, there_before) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("variant", ["gate", "everything"])
def test_every_stage_and_precision_resumes_exactly_on_every_number_of_ranks(place, stage, precision, ranks, variant):
    sections = EVERYTHING if variant == "everything" else {}
    settings = {"zero_stage": stage, "precision": precision, "micro_batch": 2}
    launch(place.write(place.config("whole", **sections, train=settings)), ranks)
    path = place.write(place.config("run", **sections, train=settings))
    launch(path, ranks, "train.stop_after=3")
    launch(path, ranks, "resume=auto")
    run, whole = place.output / "run", place.output / "whole"
    assert losses(run) == losses(whole)
    assert_same_bits(run, whole, 6)
    alone = train(place.config("alone", **sections, train={**settings, "zero_stage": 2}))
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4 if precision == "fp32" else 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks_keeps_the_losses(place, ranks):
    path = place.write(place.config(**EVERYTHING, train={"micro_batch": 2}))
    launch(path, ranks[0], "train.stop_after=3")
    launch(path, ranks[1], "resume=auto")
    alone = train(place.config("alone", **EVERYTHING, train={"micro_batch": 2}))
    assert losses(place.output / "run") == pytest.approx(losses(alone), abs=1e-4)


@pytest.mark.slow
def test_one_run_over_1_2_4_and_1_ranks_and_zero_1_3_2_and_1_loses_nothing(place):
    """Twenty steps each; against a run on one rank that was never interrupted."""
    settings = {"steps": 80, "batch_size": 8, "micro_batch": 2, "save_every": 20, "keep_last": 0}
    whole = train(place.config("whole", **EVERYTHING, train={**settings, "zero_stage": 1}))
    path = place.write(place.config(**EVERYTHING, train=settings))
    run = place.output / "run"
    for leg, (ranks, stage) in enumerate([(1, 1), (2, 3), (4, 2), (1, 1)], 1):
        more = [f"train.zero_stage={stage}", f"train.stop_after={20 * leg}", "resume=auto"]
        launch(path, ranks, *more)
        info = read_info(checkpoint(run, 20 * leg))
        assert info["world_size"] == ranks and info["config"]["train"]["zero_stage"] == stage
        # the same rows of the same documents: the position is that of the run on one rank, and so are its tokens
        assert info["data"] == read_info(checkpoint(whole, 20 * leg))["data"]
    for step, line in figures(whole).items():
        assert figures(run)[step]["tokens_seen"] == line["tokens_seen"]
        for key in FIGURES:
            assert figures(run)[step][key] == pytest.approx(line[key], abs=1e-4), (step, key)
