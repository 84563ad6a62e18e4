"""Bad steps are skipped and leave no trace; after too many the run goes back, whatever interrupts it."""

from __future__ import annotations

import json
import logging
import math
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import Place, assert_same_bits, checkpoint, events, figures, launch, tensors

from moect.errors import TrainingError
from moect.health_config import HealthConfig
from moect.monitor.reporting.page.report import write_report
from moect.monitor.reporting.run_files import read_run
from moect.train.health.judge import Judge
from moect.train.health.step_guard import StepGuard
from moect.train.loop import train
from moect.train.objective import Objective
from moect.train.step import Steps

BIAS = {"moe": {"fusion": "add", "balance": "bias", "experts": 4}, "loss": {"bias_rate": 0.01}}
SPIKE = 1e4
STACKS = [(0, "fp32", 1.0), (0, "bf16", 1.0), (1, "fp32", 0.0), (1, "bf16", 1.0), (2, "bf16", 0.0), (3, "fp32", 1.0)]
QUICK = ((0, "fp32", 1.0, SPIKE), (2, "bf16", 0.0, math.nan))  # one left out by us, one by DeepSpeed
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in ((*stack, factor) for stack in STACKS for factor in (math.nan, SPIKE))
]


def of_kind(run: Path, event: str) -> list[dict]:
    return [line for line in events(run) if line["event"] == event]


def info(run: Path, step: int) -> dict:
    return json.loads((checkpoint(run, step) / "checkpoint.json").read_text())


def poison(monkeypatch, steps: range, factor: float) -> None:
    """The loss of these steps, counted from 1 by their text, is so many times what it is."""
    plain_take, plain_forward = Steps.take, Objective.forward
    now = {}

    def take(self, step, notes):
        now["row"] = self.loader.rows // self.config.train.batch_size + 1
        return plain_take(self, step, notes)

    def forward(self, **arguments):
        loss = plain_forward(self, **arguments)
        if now.get("row") in steps:
            self.sums["cross_entropy"] = self.sums["cross_entropy"] * factor
            loss = loss * factor
        return loss

    monkeypatch.setattr(Steps, "take", take)
    monkeypatch.setattr(Objective, "forward", forward)


@pytest.mark.parametrize(("stage", "precision", "clip", "factor"), CASES)
def test_a_skipped_step_leaves_weights_moments_load_and_bias_as_they_were(
    place, monkeypatch, caplog, stage, precision, clip, factor
):
    health = {"window": 4, "sigma": 6.0}
    keys = {"zero_stage": stage, "precision": precision, "clip": clip, "steps": 6, "save_every": 1, "keep_last": 0}
    poison(monkeypatch, range(5, 6), factor)
    with caplog.at_level(logging.WARNING, "moect"):
        run = train(place.config(train=keys, health=health, **BIAS))
    before, after, later = (tensors(run, step) for step in (4, 5, 6))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert any(not after[name].equal(later[name]) for name in after if name.startswith("optimizer:"))
    assert [info(run, step)["optimizer_steps"] for step in (4, 5, 6)] == [4, 4, 5]
    assert [info(run, step)["skips_in_row"] for step in (4, 5, 6)] == [0, 1, 0]
    assert info(run, 5)["data"]["rows"] == 5 * 8
    (skip,) = of_kind(run, "skip")
    assert skip["step"] == 5 and skip["why"].startswith("loss nan" if math.isnan(factor) else "loss ")
    assert f"step 5 is skipped: {skip['why']}" in caplog.text
    if math.isnan(factor):
        assert figures(run)[5]["loss"] is None
    assert all(t.isfinite().all() for t in later.values())


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_goes_on_after_a_skipped_step_as_if_its_text_had_not_been(place, monkeypatch, stage):
    keys = {"zero_stage": stage, "steps": 5, "warmup": 0, "schedule": "constant", "save_every": 5}
    with monkeypatch.context() as patch:
        poison(patch, range(3, 4), math.nan)
        skipped = train(place.config("skipped", train=keys))
    plain_next = Steps.take

    def without_the_third(self, step, notes):
        if self.loader.rows == 2 * 8:
            self.loader.next_step()
        return plain_next(self, step, notes)

    monkeypatch.setattr(Steps, "take", without_the_third)
    other = train(place.config("other", train={**keys, "steps": 4, "save_every": 4}))
    mine, theirs = tensors(skipped, 5), tensors(other, 4)
    assert [name for name in mine if not mine[name].equal(theirs[name])] == []


