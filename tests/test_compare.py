"""Runs side by side, from folders as runs leave them; figures against sums made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
from matplotlib import image
from monitor_texts import run_config

from moect.config import config_to_yaml
from moect.errors import ConfigError, DataError
from moect.monitor.comparing.comparison import compare
from moect.monitor.comparing.output import check_output, write
from moect.monitor.comparing.plot import place_labels
from moect.monitor.comparing.table import by_text, overview, render
from moect.monitor.rows import replace_rows

BASE = {("en", "web"): 1.0, ("de", "web"): 2.0, ("cy", "web"): 4.0}
ROLES = {"en": "old", "de": "old", "cy": "new"}
DATA = {
    "languages": ROLES,
    "train": [{"path": f"{lang}.txt", "lang": lang} for lang in ROLES],
    "evaluation": [{"path": f"{lang}.test.txt", "lang": lang, "domain": "web"} for lang in ROLES],
    "replay": 0.1,
}


def row(step, key, bits, base=None, **more):
    lang, domain = key
    base = BASE[key] if base is None else base
    change = {"retention": base / bits} if ROLES[lang] == "old" else {"gain": 1 - bits / base}
    values = {"step": step, "lang": lang, "role": ROLES[lang], "domain": domain, "bytes": 1000, "documents": 50}
    return {**values, "bits_per_byte": bits, "base_bits_per_byte": base, "delta": bits - base, **change, **more}


def make_run(folder: Path, steps: dict[int, tuple], log=(), plan=None, exact=None, **sections) -> Path:
    """A run's folder: by step, the bits per byte of en, de and cy; identical documents of en and de, out of 50."""
    folder.mkdir(parents=True)
    config = run_config(name=folder.name, **{"data": DATA, **sections})
    (folder / "config.yaml").write_text(config_to_yaml(config))
    for step, bits in {0: tuple(BASE.values()), **steps}.items():
        rows = [row(step, key, b) for key, b in zip(BASE, bits, strict=True)]
        for r, same in zip(rows, exact or (), strict=False):
            r["exact"] = {"documents": 50, "identical_documents": same, "low": 0.0, "high": 1.0}
        replace_rows(folder / "monitor", rows)
    lines = [{"step": s, "loss": 1.0, "tokens_per_second": 100.0 * s} for s in steps]
    lines += [{"event": "checkpoint", "step": s, "peak_memory": 2**30 * s} for s in steps]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, *log)))
    if plan:
        (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def cells(table: str, name: str) -> dict[str, str]:
    """A line of a Markdown table by its headings."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return dict(zip(lines[0], next(line for line in lines if line[0] == name), strict=True))


def test_the_overview_says_what_was_gained_lost_and_paid(tmp_path):
    plan = {"parameters": {"total": 30, "trainable": 1_500_000, "active": 20}, "memory_per_rank": {"a": 2**30, "b": 7}}
    exact = (50, 25)
    run = make_run(tmp_path / "one", {4: (1.1, 2.1, 2.0), 8: (1.02, 2.2, 1.0)}, plan=plan, exact=exact)
    line = cells(overview(compare([run]), markdown=True), "one")
    assert line["method"] == "moe-ct" and line["step"] == "8" and line["tokens"] == f"{8 * 64 * 16 / 1000:.2f} k"
    assert line["gain %"] == "+75.00" and line["loss %"] == "+6.00" and line["worst %"] == "+10.00 de web"
    assert line["retention %"] == f"{100 * (1 / 1.02 + 2 / 2.2) / 2:.2f}"
    assert line["identical %"] == "75.0 (65.7 to 82.5)"  # Wilson's interval of 75 of 100, from a table of it
    assert line["trains"] == "1.50 M" and line["tokens/s"] == "600"
    assert line["memory"] == "8.00 GiB" and line["planned"] == "1.00 GiB"
    assert "budget" not in line and "exact old %" not in line


def test_the_best_checkpoint_within_the_budget_is_shown_and_the_last_one_if_asked_for(tmp_path):
    steps = {4: (1.005, 2.0, 3.0), 8: (1.004, 2.0, 2.0), 12: (1.5, 2.0, 1.0)}
    run = make_run(tmp_path / "one", steps, monitor={"max_forgetting": "1%"})
    best, last = compare([run]), compare([run], last=True)
    assert (best.runs[0].step, best.runs[0].within, last.runs[0].step, last.runs[0].within) == (8, True, 12, False)
    assert cells(overview(best, True), "one")["budget"] == "within"
    assert cells(overview(last, True), "one")["budget"] == "beyond"
    assert "best checkpoint, within its budget" in render(best) and "last checkpoint" in render(last)


def test_without_a_checkpoint_within_the_budget_the_last_is_shown_with_a_mark(tmp_path):
    run = make_run(tmp_path / "one", {4: (1.5, 2.0, 3.0), 8: (1.4, 2.0, 3.5)}, monitor={"max_forgetting": 0.1})
    comparison = compare([run])
    assert cells(overview(comparison, True), "one")["step"] == "8*"
    assert "no checkpoint of this run is within its budget" in render(comparison)


@pytest.mark.parametrize(
    "event", [{"event": "resume", "step": 4}, {"event": "action", "action": "rollback", "step": 4, "to": 4}]
)
def test_a_checkpoint_that_the_run_went_back_behind_is_not_shown(tmp_path, event):
    run = make_run(tmp_path / "one", {4: (1.1, 2.0, 3.0), 8: (1.0, 2.0, 1.0)}, log=[event])
    assert compare([run]).runs[0].step == compare([run], last=True).runs[0].step == 4


def test_every_text_has_a_line_with_the_change_against_the_base(tmp_path):
    runs = [make_run(tmp_path / name, {4: (1.1, 2.0, cy)}) for name, cy in (("one", 3.0), ("two", 1.0))]
    table = by_text(compare(runs), "bits_per_byte", markdown=True)
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == ["en", "de", "mean", "cy"]
    assert cells(table, "cy") == {
        **{"language": "cy", "role": "new", "domain": "web", "documents": "50", "base": "4.0000"},
        **{"one": "3.0000 (-25.00%)", "two": "1.0000 (-75.00%)"},
    }
    assert cells(table, "mean")["one"] == "(+5.00%)"


def test_exact_match_is_compared_where_there_are_answers(tmp_path):
    runs = [make_run(tmp_path / name, {4: (1.1, 2.0, 3.0)}) for name in ("one", "two")]
    for run, share in zip(runs, (0.25, 0.5), strict=True):
        answers = {"exact_match": share, "base_exact_match": 0.125}
        replace_rows(run / "monitor", [row(4, key, 1.0, **answers) for key in (("en", "web"), ("cy", "web"))])
    comparison = compare(runs)
    assert comparison.measure == "bits_per_byte"  # as there is a text without answers
    table = by_text(comparison, "exact_match", markdown=True)
    assert [cells(table, "cy")[name] for name in ("base", "one", "two")] == ["12.5", "25.0", "50.0"]
    assert "| de |" not in table
    assert cells(overview(comparison, True), "two")["exact new %"] == "50.00"


def test_texts_that_not_all_runs_share_are_left_out_and_named_once(tmp_path, caplog):
    caplog.set_level("INFO", "moect")
    one, two = (make_run(tmp_path / name, {4: (1.1, 2.4, 3.0)}) for name in ("one", "two"))
    replace_rows(one / "monitor", [row(4, ("de", "news"), 9.0, base=3.0)])
    replace_rows(two / "monitor", [row(4, ("de", "web"), 3.0, base=2.5, bytes=1234)])
    comparison = compare([one, two])
    assert [(text["lang"], text["domain"]) for text in comparison.texts] == [("en", "web"), ("cy", "web")]
    assert comparison.left_out == {
        "de web": "another text of that name in two",
        "de news": "not measured in two",
    }
    assert caplog.text.count("left out") == 1
    assert cells(overview(comparison, True), "one")["loss %"] == "+10.00"
    assert "Left out: de news, not measured in two." in render(comparison)


def test_runs_that_share_no_text_are_refused(tmp_path):
    one, two = (make_run(tmp_path / name, {4: (1.1, 2.4, 3.0)}) for name in ("one", "two"))
    path = two / "monitor" / "forgetting.jsonl"
    path.write_text(path.read_text().replace('"web"', '"news"'))
    with pytest.raises(DataError, match="the runs share no held-out text: en web not measured in two"):
        compare([one, two])


def test_runs_of_another_base_are_refused(tmp_path):
    one, two = (make_run(tmp_path / name, {4: (1.1, 2.4, 3.0)}) for name in ("one", "two"))
    replace_rows(two / "monitor", [row(4, ("en", "web"), 1.1, base=1.2)])
    with pytest.raises(DataError, match=r"two and .*one: their bases differ on en web \(1.2000 and 1.0000"):
        compare([one, two])


def test_folders_that_cannot_be_compared_are_refused_with_the_reason(tmp_path):
    run = make_run(tmp_path / "one", {4: (1.1, 2.4, 3.0)})
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        compare([run, tmp_path])
    with pytest.raises(DataError, match="given twice"):
        compare([run, run.parent / "." / "one"])
    (run / "monitor" / "forgetting.jsonl").unlink()
    with pytest.raises(DataError, match="has no measurements"):
        compare([run])


def test_runs_of_one_name_are_called_by_more_of_their_path(tmp_path):
    runs = [make_run(tmp_path / place / "one", {4: (1.1, 2.0, 3.0)}) for place in ("a", "b")]
    assert [run.name for run in compare(runs).runs] == ["a/one", "b/one"]


@pytest.mark.parametrize("group", ["config", "name"])
def test_seeds_of_one_method_are_a_line_with_mean_and_standard_deviation(tmp_path, group):
    bits = [(1.1, 2.0, 3.0), (1.2, 2.2, 2.0), (1.15, 2.0, 2.2)]
    runs = [make_run(tmp_path / f"moe-{seed}", {4: b}, seed=seed) for seed, b in enumerate(bits)]
    runs.append(make_run(tmp_path / "full", {4: (1.3, 2.0, 1.0)}, method="full"))
    comparison = compare(runs, group=group)
    assert [entry.name for entry in comparison.entries] == ["moe", "full"]
    table = overview(comparison, True)
    line = cells(table, "moe (3 runs)")
    gains, losses = [100 * (1 - b[2] / 4) for b in bits], [100 * (b[0] - 1 + b[1] / 2 - 1) / 2 for b in bits]
    assert line["gain %"] == f"+{mean(gains):.2f} ± {stdev(gains):.2f}"
    assert line["loss %"] == f"+{mean(losses):.2f} ± {stdev(losses):.2f}"
    assert cells(table, "full")["gain %"] == "+75.00"
    text = cells(by_text(comparison, "bits_per_byte", True), "cy")["moe"]
    assert text == f"{mean(b[2] for b in bits):.4f} ± {stdev(b[2] for b in bits):.4f} (-{mean(gains):.2f}%)"


def test_runs_that_differ_in_more_than_the_seed_are_lines_of_their_own(tmp_path):
    runs = [make_run(tmp_path / f"moe-{n}", {4: (1.1, 2.0, 3.0)}, train={"lr": n * 1e-3}) for n in (1, 2)]
    assert [entry.name for entry in compare(runs, group="config").entries] == ["moe-1", "moe-2"]
    message = "moe-1 and moe-2 differ in more than seed and name, `train.lr` is 0.001 and 0.002; use --group config"
    with pytest.raises(DataError, match=message):
        compare(runs, group="name")


def test_a_group_of_which_one_document_changed_is_not_all_identical(tmp_path):
    runs = [make_run(tmp_path / f"moe-{seed}", {4: (1.1, 2.0, 3.0)}, seed=seed, exact=(50, 50)) for seed in range(2)]
    identical = cells(overview(compare(runs, group="config"), True), "moe (2 runs)")["identical %"]
    assert identical == "100.00 ± 0.00"
    exact = {"documents": 100_000, "identical_documents": 99_999, "tokens": 1, "identical_tokens": 1}
    replace_rows(runs[0] / "monitor", [row(4, ("en", "web"), 1.1, exact=exact)])
    identical = cells(overview(compare(runs, group="config"), True), "moe (2 runs)")["identical %"]
    assert identical == ">99.99 ± 0.00"


def test_a_run_that_trained_on_without_a_measurement_is_marked(tmp_path):
    log = [{"step": 12, "loss": 1.0}]
    runs = [make_run(tmp_path / "one", {4: (1.1, 2.0, 3.0)}, log=log), make_run(tmp_path / "two", {4: (1.1, 2.0, 3.0)})]
    comparison = compare(runs)
    assert [cells(overview(comparison, True), name)["step"] for name in ("one", "two")] == ["4†", "4"]
    assert "†: one is measured up to step 4, and trained to step 12." in render(comparison)
    assert "two is measured" not in render(comparison)


def test_text_that_a_rollback_undid_is_not_counted_and_that_is_said(tmp_path):
    back = {"event": "action", "action": "rollback", "step": 4, "from": 8, "to": 4}
    comparison = compare([make_run(tmp_path / "one", {4: (1.1, 2.0, 3.0)}, log=[back])])
    assert cells(overview(comparison, True), "one")["tokens"] == "4.10 k"
    assert "one: the text of 4.10 k tokens was undone by rollbacks, and is not counted." in render(comparison)


def test_the_best_is_best_by_retention_where_nothing_new_was_measured(tmp_path):
    run = make_run(tmp_path / "one", {4: (1.1, 2.0, 3.0)})
    assert "best checkpoint by gain." in render(compare([run]))
    data = {**DATA, "evaluation": DATA["evaluation"][:2]}
    run = make_run(tmp_path / "two", {4: (1.1, 2.0, 3.0)}, data=data)
    path = run / "monitor" / "forgetting.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"cy"' not in line))
    assert "best checkpoint by retention." in render(compare([run]))


def test_a_run_that_measured_not_all_of_its_texts_is_marked(tmp_path):
    data = {**DATA, "evaluation": [*DATA["evaluation"], {"path": "x.txt", "lang": "cy", "domain": "news"}]}
    comparison = compare([make_run(tmp_path / "one", {4: (1.1, 2.0, 3.0)}, data=data)])
    assert cells(overview(comparison, True), "one")["step"] == "4*"
    assert "no step of this run was measured on all of its texts" in render(comparison)


def test_null_and_zero_bits_are_compared_around(tmp_path):
    run = make_run(tmp_path / "one", {4: (1.1, 2.0, 3.0)}, plan={"parameters": None, "memory_per_rank": {"a": None}})
    replace_rows(run / "monitor", [row(4, ("de", "web"), 2.0, retention=None), row(4, ("en", "web"), 1.1, base=0.0)])
    comparison = compare([run])
    assert list(comparison.left_out) == ["en web"] and "the base needs no bits for it" in render(comparison)
    line = cells(overview(comparison, True), "one")
    assert line["loss %"] == "+0.00" and "retention %" not in line and "planned" not in line


def test_tables_on_the_screen_are_no_wider_than_it(tmp_path):
    exact = (50, 25)
    plan = {"parameters": {"trainable": 1_500_000}, "memory_per_rank": {"a": 2**40}}
    runs = [
        make_run(tmp_path / f"a-rather-long-name-{n:02}", {4: (1.1, 2.4, 3.0)}, plan=plan, exact=exact)
        for n in "abcdefghi"
    ]
    text = render(compare(runs))
    assert max(map(len, text.splitlines())) <= 120
    assert "a-rather-long-name-i" in text


@pytest.mark.parametrize("ending", ["md", "json", "png"])
def test_output_is_written_once_and_never_over_a_file(tmp_path, ending):
    runs = [make_run(tmp_path / name, {4: (1.1, 2.4, cy)}) for name, cy in (("one", 3.0), ("two", 1.0))]
    comparison, path = compare(runs), tmp_path / f"out.{ending}"
    assert write(comparison, path) == path
    if ending == "json":
        assert [run["gain"] for run in json.loads(path.read_text())["runs"]] == [0.25, 0.75]
    elif ending == "md":
        assert path.read_text() == render(comparison, markdown=True) + "\n"
    else:
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 400 and pixels[..., :3].min() < 0.2
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        write(comparison, path)
    assert path.read_bytes() == before and not list(tmp_path.glob(".out*"))


def test_a_file_that_comes_to_be_while_the_output_is_made_is_kept(tmp_path, monkeypatch):
    comparison, path = compare([make_run(tmp_path / "one", {4: (1.1, 2.4, 3.0)})]), tmp_path / "out.md"
    monkeypatch.setattr("moect.monitor.comparing.output.render", lambda *_, **__: path.write_text("kept") and "")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        write(comparison, path)
    assert path.read_text() == "kept" and not list(tmp_path.glob(".out*"))


def test_an_output_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.png, \.md, \.json"):
        check_output(tmp_path / "table.txt")
    with pytest.raises(ConfigError, match="there is no folder"):
        check_output(tmp_path / "none" / "table.md")


def test_names_of_points_that_lie_on_one_another_do_not_overlap():
    def apart(one, other):
        return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]

    points = [(200.0 + n % 3, 150.0 + n % 2) for n in range(16)]
    point = (193.0, 143.0, 209.0, 158.0)
    boxes = place_labels(points, [(70.0, 12.0)] * 16, [point], (0.0, 0.0, 500.0, 400.0))
    assert all(apart(one, other) for n, one in enumerate(boxes) for other in [point, *boxes[:n]])
    assert all(0 <= b[0] and b[2] <= 500 and 0 <= b[1] and b[3] <= 400 for b in boxes)


@pytest.mark.parametrize("roles", [("en", "de"), ("cy",), ("en", "de", "cy")])
def test_a_comparison_of_one_role_is_drawn_too(tmp_path, roles):
    runs = [make_run(tmp_path / name, {4: (1.1, 22.4, 3.0)}) for name in ("one", "$two$", "三")]
    for run in runs:
        path = run / "monitor" / "forgetting.jsonl"
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["lang"] in roles]
        path.write_text("\n".join(lines) + "\n")
    write(compare(runs), tmp_path / "out.png")
    assert image.imread(tmp_path / "out.png").shape[1] > 400
