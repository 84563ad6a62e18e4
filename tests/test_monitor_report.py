"""The report of a run's folder, written from files as a run leaves them."""

from __future__ import annotations

import html
import json
import re

import pytest
from matplotlib import image
from report_runs import full_run, loss, make_run, row, write_log

from moect.errors import ConfigError, DataError
from moect.monitor.reporting.page.report import read_log, write_report
from moect.monitor.rows import replace_rows


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "test")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Page and Markdown of a run in which everything was measured."""
    page, text = write_report(full_run(tmp_path_factory.mktemp("runs") / "full", domains=("web",), blocks=10))
    return page.read_text(encoding="utf-8"), text.read_text(encoding="utf-8"), page.parent


def report_of(run) -> str:
    return write_report(run)[1].read_text(encoding="utf-8")


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


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that a resume took back from step 12 to 10, and the Markdown of its report."""
    run = make_run(tmp_path_factory.mktemp("runs") / "test")
    fill(run)
    return run, report_of(run)


def test_report_has_every_language_at_the_last_checkpoint_and_every_checkpoint(resumed):
    run, text = resumed
    assert "| en | +20.00% | 1.0000 | 1.2000 | +0.2000 | 50 | 12,345 |" in text
    assert "| cy | +50.00% | 4.0000 | 2.0000 | −2.0000 | 0.0% | 50.0% | 50 | 12,345 |" in text
    checkpoints = text.split("## Checkpoints")[1].split("\n## ")[0]
    assert re.findall(r"^\| (\d+)[^|]*\| ([^|]+) \| ([^|]+) \|", checkpoints, re.M) == [
        ("0", "0.00%", "0.00%"),
        ("10", "+25.00%", "+25.00%"),
        ("20", "+50.00%", "+20.00%"),
    ]
    assert "Loss 4.9000 at step 1, 3.0000 at step 20." in text
    assert "| steps | 20 of 20 |" in text
    for name in ("bits per byte", "forgotten", "gained", "identical", "exact match", "gate"):
        assert f"- **{name}" in text
    assert f"    moect report {run}" in text


def test_report_embeds_plots_that_are_there_and_not_blank(full):
    page, text, folder = full
    names = re.findall(r"\]\(plots/(\w+)\.png\)", text)
    assert names == "last forgetting pareto exactness tasks load specialists open routing loss".split()
    assert page.count('src="data:image/png;base64,') == len(names)
    for name in names:
        pixels = image.imread(folder / "plots" / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].min() < 0.3


def test_page_and_markdown_have_the_same_sections_figures_and_cells(full):
    page, text, _ = full
    sections = re.findall(r"^## (.+)$", text, re.M)
    assert sections == re.findall(r"<h2>(.+?)</h2>", page)
    assert len(sections) == 12
    in_page = [
        html.unescape(re.sub(r"<[^>]+>", "", cell.replace("<br>", " ")))
        for cell in re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", page)
    ]
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| :")]
    in_text = [re.sub(r"\\(.)", r"\1", cell) for line in lines for cell in line[2:-2].split(" | ")]
    assert len(in_text) > 200 and in_text == in_page
    figures = re.findall(r"^- [^:]+: \*\*(.+?)\*\*", text.split("## ")[0], re.M)
    assert len(figures) == 5 and figures == re.findall(r"<strong>(.+?)</strong>", page)


def test_the_page_opens_with_the_verdict_and_what_became_of_each_language(full):
    page, text, _ = full
    opening = text.split("## ")[0]
    assert "**Within the limits at step 1,000: the new languages gained" in opening
    assert "no old one lost more than" in opening
    for lang in ("sw", "eu", "is", "ta", "en", "de", "zh"):
        assert re.search(rf"\b{lang} \+\d", opening)
    assert re.search(r"bit for bit: en \d+\.\d%, de \d+\.\d%, zh \d+\.\d%\.", opening)
    assert re.search(r"bit-identical to the base: \*\*\d+\.\d%\*\* of 594 old documents \(95%: ", opening)
    assert 'class="verdict good"' in page


def test_a_language_beyond_its_limit_and_the_best_checkpoint_before_it_are_named(tmp_path):
    run = make_run(tmp_path / "over", monitor={"max_forgetting": {"en": "2%"}})
    for step, en, cy in ((0, 1.0, 4.0), (10, 1.01, 3.0), (20, 1.05, 2.0)):
        replace_rows(run / "monitor", [row(step, "en", "old", en, 1.0), row(step, "cy", "new", cy, 4.0)])
    page, text = (path.read_text(encoding="utf-8") for path in write_report(run))
    assert "**Beyond the limits at step 20: 1 old text has lost more than allowed; " in text
    assert "; the new languages gained 50.0% on average.**" in text
    assert "Beyond their limits: en held-out +5.00% (limit 2%)." in text
    assert (
        "The best checkpoint within the limits is step 10, not the last: mean gain 25.0%, worst old text en +1.00%."
        in (text)
    )
    assert "At step 10, the best checkpoint:" in text and "| 10 (best) |" in text
    assert 'class="verdict bad"' in page


def test_steps_that_a_resume_went_back_behind_are_left_out(resumed):
    run, text = resumed
    records, superseded, cut = read_log(run / "log.jsonl")
    assert [r["step"] for r in records] == list(range(1, 21))
    assert all(r["loss"] < 5 for r in records)
    assert (superseded, cut) == ({12}, 0)
    assert "7.7777" not in text


