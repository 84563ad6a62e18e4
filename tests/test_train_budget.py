"""What a run does when an old language lost more than it may: warn, replay more, go back, or end; and what survives."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest
from export_helpers import export_run
from small_runs import Place, assert_same_bits, checkpoint, events, figures, launch, tensors

from moect import distributed
from moect.config import load_config
from moect.errors import DataError, ExportError, ForgettingError
from moect.evaluate import evaluate_run
from moect.export.checkpoint_choice import choose_checkpoint
from moect.monitor.rows import read_rows
from moect.monitor.verdict import verdicts
from moect.stages import load_stages, run_stages
from moect.train.budget import act
from moect.train.loop import Run, train
from moect.train.step import Steps
from moect.train.undo import keep_course

LIMIT = 0.1  # bits per byte: en is within it at step 2, and not at step 4
QUICK = {"samples": 0, "resamples": 0}


def sections(**monitor):
    """A run that forgets English step by step."""
    return {
        "method": "full",
        "data": {"replay": 0.125},
        "train": {"steps": 8, "lr": 0.01, "warmup": 0, "save_every": 2, "keep_last": 0},
        "monitor": {"enabled": True, **QUICK, **monitor},
    }


def rows(run, lang="en"):
    return {row["step"]: row for row in read_rows(run / "monitor") if row["lang"] == lang}


def of_kind(run, event):
    return [line for line in events(run) if line["event"] == event]


class TaughtPlace(Place):
    """A place whose base has learned English, so that there is something to forget."""

    def values(self, name="run", **sections):
        return super().values(name, **{"model": {"base": str(self.inputs / "taught")}, **sections})


@pytest.fixture(scope="module")
def taught(inputs, tmp_path_factory):
    """The usual inputs, and a base trained on the English of them."""
    folder = tmp_path_factory.mktemp("taught")
    english = {"languages": {"en": "old"}, "train": [{"path": "en.train.jsonl", "lang": "en"}], "evaluation": []}
    steps = {"steps": 60, "lr": 0.01, "save_every": 60, "log_every": 60}
    config = Place(inputs, folder).config(method="full", data={**english, "replay": None}, train=steps)
    both = shutil.copytree(inputs, folder / "inputs")
    export_run(train(config), output=both / "taught")
    return both


@pytest.fixture
def place(taught, tmp_path, monkeypatch):
    monkeypatch.delenv("MOECT_DATA", raising=False)
    return TaughtPlace(taught, tmp_path)


@pytest.fixture(scope="module")
def free(taught, tmp_path_factory):
    """The course of the run without any limit."""
    return train(TaughtPlace(taught, tmp_path_factory.mktemp("free")).config(**sections()))


def test_the_run_forgets_as_these_tests_need_it(free):
    deltas = {step: row["delta"] for step, row in rows(free).items()}
    assert deltas[0] == 0 and 0 < deltas[2] < LIMIT < deltas[4] and LIMIT < deltas[6]
    assert all(line["within"] for line in of_kind(free, "verdict"))


def test_a_warning_names_language_loss_and_limit_and_the_run_goes_on(place, free, caplog):
    with caplog.at_level(logging.WARNING, "moect"):
        run = train(place.config(**sections(max_forgetting=LIMIT)))
    assert_same_bits(run, free, 8)
    assert f"beyond monitor.max_forgetting: en held-out {rows(run)[4]['delta']:+.4f} bits per byte" in caplog.text
    assert [line["within"] for line in of_kind(run, "verdict")] == [True, True, False, False, False]
    assert of_kind(run, "action") == []


def test_more_replay_changes_the_mixture_from_the_next_step_on(place, free, caplog):
    with caplog.at_level(logging.WARNING, "moect"):
        run = train(place.config(**sections(max_forgetting=LIMIT, action="replay", replay_factor=3.0, max_replay=0.6)))
    assert [(line["step"], line["replay"]) for line in of_kind(run, "action")] == [(4, 0.375), (6, 0.6)]
    assert "replay 12.5% -> 37.5%" in caplog.text
    shares = {step: values["old_share"] for step, values in figures(run).items()}
    plain = {step: values["old_share"] for step, values in figures(free).items()}
    assert [shares[step] for step in (1, 2, 3, 4)] == [plain[step] for step in (1, 2, 3, 4)]
    assert min(shares[5], shares[6]) > 0.3 > max(plain.values()) and min(shares[7], shares[8]) > 0.5
    assert rows(run)[8]["delta"] < rows(free)[8]["delta"]


def test_replay_that_was_raised_is_raised_again_by_a_run_that_was_killed_after_it(place, monkeypatch):
    monitor = {"max_forgetting": LIMIT, "action": "replay"}
    whole = train(place.config(**sections(**monitor)))
    steps, plain = [], Steps.take

    def dying(self, step, notes):
        steps.append(step)
        if step == 5:
            raise KeyboardInterrupt
        return plain(self, step, notes)

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", dying)
        with pytest.raises(KeyboardInterrupt):
            train(place.config("killed", **sections(**monitor)))
    assert steps == [0, 1, 2, 3, 4, 5]
    run = train(place.config("killed", **sections(**monitor), resume="auto"))
    assert [line["step"] for line in of_kind(run, "action")] == [4, 4, 6]
    assert_same_bits(run, whole, 8)
    assert read_rows(run / "monitor") == read_rows(whole / "monitor")


@pytest.mark.slow  # the loader's own tests cover it in milliseconds
def test_checkpoints_made_after_replay_was_raised_keep_it(place):
    parts = sections(max_forgetting=LIMIT, action="replay")
    train(place.config(**{**parts, "train": {**parts["train"], "stop_after": 5}}))
    run = train(place.config(**{**parts, "monitor": {"enabled": False}}, resume="auto"))
    assert min(figures(run)[step]["old_share"] for step in (6, 7, 8)) > 0.2  # raised at 4, and 5 was saved with it


@pytest.mark.slow  # the loader's own tests cover it in milliseconds
def test_a_configuration_with_another_replay_wins_over_one_that_was_raised(place):
    monitor = {"max_forgetting": LIMIT, "action": "replay"}
    parts = sections(**monitor)
    train(place.config(**{**parts, "train": {**parts["train"], "stop_after": 5}}))
    parts["monitor"] |= {"max_forgetting": 9.0}
    run = train(place.config(**{**parts, "data": {"replay": 0.75}}, resume="auto"))
    assert min(figures(run)[step]["old_share"] for step in (6, 7, 8)) > 0.6


def test_going_back_takes_the_best_checkpoint_and_lets_the_text_go_on(place, free, caplog):
    config = place.config(**sections(max_forgetting=LIMIT, action="rollback", replay_factor=4.0, max_replay=0.9))
    with caplog.at_level(logging.WARNING, "moect"):
        run = train(config)
    (first, *more) = of_kind(run, "action")
    assert (first["action"], first["from"], first["step"], first["to"]) == ("rollback", 4, 2, 2)
    assert first["replay"] == 0.5 and len(more) <= config.monitor.max_rollbacks
    assert f"back to {run}/checkpoints/step-2, replay 50.0%, the text goes on" in caplog.text
    assert rows(run)[8]["delta"] < LIMIT  # that is what it was for
    assert max(figures(run)) == 8
    position = json.loads((checkpoint(run, 8) / "checkpoint.json").read_text())
    assert position["data"]["rows"] == 8 * (8 + 2 * (1 + len(more)))  # two steps of text for every time it went back
    assert position["rollbacks"] == 1 + len(more)


@pytest.mark.slow
def test_the_checkpoint_gone_back_to_has_its_weights_and_the_position_of_now(place, free):
    run = train(place.config(**sections(max_forgetting=LIMIT, action="rollback"), resume="auto"))
    mine, theirs = tensors(run, 2, "module", "optimizer"), tensors(free, 2, "module", "optimizer")
    assert all(mine[name].equal(theirs[name]) for name in theirs)
    info = json.loads((checkpoint(run, 2) / "checkpoint.json").read_text())
    assert info["data"]["rows"] > 16 and info["data"]["replay"]["now"] > 0.125


def interrupted_at(monkeypatch, name, count=1):
    """The run dies when it calls this function of moect.train.undo for the so many-th time."""
    import moect.train.undo as module

    plain, calls = getattr(module, name), []

    def dying(*args):
        calls.append(name)
        if len(calls) == count:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(module, name, dying)


def test_killed_while_it_goes_back_a_run_ends_with_the_same_bits(place, monkeypatch):
    monitor = {"max_forgetting": LIMIT, "action": "rollback"}
    whole = train(place.config(**sections(**monitor)))
    with monkeypatch.context() as patch:
        interrupted_at(patch, "undo_after")
        with pytest.raises(KeyboardInterrupt):
            train(place.config("killed", **sections(**monitor)))
    run = train(place.config("killed", **sections(**monitor), resume="auto"))
    assert_same_bits(run, whole, 8)
    assert read_rows(run / "monitor") == read_rows(whole / "monitor")
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        p.name for p in sorted((whole / "checkpoints").iterdir())
    ]


def test_killed_before_it_judges_a_run_judges_when_it_resumes(place, monkeypatch):
    monitor = {"max_forgetting": LIMIT, "action": "rollback"}
    whole = train(place.config(**sections(**monitor)))
    calls = []

    def dying(run, rows):
        calls.append(rows[0]["step"])
        if rows[0]["step"] == 4:
            raise KeyboardInterrupt
        act(run, rows)

    with monkeypatch.context() as patch:
        patch.setattr("moect.train.loop.act", dying)
        with pytest.raises(KeyboardInterrupt):
            train(place.config("killed", **sections(**monitor)))
    assert calls == [0, 2, 4]
    run = train(place.config("killed", **sections(**monitor), resume="auto"))
    assert_same_bits(run, whole, 8)


def test_killed_while_a_checkpoint_takes_the_place_of_another_a_run_finds_the_one_that_was_there(place, monkeypatch):
    monitor = {"max_forgetting": LIMIT, "action": "rollback"}
    whole = train(place.config(**sections(**monitor)))
    plain = os.rename

    def dying(source, target):
        if ".writing-step-2" in str(source) and any("step-2" in p.name for p in target.parent.glob(".replaced-*")):
            raise KeyboardInterrupt
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            train(place.config("killed", **sections(**monitor)))
    run = place.output / "killed"
    assert not checkpoint(run, 2).exists()
    train(place.config("killed", **sections(**monitor), resume="auto"))
    assert_same_bits(run, whole, 8)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_not_gone_back_to(place, caplog, monkeypatch):
    config = place.config(**sections(max_forgetting=LIMIT, action="rollback"))
    calls = []

    def damaging(run, rows):
        calls.append(rows[0]["step"])
        if rows[0]["step"] == 4:
            path = checkpoint(config.folder, 2) / "module.safetensors"
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(bytes(content))
        act(run, rows)

    monkeypatch.setattr("moect.train.loop.act", damaging)
    with caplog.at_level(logging.WARNING, "moect"), pytest.raises(ForgettingError, match="no checkpoint is within it"):
        train(config)
    assert "step-2: the best checkpoint, but module.safetensors is damaged" in caplog.text
    assert calls == [0, 2, 4]


def test_checkpoints_of_later_steps_do_not_push_new_ones_out(place):
    parts = sections()
    parts["train"] |= {"keep_last": 1, "save_every": 4}
    run = train(place.config(**{**parts, "monitor": {"enabled": False}, "train": {**parts["train"], "keep_last": 0}}))
    checkpoint(run, 8).rename(checkpoint(run, 9))
    (checkpoint(run, 9) / "checkpoint.json").write_text("{")
    fresh = {**parts, "monitor": {"enabled": False}, "train": {**parts["train"], "steps": 8, "save_every": 2}}
    train(place.config(**fresh, resume="auto"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-8", "step-9"]


def test_measurements_of_an_abandoned_course_are_not_taken_for_those_of_another(place, monkeypatch):
    parts = sections()
    run = train(place.config(**parts))
    stale = rows(run)[8]["bits_per_byte"]
    shutil.rmtree(checkpoint(run, 8))
    parts["train"] |= {"lr": 0.02}
    with monkeypatch.context() as patch:  # killed between the last checkpoint and its measurement
        patch.setattr(Run, "_measure", lambda run, **how: None)
        train(place.config(**parts, resume="auto"))
    assert 8 not in rows(run)
    train(place.config(**parts, resume="auto"))
    assert rows(run)[8]["bits_per_byte"] != stale


def test_a_step_whose_samples_were_written_and_whose_rows_were_not_is_measured_again(place, monkeypatch):
    import moect.monitor.forgetting as forgetting

    plain = forgetting.replace_rows

    def dying(folder, made, name="forgetting.jsonl"):
        if name == "forgetting.jsonl" and made[0]["step"] == 4:
            raise KeyboardInterrupt
        plain(folder, made, name)

    parts = sections(samples=1, sample_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(forgetting, "replace_rows", dying)
        with pytest.raises(KeyboardInterrupt):
            train(place.config(**parts))
    run = train(place.config(**parts, resume="auto"))
    for name in ("forgetting.jsonl", "samples.jsonl"):
        assert sorted({row["step"] for row in read_rows(run / "monitor", name)}) == [0, 2, 4, 6, 8]


def test_an_evaluation_with_other_settings_changes_nothing_that_a_resumed_run_does(place):
    parts = sections(max_forgetting=LIMIT, action="replay")
    half = {**parts, "train": {**parts["train"], "stop_after": 4}}
    for name in ("plain", "evaluated"):
        train(place.config(name, **half))
    run = place.output / "evaluated"
    before = read_rows(run / "monitor")
    evaluate_run(run, "step-4", ["monitor.window=4"])
    evaluate_run(run, "step-2", ["data.evaluation=[{path: cy.test.jsonl, lang: en}]"])
    assert read_rows(run / "monitor") == before
    apart = read_rows(run / "monitor", "evaluations.jsonl")
    assert [(row["step"], row["lang"]) for row in apart] == [(2, "en"), (4, "en"), (4, "cy")]
    train(place.config("plain", **parts, resume="auto"))
    assert_same_bits(train(place.config("evaluated", **parts, resume="auto")), place.output / "plain", 8)


def test_a_text_that_was_measured_at_one_checkpoint_alone_does_not_decide_which_is_best(free, place):
    run = place.output / "free"
    shutil.copytree(free, run)
    config = load_config(run / "config.yaml")
    best = choose_checkpoint(run, config).name
    evaluate_run(run, best, ["data.evaluation=[{path: en.test.jsonl, lang: cy, domain: hard}]"])
    assert choose_checkpoint(run, config).name == best


@pytest.mark.slow
def test_after_so_many_times_back_the_run_ends(place):
    monitor = {"max_forgetting": LIMIT, "action": "rollback", "max_rollbacks": 1, "max_replay": 0.126}
    with pytest.raises(
        ForgettingError, match=r"sent back as often as monitor.max_rollbacks allows \(1\); the best within it is step-"
    ):
        train(place.config(**sections(**monitor)))


def test_where_no_checkpoint_is_within_the_limit_there_is_nothing_to_go_back_to(place):
    with pytest.raises(ForgettingError, match="no checkpoint is within it"):
        train(place.config(**sections(max_forgetting=0.0001, action="rollback")))


def test_stop_ends_the_run_with_one_line_and_a_report_and_so_does_a_resume_until_the_limit_is_raised(place):
    path = place.write(place.config(**sections(max_forgetting={"en": "0.5%", "*": 1.0}, action="stop")))
    _, err = launch(path, 1, code=2)
    (line,) = [line for line in err.splitlines() if "moect: error" in line]
    assert "ends at step 2, beyond monitor.max_forgetting: en held-out +" in line and "limit 0.5%" in line
    assert "no checkpoint is within it" in line
    run = place.output / "run"
    assert (run / "report.md").is_file() and events(run)[-1] == {"event": "stop", "step": 2}
    again = lambda *overrides: run_stages(load_stages(path, ["resume=auto", *overrides]))  # noqa: E731
    with pytest.raises(ForgettingError, match="ends at step 2"):
        again()
    with pytest.raises(ForgettingError, match="the best within it is step-2, which `moect export` takes"):
        again(f"monitor.max_forgetting={LIMIT}")
    again("monitor.max_forgetting=100%")
    assert events(run)[-1] == {"event": "end", "step": 8}


def test_the_best_checkpoint_outlives_the_newer_ones_and_is_what_export_takes(place, caplog):
    parts = sections(max_forgetting=LIMIT)
    run = train(place.config(**{**parts, "train": {**parts["train"], "keep_last": 1}}))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-2", "step-8"]
    config = load_config(run / "config.yaml")
    with caplog.at_level(logging.INFO, "moect"):
        assert choose_checkpoint(run, config).name == "step-2"
    assert "is the best checkpoint within the budget; step-8 is newer (--checkpoint takes it)" in caplog.text
    assert choose_checkpoint(run, config, "step-8").name == "step-8"
    (checkpoint(run, 2) / "module.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="none of step-8, step-2 is whole and within monitor.max_forgetting"):
        choose_checkpoint(run, config)
    assert "the best checkpoint, but module.safetensors is damaged (its checksum differs); passed over" in caplog.text


def test_export_refuses_to_choose_where_nothing_is_within_the_limit(free, place):
    run = place.output / "free"
    shutil.copytree(free, run)
    with pytest.raises(ExportError, match="none of step-8, step-6, step-4, step-2 is whole and within"):
        choose_checkpoint(run, load_config(run / "config.yaml", ["monitor.max_forgetting=0"]))


def test_the_best_has_the_greatest_gain_among_those_within_the_limit(free):
    gains = {step: row["gain"] for step, row in rows(free, "cy").items()}
    config = load_config(free / "config.yaml")
    assert choose_checkpoint(free, config).name == f"step-{max((2, 4, 6, 8), key=lambda s: (gains[s], s))}"
    assert [v.gain for v in verdicts(read_rows(free / "monitor"), config)] == [gains[s] for s in (0, 2, 4, 6, 8)]


def test_limits_may_be_shares_of_the_bases_bits_and_differ_by_language(free):
    row = rows(free)[4]
    share = row["delta"] / row["base_bits_per_byte"]
    for limits, within in (
        (f"{100 * share + 0.1}%", True),
        (f"{100 * share - 0.1}%", False),
        (row["delta"] + 1e-6, True),
        (row["delta"] - 1e-6, False),
        ({"*": 0.0}, False),
        ({"en": 99.0, "*": 0.0}, True),
    ):
        config = load_config(free / "config.yaml", [f"monitor.max_forgetting={json.dumps(limits)}"])
        by_step = {v.step: v for v in verdicts(read_rows(free / "monitor"), config)}
        assert by_step[4].within == within


FAILING = """
import os, sys
from moect.cli import process
import moect.monitor.forgetting, moect.monitor.measuring.base, moect.train.watch

