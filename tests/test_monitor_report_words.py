"""What the words of a report claim, and what it does with files that are not as they should be."""

from __future__ import annotations

import json
import re

import pytest
from report_runs import loss, make_run, row, write_log

from moect.errors import ConfigError, DataError
from moect.monitor.reporting.page.report import write_report
from moect.monitor.reporting.run_files import read_run
from moect.monitor.rows import APART, replace_rows


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "test")


def report_of(run) -> str:
    return write_report(run)[1].read_text(encoding="utf-8")


def measure(run, *rows):
    replace_rows(run / "monitor", list(rows))


def test_steps_that_were_not_measured_are_named_and_nothing_good_is_said_of_them(tmp_path):
    run = make_run(tmp_path / "run", monitor={"max_forgetting": "2%"})
    measure(run, row(0, "en", "old", 1.0, 1.0), row(0, "cy", "new", 4.0, 4.0))
    write_log(run, loss(8, 4.0))
    assert "**Measured before the first step only; steps up to 8 were not measured.**" in report_of(run)
    measure(run, row(2, "en", "old", 1.001, 1.0), row(2, "cy", "new", 2.0, 4.0))
    page, text = (path.read_text(encoding="utf-8") for path in write_report(run))
    assert "**Within the limits at step 2: " in text
    assert " Measured at step 2; steps up to 8 were not measured.**" in text
    assert 'class="verdict plain"' in page and '<li class="good">' not in page
    write_log(run, loss(2, 4.0))
    page = write_report(run)[0].read_text(encoding="utf-8")
    assert 'class="verdict good"' in page and '<li class="good">' in page


def test_a_run_that_could_not_go_on_says_so_first_until_it_does(run):
    measure(run, row(2, "en", "old", 1.001, 1.0), row(2, "cy", "new", 2.0, 4.0))
    stop = {"event": "stop", "step": 9, "why": "3 steps were skipped in a row (the last: loss nan), and so"}
    write_log(run, loss(2, 4.0), stop)
    page, text = (path.read_text(encoding="utf-8") for path in write_report(run))
    assert "**The run could not go on at step 9: 3 steps were skipped in a row (the last: loss nan), and so. " in text
    assert 'class="verdict bad"' in page
    write_log(run, loss(2, 4.0), stop, {"event": "resume", "step": 2}, loss(3, 4.0))
    assert "could not go on" not in report_of(run)


def test_the_bound_on_what_was_lost_is_rounded_up(run):
    for lost, bound in ((0.00621, "0.63%"), (0.0062, "0.62%"), (1e-7, "0.01%")):
        measure(run, row(5, "en", "old", 1 + lost, 1.0), row(5, "cy", "new", 2.0, 4.0))
        assert f"no old one lost more than {bound}. No limits were set." in report_of(run)
    measure(run, row(5, "en", "old", 1.0, 1.0))
    assert "no old one lost anything" in report_of(run)


def test_the_monitors_share_of_the_time_counts_what_was_undone_too(run):
    steps = [{**loss(s, 4.0), "seconds": 5.0} for s in (10, 20)]
    measured = {"event": "monitor", "step": 20, "seconds": 2.5}
    failed = {"event": "monitor failed", "step": 20, "error": "no memory"}
    write_log(run, *steps, measured, {"event": "resume", "step": 10}, steps[1], measured, failed)
    text = report_of(run)
    assert "The monitor took 25.0% of the time" in text  # 2 x 2.5 s, and 3 x 5 s of steps
    assert "| 20 | no memory |" in text
    write_log(run, loss(10, 4.0), steps[1], measured)  # begun before lines had seconds
    assert "of the time" not in report_of(run)


def test_the_median_speed_of_an_even_number_of_lines_is_between_two(run):
    write_log(run, *({**loss(s, 4.0), "tokens_per_second": 100.0 * s} for s in (1, 2, 4, 8)))
    assert "Median speed 300 tokens a second." in report_of(run)