def test_steps_that_a_rollback_went_back_behind_are_left_out_and_the_action_is_told(run):
    rollback = {"event": "action", "action": "rollback", "step": 10, "from": 20, "to": 10, "why": "en +9%"}
    write_log(
        run,
        *[loss(s, 5 - s / 10) for s in range(1, 11)],
        {"event": "checkpoint", "step": 10},
        {"event": "action", "action": "replay", "step": 15, "why": "en +8%", "replay": 0.2},
        loss(20, 99.0),
        {"event": "checkpoint", "step": 20},
        {**rollback, "replay": 0.4},
        loss(11, 3.0),
    )
    for step in (10, 20):
        replace_rows(run / "monitor", [row(step, "en", "old", 1.0 + step / 100, 1.0)])
    records, superseded, _ = read_log(run / "log.jsonl")
    assert [r["step"] for r in records] == [*range(1, 11), 11]
    assert superseded == {20}
    text = report_of(run)
    assert "| en | +10.00% |" in text and "+20.00%" not in text
    assert "| 15 | replay raised to 20.0% | en +8% |" in text
    assert "| 20 | back to step 10, replay 40.0% | en +9% |" in text
    assert "![Training loss by step; replay at step 15; rollback at step 20.]" in text


def test_a_checkpoint_that_was_made_again_is_not_left_out(run):
    again = [{"event": "checkpoint", "step": s} for s in (10, 20)]
    path = write_log(run, *again, {"event": "resume", "step": 10}, {"event": "checkpoint", "step": 20})
    assert read_log(path)[1] == set()


def test_a_line_that_a_crash_cut_off_is_counted_and_said(run, caplog):
    write_log(run, loss(1, 5.0), '{"step": 2, "lo', loss(3, 4.0), "[1]")
    text = report_of(run)
    assert "2 line(s) of log.jsonl, cut off by a crash, are left out." in text
    assert "2 line(s) are not whole JSON objects" in caplog.text
    assert "Loss 5.0000 at step 1, 4.0000 at step 3." in text


def test_changes_of_the_mixture_are_told(run):
    change = {"event": "mixture", "step": 10, "row": 320, "before": {"en": 0.1, "cy": 0.9, "is": 0}, "now": {"en": 0.2}}
    write_log(run, {**change, "now": {"en": 0.2, "cy": 0.8, "is": 0}})
    text = report_of(run)
    assert "| 10 | en | 10.00% | 20.00% |\n| 10 | cy | 90.00% | 80.00% |" in text
    assert "| is |" not in text


def test_a_run_without_results_has_a_report_that_says_so(run):
    text = report_of(run)
    assert "The monitor has measured nothing yet." in text
    assert "No step was logged yet." in text
    assert re.findall(r"^## (.+)$", text, re.M) == ["Training", "The run", "Commands", "What the numbers mean"]
    assert not (run / "plots").exists()


def test_the_plan_adds_parameters_and_ranks(run):
    plan = {"parameters": {"total": 1500, "trainable": 500, "active": 1200}, "ranks": 2, "zero_stage": 1}
    (run / "plan.json").write_text(json.dumps(plan))
    text = report_of(run)
    assert "| parameters | 1,500 total, 500 trainable, 1,200 active per token |" in text
    assert "| ranks | 2, ZeRO 1 |" in text
    assert f"    deepspeed --num_accelerators 2 launch/train.py --config {run}/config.yaml name=test-again" in text


def test_a_report_is_written_again_in_place_byte_for_byte(run):
    replace_rows(run / "monitor", [row(5, "en", "old", 1.1, 1.0)])
    before = [path.read_bytes() for path in write_report(run)]
    assert [path.read_bytes() for path in write_report(run)] == before


def test_names_and_samples_cannot_break_page_or_markdown(tmp_path):
    odd = "<script>alert(1)</script>|`*_x_*`"
    run = make_run(tmp_path / "a b", {odd: "old", "தமிழ்": "new"}, name="a & b")
    rows = [row(5, odd, "old", 1.1, 1.0, domain="a|b"), row(5, "தமிழ்", "new", 1.0, 2.0)]
    replace_rows(run / "monitor", rows)
    told = {"step": 5, "lang": odd, "domain": "x", "document": 0, "prompt": "</p><b>", "base": "\n# x\n", "model": "🙂"}
    (run / "monitor" / "samples.jsonl").write_text(json.dumps(told) + "\n")
    page, text = (path.read_text(encoding="utf-8") for path in write_report(run))
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;|`*_x_*`" in page
    assert "&lt;/p&gt;&lt;b&gt;" in page and "<title>Run a &amp; b</title>" in page
    assert r"| \<script\>alert(1)\</script\>\|\`\*\_x\_\*\` | +10.00% |" in text
    assert "\n# x" not in text
    assert '<span lang="und" dir="auto">🙂</span>' in page
    assert "| language 1 |" not in text and "| text 2 | தமிழ் |" in text  # the plots' name of what their font lacks
    assert f"moect report '{run}'" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not the folder of a run, it has no config.yaml"):
        write_report(tmp_path)


def test_a_damaged_file_of_the_monitor_is_named(run):
    (run / "monitor").mkdir()
    (run / "monitor" / "tasks.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r"tasks.jsonl:1: not a row of the monitor; remove the line"):
        write_report(run)
