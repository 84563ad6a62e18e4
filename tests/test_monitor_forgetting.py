"""The monitor as the trainer uses it: base once, rows at every checkpoint, files that survive a crash."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from monitor_texts import evaluation_texts, make_tokenizer, run_config
from tiny import disturb, tiny_model

from moect.data.reading.evaluation import EvaluationDocument, EvaluationText
from moect.errors import ConfigError, DataError, TrainingError
from moect.model import MoeConfig, append_moe, base_only
from moect.monitor.forgetting import ForgettingMonitor
from moect.monitor.measuring.measures import bits_per_byte, gain, retention
from moect.monitor.measuring.score import score
from moect.monitor.measuring.windows import tokenise
from moect.monitor.reporting.table import render_table
from moect.monitor.rows import read_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_model(**changes):
    model = tiny_model("llama", vocab_size=300, initializer_range=0.2)
    return append_moe(model, MoeConfig(experts=3, top_k=2, width=16, **changes)).eval()


@pytest.fixture
def make_monitor(tokenizer, tmp_path):
    def make(config=None, texts=None, base_key="base-1", folder=tmp_path / "monitor"):
        return ForgettingMonitor(config or run_config(), texts or evaluation_texts(), tokenizer, folder, 0, 1, base_key)

    return make


def measure_base(monitor, model):
    with base_only(model):
        monitor.measure_base(model)


class Untouchable(torch.nn.Module):
    """A model that must not be asked."""

    def modules(self):
        raise AssertionError("the base was measured a second time")

    parameters = modules


def test_bits_retention_and_gain_are_as_defined():
    assert bits_per_byte(nll=10 * math.log(2), n_bytes=4) == pytest.approx(2.5)
    assert retention(bits=2.0, base_bits=1.5) == 0.75  # more bits than before: something was lost
    assert gain(bits=1.5, base_bits=2.0) == 0.25
    assert gain(bits=3.0, base_bits=2.0) == -0.5
    assert (retention(0.0, 0.0), retention(0.0, 1.0)) == (1.0, None)
    assert (gain(0.0, 0.0), gain(1.0, 0.0)) == (0.0, None)


def test_rows_hold_what_the_scores_say(make_monitor, tokenizer, tmp_path):
    model, monitor = make_model(), make_monitor()
    measure_base(monitor, model)
    disturb(model)
    rows = monitor.measure(model, step=7)
    common = ["step", "lang", "role", "domain", "key", "bits_per_byte", "base_bits_per_byte", "delta"]
    bounds = lambda *names: [f"{name}_{end}" for name in names for end in ("low", "high")]  # noqa: E731
    common += ["bytes", "tokens", "documents", *bounds("bits_per_byte", "delta")]
    module = ["expert_load", "blocks", "load_entropy", "router_entropy", "gate", "gate_by_block"]
    assert set(rows[0]) == {*common, "retention", *bounds("retention"), *module}
    assert set(rows[1]) == {*common, "gain", *bounds("gain"), *module}
    assert set(rows[2]) == {*common, "gain", *bounds("gain"), *module, "exact_match", "base_exact_match"}
    for row, text in zip(rows, evaluation_texts(), strict=True):
        documents = tokenise(tokenizer, text.documents)
        scores = score(model, documents, window=16, stride=8, batch_size=2)
        with base_only(model):
            base = score(model, documents, window=16, stride=8, batch_size=2)
        n_bytes = sum(len(d.full_text.encode()) for d in text.documents)
        bits, base_bits = (sum(s.nll for s in these) / math.log(2) / n_bytes for these in (scores, base))
        assert (row["step"], row["lang"], row["role"], row["bytes"]) == (7, text.lang, text.role, n_bytes)
        assert row["documents"] == len(text.documents)
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        assert row["base_bits_per_byte"] == pytest.approx(base_bits, rel=1e-6)
        assert row["delta"] == row["bits_per_byte"] - row["base_bits_per_byte"] != 0
        for name in ("bits_per_byte", "delta", "retention" if text.role == "old" else "gain"):
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    assert rows[0]["retention"] == rows[0]["base_bits_per_byte"] / rows[0]["bits_per_byte"]
    assert rows[1]["gain"] == 1 - rows[1]["bits_per_byte"] / rows[1]["base_bits_per_byte"]
    assert read_rows(tmp_path / "monitor") == rows


def test_before_training_nothing_differs_from_the_base(make_monitor):
    model, monitor = make_model(fusion="add", language_gate=True), make_monitor()
    measure_base(monitor, model)
    for row in monitor.measure(model, step=0):
        assert row["delta"] == 0.0
        assert row.get("retention", 1.0) == 1.0 and row.get("gain", 0.0) == 0.0


def test_a_closed_language_gate_keeps_the_base_exactly_whatever_the_experts_learned(make_monitor):
    model, monitor = make_model(fusion="add", language_gate=True, gate_threshold=0.999999), make_monitor()
    measure_base(monitor, model)
    disturb(model)
    for row in monitor.measure(model, step=5):
        assert row["open_share"] == 0.0 and row["delta"] == 0.0


def test_a_model_without_a_module_has_rows_without_routing(make_monitor):
    model, monitor = tiny_model(vocab_size=300), make_monitor()
    monitor.measure_base(model)
    rows = monitor.measure(model, step=0)
    assert not any("gate" in row or "expert_load" in row for row in rows)


def test_the_base_is_measured_once_and_reused_by_a_resumed_run(make_monitor):
    model, first = make_model(), make_monitor()
    assert not first.has_base()
    measure_base(first, model)
    second = make_monitor()
    assert second.has_base()
    second.measure_base(Untouchable())
    assert second.base == first.base


def other_words() -> list[EvaluationText]:
    """The usual texts, but one word of one document."""
    texts = evaluation_texts()
    texts[0].documents[0] = EvaluationDocument(texts[0].documents[0].text.replace("hundred", "thousand"))
    return texts


@pytest.mark.parametrize(
    "change",
    [
        {"base_key": "base-2"},
        {"config": run_config(monitor={"window": 12})},
        {"config": run_config(monitor={"stride": 3})},
        {"config": run_config(train={"precision": "bf16"})},
        {"texts": evaluation_texts()[:2]},
        {"texts": other_words()},
    ],
)
def test_the_base_is_measured_again_when_what_its_numbers_depend_on_changes(make_monitor, change, caplog):
    measure_base(make_monitor(), make_model())
    changed = make_monitor(**change)
    with caplog.at_level(logging.WARNING, "moect"):
        assert not changed.has_base()
    assert "base.json: is of another base, tokenizer, text or setting" in caplog.text


def test_the_base_is_kept_when_only_the_batch_size_changes(make_monitor):
    measure_base(make_monitor(), make_model())
    assert make_monitor(config=run_config(monitor={"batch_size": 7})).has_base()


def test_a_damaged_base_file_is_measured_again_and_said_so(make_monitor, tmp_path, caplog):
    measure_base(make_monitor(), make_model())
    path = tmp_path / "monitor" / "base.json"
    path.write_text(path.read_text()[:-20])
    with caplog.at_level(logging.WARNING, "moect"):
        assert not make_monitor().has_base()
    assert "base.json: is damaged; the base is measured again" in caplog.text


def test_measuring_without_a_base_is_refused(make_monitor):
    with pytest.raises(TrainingError, match="measure the base first"):
        make_monitor().measure(make_model(), step=0)


def test_a_row_takes_the_place_of_an_earlier_one_of_the_same_step_and_text(make_monitor, tmp_path):
    model, monitor = make_model(), make_monitor()
    measure_base(monitor, model)
    zero = monitor.measure(model, step=0)
    before = monitor.measure(model, step=10)
    assert monitor.rows(10) == before and monitor.rows(20) is None
    more = EvaluationText("en", "old", "news", [EvaluationDocument("one two three")])
    assert make_monitor(texts=[*evaluation_texts(), more]).rows(10) is None  # a text that was added since
    disturb(model)
    after = make_monitor().measure(model, step=10)  # a resumed run reaches the step again
    assert after != before
    lines = (tmp_path / "monitor" / "forgetting.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == zero + after
    assert sorted(p.name for p in (tmp_path / "monitor").iterdir()) == [
        "base.json",
        "forgetting.jsonl",
        "samples.jsonl",
    ]


@pytest.mark.parametrize("line", ['{"step": 1', '{"step": "six", "lang": "en", "domain": "held-out"}'])
def test_a_damaged_row_is_an_error_that_names_its_line(make_monitor, tmp_path, line):
    model, monitor = make_model(), make_monitor()
    measure_base(monitor, model)
    monitor.measure(model, step=0)
    with (tmp_path / "monitor" / "forgetting.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=r"forgetting.jsonl:4: not a row of the monitor"):
        monitor.measure(model, step=1)


def test_a_model_that_computes_no_finite_numbers_is_refused(make_monitor, tmp_path):
    model, monitor = make_model(), make_monitor()
    measure_base(monitor, model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the model at step 3 gives nan nats on 'en', 'held-out'"):
        monitor.measure(model, step=3)
    assert read_rows(tmp_path / "monitor") == []


def test_what_cannot_be_measured_is_refused_at_the_start(make_monitor, tokenizer):
    with pytest.raises(ConfigError, match="monitor.stride is 20, the window has 16 tokens"):
        make_monitor(config=run_config(monitor={"stride": 20}))
    with pytest.raises(ConfigError, match="two texts of language 'en' and domain 'held-out'"):
        make_monitor(texts=evaluation_texts()[:1] * 2)
    bos, tokenizer.bos_token = tokenizer.bos_token, None
    try:
        with pytest.raises(DataError, match="no document has two tokens"):
            make_monitor(texts=[EvaluationText("en", "old", "short", [EvaluationDocument("x")])])
    finally:
        tokenizer.bos_token = bos


def test_table_is_aligned_and_has_each_roles_mean(make_monitor):
    model, monitor = make_model(), make_monitor()
    measure_base(monitor, model)
    disturb(model)
    rows = monitor.measure(model, step=40)
    lines = render_table(rows).splitlines()
    assert lines[0].startswith("step 40")
    assert [line.split()[:2] for line in lines[3:]] == [["en", "old"], ["cy", "new"], ["cy", "new"], ["mean", "new"]]
    ends = {name: lines[1].index(name) + len(name) for name in ("base", "model", "delta", "gain")}
    for row, line in zip(rows, lines[3:], strict=False):
        for name, shown in (
            ("base", f"{row['base_bits_per_byte']:.4f}"),
            ("model", f"{row['bits_per_byte']:.4f}"),
            ("delta", f"{row['delta']:+.4f}"),
        ):
            assert line[: ends[name]].endswith(shown)
    mean_gain = (rows[1]["gain"] + rows[2]["gain"]) / 2
    assert lines[6][: ends["gain"]].endswith(f"{100 * mean_gain:.2f}%")
    assert not lines[6][ends["base"] - 6 : ends["model"]].strip()  # bits per byte have no mean across languages
    assert "open" not in lines[1]