def test_tokens_are_counted_to_the_last_line_of_the_log_wherever_a_rollback_stands(run):
    def line(step, tokens):
        return {**loss(step, 4.0), "tokens_seen": {"en": tokens}}

    def drawn(*entries):
        write_log(run, *entries)
        return read_run(run).log.tokens_drawn

    back = {"event": "action", "action": "rollback", "step": 10, "from": 20, "to": 10}
    first = line(10, 100), line(20, 200)
    assert drawn(*first) == (200, 0)
    assert drawn(*first, back) == (200, 100)
    assert drawn(*first, back, line(15, 250)) == (250, 100)
    assert drawn(*first, back, line(15, 250), line(20, 300), back) == (300, 200)
    assert drawn(*first, {"event": "resume", "step": 10}) == (100, 0)
    # a crash before the rollback was done: the run is where it was again, and rolls back once
    assert drawn(*first, back, {"event": "resume", "step": 20}, back, line(20, 300)) == (300, 100)
    assert len(read_run(run).log.events("action")) == 1
    text = report_of(run)
    assert "trained: **20** of 20 steps, 300 tokens drawn, of which 100 undone" in text
    assert "| language | tokens drawn, undone ones too | share |" in text


def test_names_from_right_to_left_do_not_turn_the_sentence_around(tmp_path):
    turned, spoofed = "עברית", "en\u202e"
    languages = {turned: "old", spoofed: "old", "العربية": "new"}
    run = make_run(tmp_path / "run", languages, monitor={"max_forgetting": "1%"})
    measure(run, *(row(5, lang, "old", 1.1, 1.0) for lang in (turned, spoofed)), row(5, "العربية", "new", 1.0, 2.0))
    write_log(run, {"event": "action", "action": "replay", "step": 5, "why": f"{turned} held-out +10.00% (limit 1%)"})
    page, text = (path.read_text(encoding="utf-8") for path in write_report(run))
    inside = f"\u2068{turned}\u2069"
    for said in (page, text):
        assert "\u202e" not in said
        assert f"{inside} held-out +10.00% (limit 1%); en held-out +10.00% (limit 1%)" in said
        assert f"{inside} +10.00%, en +10.00%" in said and "\u2068العربية\u2069 +50.00%" in said
    assert f"| 5 | replay raised | {inside} held-out" in text


def test_what_was_measured_apart_has_its_own_section_and_no_part_in_the_verdict(run):
    for step in (5, 10):
        measure(run, row(step, "en", "old", 1.01, 1.0), row(step, "cy", "new", 2.0, 4.0))
    before = report_of(run)
    exact = {"documents": 4, "identical_documents": 3, "tokens": 40, "identical_tokens": 39}
    replace_rows(run / "monitor", [row(10, "en", "old", 7.5, 5.0, domain="news", key="k", exact=exact)], APART)
    text = report_of(run)
    section = re.search(r"## Measured apart.*?(?=## )", text.split("## Languages")[1], re.S)[0]
    assert "| 10 | en | old | news | 50 | 5.0000 | 7.5000 | +50.00% | 75.0% |" in section
    assert text.replace(section, "") == before


def test_steps_that_were_measured_in_another_way_are_no_part_of_the_table_and_named(run):
    for step, key in ((5, "a"), (10, "b"), (15, "b")):
        measure(run, row(step, "en", "old", 1.01, 1.0, key=key), row(step, "cy", "new", 2.0, 4.0, key=key))
    section = report_of(run).split("## Checkpoints")[1].split("## ")[0]
    assert re.findall(r"^\| (\d+)", section, re.M) == ["10", "15"]
    assert "Not in the table, as they were not measured on the same texts in the same way: 5." in section


def test_captions_speak_of_a_gate_only_where_there_is_one(tmp_path):
    classes = [{"from": 1, "to": 8, "documents": 2, "identical_documents": 1, "low": 0.1, "high": 0.9}]
    exact = {"documents": 2, "identical_documents": 1, "tokens": 9, "identical_tokens": 8, "by_length": classes}
    routed = {"exact": exact, "expert_load": [[1.0]], "blocks": [0]}
    gated = make_run(tmp_path / "gated", moe={"fusion": "add", "language_gate": True}, data={"replay": 0.1})
    measure(gated, row(5, "en", "old", 1.0, 1.0, open_share=0.5, **routed))
    text = report_of(gated)
    assert "Texts weigh by their bytes and by the share of their tokens that reach the experts." in text
    assert "A longer document has more tokens that could pass the gate" in text
    fused = make_run(tmp_path / "fused", moe={"fusion": "gate", "language_gate": False})
    measure(fused, row(5, "en", "old", 1.0, 1.0, tokens=9, **routed))
    text = report_of(fused)
    assert "Texts weigh by their tokens. Crosses" in text and "could pass the gate" not in text


