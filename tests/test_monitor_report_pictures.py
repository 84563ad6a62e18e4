"""What the pictures and figures of a report rest on: names, places, loads, rounding."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
from matplotlib import image, rcParams
from report_runs import row
from torch.utils.tensorboard import SummaryWriter

from moect.monitor.measuring.exactness import wilson
from moect.monitor.reporting.experts import load_entropy, mean_load, odd_experts
from moect.monitor.reporting.figures import change_interval, identical, share_text, signed
from moect.monitor.reporting.pictures.change_plots import plot_changes
from moect.monitor.reporting.pictures.drawing import drawing, name_ends, spread
from moect.monitor.reporting.pictures.labels import Labels, drawable
from moect.monitor.reporting.tensorboard import write_hparams, write_images, write_scalars


def routed(lang: str, load: list[list[float]], **more) -> dict:
    return row(10, lang, "old", 1.0, 1.0, expert_load=load, **{"bytes": 100, **more})


def test_dead_and_overloaded_experts_are_those_far_from_an_even_share_over_all_texts():
    def block(first: float) -> list[float]:
        """The first expert's load by its even share; the others share the rest."""
        return [first / 8, *[(1 - first / 8) / 7] * 7]

    rows = [routed("en", [block(x) for x in (0.11, 0.09, 0.016, 1.0, 2.9, 3.1)], blocks=[1, 3, 5, 7, 9, 11])]
    dead, overloaded = odd_experts(rows)
    assert [(e.block, e.expert) for e in dead] == [(5, 0), (3, 0)]
    assert [(e.block, e.expert) for e in overloaded] == [(11, 0)]
    assert str(dead[0]) == "block 5, expert 0: 0.2% of assignments (even share 12.5%)"


def test_an_expert_that_one_text_uses_is_not_dead_and_a_block_without_tokens_has_none():
    rows = [routed("en", [[1.0, 0.0], [0.0, 0.0]]), routed("sw", [[0.0, 1.0], [0.0, 0.0]])]
    assert odd_experts(rows) == ([], [])
    assert mean_load(rows).tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_texts_weigh_by_the_bytes_that_pass_the_gate():
    rows = [routed("en", [[1.0, 0.0]], open_share=0.01), routed("sw", [[0.0, 1.0]], open_share=0.5, bytes=200)]
    assert mean_load(rows)[0] == pytest.approx([1 / 101, 100 / 101])


def test_load_entropy_is_one_for_even_loads_and_nothing_for_a_block_without_tokens():
    entropy = load_entropy(routed("en", [[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.0] * 4]))
    assert entropy[:3] == pytest.approx([1.0, 0.0, 0.5])
    assert np.isnan(entropy[3])


def test_documents_of_several_texts_are_counted_together_with_their_interval():
    parts = [{"documents": 30, "identical_documents": k, "tokens": 100, "identical_tokens": 90} for k in (30, 15)]
    same = identical([routed("en", [[1.0]], exact=part) for part in parts] + [routed("is", [[1.0]])])
    assert (same.documents, same.identical_documents, same.share, same.token_share) == (60, 45, 0.75, 0.9)
    assert (same.low, same.high) == wilson(45, 60)
    assert identical([routed("en", [[1.0]])]) is None


def test_the_interval_of_what_is_forgotten_is_that_of_retention_turned_over():
    made = row(10, "en", "old", 1.25, 1.0, retention_low=0.5, retention_high=0.8)
    assert change_interval(made) == pytest.approx((0.25, 1.0))
    assert change_interval(row(10, "en", "old", 1.25, 1.0)) is None


def test_shares_are_never_rounded_to_all_or_nothing():
    assert [share_text(x) for x in (1.0, 0.9999, 0.5, 0.0001, 0.0)] == ["100.0%", ">99.9%", "50.0%", "<0.1%", "0.0%"]
    assert [signed(x) for x in (0.012, -0.012, -0.000001)] == ["+1.20%", "−1.20%", "0.00%"]


def test_labels_are_what_the_plots_font_can_draw_and_else_a_name_with_a_number():
    rows = [row(1, lang, "new", 1, 1, domain=d) for lang in ("sw", "தமிழ்", "中文", "Ελληνικά") for d in ("web", "খবর")]
    labels = Labels(rows[:3] + rows[4:5] + rows[6:7])
    assert [labels.of(r) for r in (*rows[:3], rows[4], rows[6])] == ["sw web", "text 2", "text 3", "text 4", "Ελληνικά"]
    assert labels.replaced == {"text 2": "sw খবর", "text 3": "தமிழ்", "text 4": "中文"}
    assert not drawable("two\nlines") and not drawable("") and drawable("$x$ Ñandú")


def test_names_that_would_look_alike_when_shortened_are_told_apart_and_listed():
    tasks = [f"a_task_with_a_name_{n}_that_is_rather_long" for n in (1, 2)]
    tasks += ["xcopa_sw", "a_name_that_is_long_but_alone"]
    labels = Labels([row(1, "sw", "new", 1, 1)])
    assert labels.shown(tasks, "task") == ["task 1", "task 2", "xcopa_sw", "a_name_th…ut_alone"]
    assert labels.replaced == {"task 1": tasks[0], "task 2": tasks[1]}
    long = [row(1, f"language-of-the-{side}-end-of-the-world", "new", 1, 1) for side in ("northern", "southern")]
    assert [Labels(long).of(r) for r in long] == ["text 1", "text 2"]


