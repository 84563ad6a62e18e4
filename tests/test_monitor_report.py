"""The report of a run's folder, written from files as a run leaves them."""

from __future__ import annotations

import json

import pytest
from matplotlib import image
from monitor_texts import run_config

from moect.config import config_to_yaml
from moect.errors import ConfigError
from moect.monitor.reporting.report import read_log, write_report
from moect.monitor.rows import replace_rows


def write_log(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "log.jsonl"


def loss(step, value):
    return {"step": step, "loss": value, "lr": 1e-3, "tokens_per_second": 1000.0 + step}


def row(step, lang, role, bits, base_bits, **more):
    change = {"retention": base_bits / bits} if role == "old" else {"gain": 1 - bits / base_bits}
    values = {"step": step, "lang": lang, "role": role, "domain": "held-out", "bytes": 12345, "documents": 50, **change}
    return {**values, "bits_per_byte": bits, "base_bits_per_byte": base_bits, "delta": bits - base_bits, **more}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "test"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_to_yaml(run_config()))
    return folder


def fill(run):
    write_log(
        run,
        {"event": "start", "step": 0},
        *[loss(s, 5 - s / 10) for s in range(1, 11)],
        {"event": "checkpoint", "step": 10},
        loss(11, 99.0),
        {"event": "checkpoint", "step": 12},
        {"event": "resume", "step": 10},
        *[loss(s, 5 - s / 10) for s in range(11, 21)],
        {"event": "checkpoint", "step": 20},
    )
    for step, en, cy in ((0, 1.0, 4.0), (10, 1.25, 3.0), (12, 7.7777, 7.7777), (20, 1.2, 2.0)):
        exact = {"exact_match": step / 40, "base_exact_match": 0.0}
        replace_rows(run / "monitor", [row(step, "en", "old", en, 1.0), row(step, "cy", "new", cy, 4.0, **exact)])


def test_report_has_first_and_last_checkpoint_of_every_language(run):
    fill(run)
    text = write_report(run).read_text(encoding="utf-8")
    last, first = text.split("### Step 20")[1].split("### Step 0")
    assert "| en | old | held-out | 50 | 12,345 | 1.0000 | 1.2000 | +0.2000 | 83.33% |  |" in last
    assert "| cy | new | held-out | 50 | 12,345 | 4.0000 | 2.0000 | -2.0000 |  | 50.00% | 0.0% | 50.0% |" in last
    assert "| en | old | held-out | 50 | 12,345 | 1.0000 | 1.0000 | +0.0000 | 100.00% |  |" in first
    assert "Loss 4.9000 at step 1, 3.0000 at step 20." in text
    assert "| steps | 20 of 20 |" in text
    for name in ("bits per byte", "delta", "retention", "gain", "exact match", "gate"):
        assert f"- **{name}**" in text
    assert f"`moect report {run}`" in text


def test_report_embeds_plots_that_are_there_and_not_blank(run):
    fill(run)
    text = write_report(run).read_text(encoding="utf-8")
    for name in ("loss", "forgetting", "last"):
        assert f"(plots/{name}.png)" in text
        pixels = image.imread(run / "plots" / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].min() < 0.2


def test_steps_that_a_resume_went_back_behind_are_left_out(run):
    fill(run)
    records, superseded, cut = read_log(run / "log.jsonl")
    assert [r["step"] for r in records] == list(range(1, 21))
    assert all(r["loss"] < 5 for r in records)
    assert (superseded, cut) == ({12}, 0)
    assert "7.7777" not in write_report(run).read_text()


def test_a_checkpoint_that_was_made_again_is_not_left_out(run):
    again = [{"event": "checkpoint", "step": s} for s in (10, 20)]
    path = write_log(run, *again, {"event": "resume", "step": 10}, {"event": "checkpoint", "step": 20})
    assert read_log(path)[1] == set()


def test_a_line_that_a_crash_cut_off_is_counted_and_said(run, caplog):
    write_log(run, loss(1, 5.0), '{"step": 2, "lo', loss(3, 4.0), "[1]")
    text = write_report(run).read_text()
    assert "2 line(s) of log.jsonl, cut off by a crash, are left out." in text
    assert "2 line(s) are not whole JSON objects" in caplog.text
    assert "Loss 5.0000 at step 1, 4.0000 at step 3." in text


def test_a_run_without_results_has_a_report_that_says_so(run):
    text = write_report(run).read_text()
    assert "The monitor has measured nothing yet." in text
    assert "No step was logged yet." in text
    assert not (run / "plots").exists()


def test_the_plan_adds_parameters_and_ranks(run):
    plan = {"parameters": {"total": 1500, "trainable": 500, "active": 1200}, "ranks": 2, "zero_stage": 1}
    (run / "plan.json").write_text(json.dumps(plan))
    text = write_report(run).read_text()
    assert "| parameters | 1,500 total, 500 trainable, 1,200 active per token |" in text
    assert "| ranks | 2, ZeRO 1 |" in text


def test_a_report_is_written_again_in_place(run):
    fill(run)
    assert write_report(run).read_text() == write_report(run).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not the folder of a run, it has no config.yaml"):
        write_report(tmp_path)