def fails_at(module, name, call, rank):
    plain, calls = getattr(module, name), []
    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and os.environ.get("RANK", "0") == rank:
            raise RuntimeError(f"{name} ran out of memory")
        return plain(*args, **kwargs)
    setattr(module, name, failing)

last = os.environ["LAST_RANK"]
fails_at(moect.monitor.forgetting, "add_up", 4, last)                # base, step 0, step 2, step 4
fails_at(moect.monitor.measuring.base, "load_base", 4, last)         # step 0, 2, 4, 6
fails_at(moect.train.watch, "write_scalars", 3, "0")                 # step 0, 2, 8
process(["train", *sys.argv[1:]])
"""


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_monitor_that_fails_on_one_rank_does_not_end_the_run_or_change_its_bits(place, free, ranks, monkeypatch):
    config = place.config(**sections())
    script = place.output / "failing.py"
    script.write_text(FAILING)
    monkeypatch.setenv("LAST_RANK", str(max(0, ranks - 1)))
    _, err = launch(place.write(config), ranks, script=script)
    run = config.folder
    for step, name in ((4, "add_up"), (6, "load_base")):
        assert f"the monitor failed at step {step}, and the run goes on: " in err and f"{name} ran out" in err
    assert "step 8 was measured, but could not be shown" in err
    assert [line["step"] for line in of_kind(run, "monitor failed")] == [4, 6]
    assert sorted(rows(run)) == [0, 2, 8]
    if not ranks:
        assert_same_bits(run, free, 8)


def test_a_damaged_file_of_measurements_ends_no_run_but_one_with_a_budget_does_not_start(place, caplog):
    parts = sections()
    train(place.config(**{**parts, "train": {**parts["train"], "stop_after": 4}}))
    path = place.output / "run" / "monitor" / "forgetting.jsonl"
    path.write_text(path.read_text() + "{\n")
    limited = sections(max_forgetting=LIMIT, action="stop")
    with pytest.raises(DataError, match=r"forgetting.jsonl:\d+: not a row of the monitor; remove the line"):
        train(place.config(**limited, resume="auto"))
    with pytest.raises(DataError, match="not a row of the monitor; remove the line"):
        evaluate_run(place.output / "run", "step-4")
    with caplog.at_level(logging.WARNING, "moect"):
        run = train(place.config(**parts, resume="auto"))
    assert "the monitor failed at step 8, and the run goes on" in caplog.text
    assert "not a row of the monitor" in caplog.text
    assert checkpoint(run, 8).is_dir()


def test_at_the_last_step_there_is_no_replay_to_raise(place, caplog):
    parts = sections(max_forgetting=0.0, action="replay")
    parts["train"] |= {"steps": 4}
    with caplog.at_level(logging.WARNING, "moect"):
        run = train(place.config(**parts))
    assert "step 4: beyond monitor.max_forgetting" in caplog.text
    assert [line["step"] for line in of_kind(run, "action")] == [2]


def test_a_checkpoint_that_a_run_was_sent_back_to_is_not_judged_twice(place):
    """Replay is raised at step 2; later skipped steps send the run back to it; killed, it resumes from there."""
    parts = sections(max_forgetting=LIMIT, action="replay")
    run = train(place.config(**{**parts, "train": {**parts["train"], "stop_after": 4}}))
    raised = [line["replay"] for line in of_kind(run, "action")]
    again = Run(place.config(**parts, resume="auto"), *distributed.start())
    try:
        again._begin()
        assert [line["replay"] for line in of_kind(run, "action")] == [*raised, *raised[-1:]]  # not yet in a checkpoint
        keep_course(again)
    finally:
        again.close()
    share = again.loader.replay
    again = Run(place.config(**parts, resume="auto"), *distributed.start())
    try:
        again._begin()
        assert again.loader.replay == share
    finally:
        again.close()


def test_nothing_follows_from_a_checkpoint_that_is_there_only_because_the_run_was_stopped(place):
    parts = sections(max_forgetting=LIMIT, action="replay")
    whole = train(place.config("whole", **parts))
    train(place.config(**{**parts, "train": {**parts["train"], "stop_after": 5}}))
    run = train(place.config(**parts, resume="auto"))
    assert 5 in {row["step"] for row in read_rows(run / "monitor")}
    assert {line["step"] for line in of_kind(run, "action")} == {line["step"] for line in of_kind(whole, "action")}
    assert_same_bits(run, whole, 8)