@pytest.mark.parametrize(
    ("ranks", "launcher", "where"),
    [
        (1, "python", ""),
        (2, "deepspeed --num_accelerators 2", ""),
        (16, "deepspeed", "  # 16 ranks (on the hosts it ran on)"),
    ],
)
def test_the_command_names_no_number_of_ranks_that_may_be_wrong(run, ranks, launcher, where):
    (run / "plan.json").write_text(json.dumps({"ranks": ranks}))
    command = f"{launcher} launch/train.py --config {run}/config.yaml name=test-again resume=never{where}"
    assert f"    {command}\n" in report_of(run)


def test_a_base_that_needs_no_bits_is_not_said_to_have_kept_everything(run):
    nothing = {"base_bits_per_byte": 0.0, "delta": 0.5, "gain": None}
    for step in (5, 9):
        measure(run, row(step, "en", "old", 0.5, 0.0), {**row(step, "cy", "new", 0.5, 1.0), **nothing})
    text = report_of(run)
    assert "lost anything" not in text and "what en lost is no share of the base's bits" in text
    assert "most forgotten: **not known**" in text and "| en | not known | 0.0000 | 0.5000 | +0.5000 |" in text


def test_values_that_are_null_or_no_text_are_reported_around(run):
    measure(run, row(5, "en", "old", 1.1, 1.0, retention=None), row(5, "cy", "new", 2.0, 4.0, gain=None))
    (run / "plan.json").write_text('{"ranks": null, "parameters": {"total": null}, "memory_per_rank": null}')
    told = {"step": 5, "lang": "en", "domain": "x", "document": 0, "prompt": "a\ud83d", "base": None, "model": "\udc00"}
    (run / "monitor" / "samples.jsonl").write_text(json.dumps(told) + "\n")
    text = report_of(run)
    assert "| en | +10.00% |" in text and "| cy | +50.00% |" in text
    assert "- begins: a\ufffd\n" in text and "- model: \ufffd" in text
    assert "| parameters |" not in text and "    python launch/train.py" in text


def test_a_plan_that_is_none_is_refused(run):
    (run / "plan.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"plan.json: is not a plan, which is a JSON object; remove it"):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "lacks", "message"),
    [
        ("log.jsonl", "step", "log.jsonl:2: not a line of a run's log, its `step` is None; remove the line"),
        (
            "monitor/forgetting.jsonl",
            "role",
            "forgetting.jsonl:2: not a row of the monitor, its `role` is None; remove",
        ),
    ],
)
def test_a_line_that_lacks_what_it_must_have_is_named(run, name, lacks, message):
    (run / "monitor").mkdir()
    whole = {"event": "checkpoint", **row(5, "en", "old", 1.0, 1.0)}
    lines = whole, {key: value for key, value in whole.items() if key != lacks}
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        write_report(run)


def test_a_correlation_is_no_percentage(run):
    measure(run, row(5, "en", "old", 1.0, 1.0), row(5, "cy", "new", 2.0, 4.0))
    told = {"step": 5, "lang": "en", "base_value": 0.25, "value": 0.5, "stderr": None}
    names = {"cola": "mcc", "a": "acc", "b": "acc_norm", "c": "exact_match,strict-match"}
    lines = [json.dumps({**told, "task": task, "metric": metric}) for task, metric in names.items()]
    (run / "monitor" / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    text = report_of(run).replace("\\", "")
    assert "| cola | en | 0.250 | 0.500 | mcc |" in text
    for task in "abc":
        assert f"| {task} | en | 25.0% | 50.0% | {names[task]} |" in text