def test_a_line_that_ends_early_is_named_there_and_nothing_leads_to_its_name(tmp_path):
    with drawing() as plt:
        figure, axes = plt.subplots()
        axes.plot([0, 10], [0, 1])
        axes.plot([0, 4], [0, 1])
        name_ends(axes, [(10, 1.0, "whole", "black"), (4, 1.0, "early", "black"), (4, 0.99, "other", "black")])
        whole, early, other = (next(t for t in axes.texts if t.get_text() == n) for n in ("whole", "early", "other"))
        assert whole.arrow_patch is not None and early.arrow_patch is None and other.arrow_patch is None
        figure.draw_without_rendering()
        last = axes.transData.transform((4, 1.0))
        boxes = early.get_window_extent(), other.get_window_extent()
        assert 0 < boxes[0].x0 - last[0] < 30 and abs((boxes[0].y0 + boxes[0].y1) / 2 - last[1]) < 30
        assert not boxes[0].overlaps(boxes[1])
        plt.close(figure)


def test_a_language_looks_the_same_in_every_domain_and_no_other_looks_like_it():
    rows = [row(1, f"l{n}", "new", 1, 1, domain=d) for n in range(40) for d in ("web", "news")]
    labels = Labels(rows)
    looks = {(labels.style(r).colour, labels.style(r).marker) for r in rows}
    assert len(looks) == 40
    assert labels.style(rows[0]).line != labels.style(rows[1]).line


def test_no_name_beside_the_lines_covers_another_and_none_leaves_the_plot():
    chance = random.Random(0)
    for _ in range(200):
        wanted = sorted(chance.choice([chance.random(), 0.5, 1.0]) for _ in range(chance.randint(1, 19)))
        places = spread(wanted, 0.05, 0.0, 1.0)
        assert all(b - a >= 0.05 - 1e-9 for a, b in zip(places, places[1:], strict=False))
        assert places[0] >= -1e-9 and places[-1] <= 1 + 1e-9
    assert spread([0.1, 0.4, 0.9], 0.05, 0.0, 1.0) == [0.1, 0.4, 0.9]


def test_plots_do_not_depend_on_the_machines_settings_or_on_odd_names(tmp_path, monkeypatch):
    rows = [row(9, lang, "new", 1.0, 2.0) for lang in ("sw", "தமிழ்", r"$\frac{x$")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing is a warning of matplotlib
        first = plot_changes(rows, {}, Labels(rows), tmp_path / "a.png").read_bytes()
        monkeypatch.setitem(rcParams, "font.family", ["fantasy"])
        monkeypatch.setitem(rcParams, "axes.facecolor", "red")
        assert plot_changes(rows, {}, Labels(rows), tmp_path / "b.png").read_bytes() == first
    assert image.imread(tmp_path / "a.png").shape[1] > 800


def test_tensorboard_gets_scalars_pictures_and_hparams_in_one_run(tmp_path):
    from monitor_texts import run_config
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    exact = {"documents": 4, "identical_documents": 3, "tokens": 10, "identical_tokens": 9, "kl": 0.25}
    old = row(8, "en", "old", 1.02, 1.0, exact=exact, retention_low=0.9, load_entropy=[0.5, 1.0], blocks=[0, 1])
    rows = [old, row(8, "cy", "new", 1.0, 2.0, expert_load=[[0.75, 0.25]], open_share=0.5)]
    plot_changes(rows, {}, Labels(rows), tmp_path / "plots" / "last.png")
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        write_scalars(writer, rows, 8)
        write_images(writer, tmp_path / "plots", 8)
        write_hparams(writer, run_config(), rows)
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert scalars == pytest.approx(
        {
            "monitor/en/held-out/bits_per_byte": 1.02,
            "monitor/en/held-out/delta": 0.02,
            "monitor/en/held-out/retention": 1 / 1.02,
            "monitor/en/held-out/retention_low": 0.9,
            "exact/en/held-out/identical_documents": 0.75,
            "exact/en/held-out/identical_tokens": 0.9,
            "exact/en/held-out/kl": 0.25,
            "routing/en/held-out/load_entropy": 0.75,
            "monitor/cy/held-out/bits_per_byte": 1.0,
            "monitor/cy/held-out/delta": -1.0,
            "monitor/cy/held-out/gain": 0.5,
            "routing/cy/held-out/open_share": 0.5,
            "routing/cy/held-out/greatest_load": 1.5,
            "last/mean_gain": 0.5,
            "last/mean_forgotten": 0.02,
            "last/worst_forgotten": 0.02,
            "last/old_documents_identical": 0.75,
        }
    )
    assert events.Tags()["images"] == ["report/last"]
    assert (events.Images("report/last")[0].width, events.Images("report/last")[0].step) == (920, 8)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["train.steps"].number_value == 20
    assert start.hparams["data.languages.cy"].string_value == "new"