SKIPPING = {"health": {"max_skips": 3}, "train": {"steps": 8, "save_every": 2, "keep_last": 0}}
BAD = range(6, 9)  # three steps of text: the run is at step 8 after them, having saved at 6


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The run that goes back once, and that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, BAD, math.nan)
        return train(Place(inputs, tmp_path_factory.mktemp("whole")).config(**SKIPPING))


def dies_after_skips(patch, where: str) -> None:
    """The run dies in the first call of a function after its third skipped step in a row."""
    holder, _, name = where.rpartition(".")
    target, skips = pkgutil.resolve_name(holder), []
    plain, plain_fault = getattr(target, name), Judge.fault

    def fault(self, loss, norm):
        why = plain_fault(self, loss, norm)
        skips.append(self.skips_in_row)
        return why

    def dying(*args, **kwargs):
        if 3 in skips:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    patch.setattr(Judge, "fault", fault)
    patch.setattr(target, name, dying)


def test_after_too_many_skips_the_run_goes_back_to_a_good_checkpoint_and_its_text_goes_on(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (back,) = of_kind(run, "rollback")
    assert (back["step"], back["from"], back["skipped"]) == (4, 8, 3) and back["why"].startswith("loss nan")
    assert info(run, 8)["data"]["rows"] == (8 + 4) * 8 and info(run, 8)["health_rollbacks"] == 1
    assert info(run, 8)["optimizer_steps"] == 8 and info(run, 8)["skips_in_row"] == 0
    read = read_run(run)
    assert [line["step"] for line in read.log.figures] == [1, 2, 3, 4, 5, 6, 7, 8] and read.log.steps_undone == 4
    report = next(path for path in write_report(run) if path.suffix == ".md").read_text(encoding="utf-8")
    assert "back to step 4, the text goes on" in report and "3 steps skipped in a row" in report


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("moect.train.health.rollback.newest_sound", marks=pytest.mark.slow),
        pytest.param("moect.train.loop.go_back", marks=pytest.mark.slow),
        "moect.train.checkpoints.saver.Saver.save",
        "moect.train.undo.undo_after",
        pytest.param("moect.train.undo.remove", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_in_going_back_a_run_ends_with_the_same_bits(place, whole, monkeypatch, where):
    poison(monkeypatch, BAD, math.nan)
    with monkeypatch.context() as patch:
        dies_after_skips(patch, where)
        with pytest.raises(KeyboardInterrupt):
            train(place.config("killed", **SKIPPING))
    run = train(place.config("killed", **SKIPPING, resume="auto"))
    assert_same_bits(run, whole, 8)
    assert info(run, 8)["data"] == info(whole, 8)["data"] and info(run, 8)["health_rollbacks"] == 1
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{n}" for n in (2, 4, 6, 8)]
    read = read_run(run)
    assert [line["step"] for line in read.log.figures] == [1, 2, 3, 4, 5, 6, 7, 8] and read.log.steps_undone == 4


@pytest.mark.slow
def test_killed_between_two_skipped_steps_a_run_counts_on(place, whole, monkeypatch):
    poison(monkeypatch, BAD, math.nan)
    plain = Steps.take

    def dying(self, step, notes):
        if step == 6:  # there is a checkpoint after the first of the three
            raise KeyboardInterrupt
        return plain(self, step, notes)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", dying)
        with pytest.raises(KeyboardInterrupt):
            train(place.config("killed", **SKIPPING))
    assert info(place.output / "killed", 6)["skips_in_row"] == 1
    assert_same_bits(train(place.config("killed", **SKIPPING, resume="auto")), whole, 8)


def test_going_back_has_an_end_that_says_what_to_do(place, monkeypatch, caplog):
    poison(monkeypatch, range(6, 1000), math.nan)
    parts = {**SKIPPING, "health": {"max_skips": 3, "max_rollbacks": 1}}
    message = (
        r"ends at step 7: 3 steps were skipped in a row \(the last: loss nan\), and it was sent back as often as "
        r"health.max_rollbacks allows \(1\); lower train.lr, lengthen train.warmup, or look at the text of the steps "
        r"from 5 on \(rows 64 to 87\), then go on with resume=auto"
    )
    with caplog.at_level(logging.WARNING, "moect"), pytest.raises(TrainingError, match=message):
        train(place.config(**parts))
    back_to = checkpoint(place.output / "run", 4)
    assert f"step 8: 3 steps skipped in a row; back to {back_to}, the text goes on" in caplog.text
    with pytest.raises(TrainingError, match=message):
        train(place.config(**parts, resume="auto"))
    assert all(t.isfinite().all() for name, t in tensors(place.output / "run", 4).items())


@pytest.mark.slow
def test_without_a_checkpoint_to_go_back_to_the_run_ends_on_all_ranks_with_one_line(place):
    keys = {"lr": 1e30, "warmup": 0, "save_every": 100, "steps": 100, "zero_stage": 2}
    config = place.config(method="full", train=keys, health={"max_skips": 2})
    _, err = launch(place.write(config), 2, code=2)
    (line,) = [line for line in err.splitlines() if "moect: error" in line]
    assert "2 steps were skipped in a row" in line and "there is no checkpoint from before them to go back to" in line
    assert "Traceback" not in err
    assert not list((config.folder / "checkpoints").glob("step-*"))


def test_a_run_resumes_when_the_text_that_comes_first_is_the_bad_one(place, monkeypatch):
    poison(monkeypatch, range(5, 6), math.nan)
    keys = {"steps": 6, "save_every": 2, "keep_last": 0}
    one = train(place.config("one", train=keys))
    train(place.config("two", train={**keys, "stop_after": 4}))
    assert_same_bits(train(place.config("two", train=keys, resume="auto")), one, 6)


def test_the_judge_compares_with_mean_and_deviation_of_steps_that_were_taken():
    judge = Judge(HealthConfig(window=8, sigma=2.0))
    losses, norms = [2.0, 2.2, 1.8, 50.0], [1.0, 1.2, 0.8, 1.0]
    assert [judge.fault(*step) for step in zip(losses, norms, strict=True)] == [None] * 4  # no half window before
    past = torch.tensor(norms, dtype=torch.float64)
    limit = (past.mean() + 2 * past.std(correction=0)).item()
    assert judge.fault(2.0, limit * 1.001) == f"norm {limit * 1.001:.6g} > {limit:.6g}, the mean + 2 sigma"
    assert judge.fault(2.0, math.inf) == "norm inf" and judge.fault(math.nan, 1.0) == "loss nan"
    assert (judge.taken, judge.skips_in_row) == (4, 3)
    assert judge.fault(2.0, limit * 0.999) is None
    assert (judge.taken, judge.skips_in_row) == (5, 0)
    assert judge.tensors()["health"].tolist() == [[*losses, 2.0], [*norms, limit * 0.999]]


def test_the_judge_s_history_survives_a_checkpoint_and_is_empty_where_there_is_none():
    health = HealthConfig(window=4)
    judge, again = Judge(health), Judge(health)
    for value in (1.0, 1.1, 1.2, 1.3, 1.4):
        judge.fault(value, value)
    again.load(judge.tensors(), {"step": 7, **judge.values()})
    assert (again.taken, again.skips_in_row) == (5, 0)
    assert again.tensors()["health"].equal(judge.tensors()["health"]) and again.tensors()["health"].shape == (2, 4)
    again.load({}, {"step": 7})
    assert (again.taken, again.skips_in_row, again.tensors()["health"].shape) == (7, 0, (2, 0))


def test_no_sigma_means_that_only_what_is_not_finite_is_skipped():
    judge = Judge(HealthConfig(window=2, sigma=None))
    assert [judge.fault(loss, 1.0) for loss in (1.0, 1.1, 1e9, math.inf)] == [None, None, None, "loss inf"]


def test_a_guarded_optimizer_is_the_plain_one_but_for_the_steps_it_leaves_out():
    torch.manual_seed(0)
    ours, plain = (torch.nn.Linear(4, 3) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    mine, theirs = (torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1) for model in (ours, plain))
    guard = StepGuard(mine)
    for number in range(5):
        x = torch.randn(8, 4)
        for model in (ours, plain):
            model.zero_grad()
            model(x).square().sum().backward()
        with guard.judged(lambda take=number != 2: take) as asked:
            mine.step()
        assert asked()
        if number != 2:
            theirs.step()
    assert all(a.equal(b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


@pytest.mark.slow
def test_a_change_of_the_mixture_begins_the_history_anew(place):
    keys = {"steps": 6, "save_every": 2, "keep_last": 0}
    train(place.config(train={**keys, "stop_after": 4}))
    run = train(place.config(train=keys, data={"replay": 0.5}, resume="auto"))
    assert [tensors(run, step, "trainer")["trainer:health"].shape[1] for step in (4, 6)] == [4, 2]
