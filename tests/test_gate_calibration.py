"""The language gate's threshold from held-out old text: what it promises, and who uses it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binom
from small_runs import Place, copy_run
from tiny import disturb, tiny_model
from transformers import AutoConfig

from moect.config import load_config
from moect.errors import ConfigError, DataError
from moect.evaluate import evaluate_run
from moect.export.run import ExportOptions, export_run
from moect.export.source import open_run
from moect.gate_config import GateConfig, fewest_documents
from moect.model import ForwardRecord, MoeConfig, append_moe
from moect.model.language_gate import OPEN
from moect.monitor.measuring.calibration import TouchMeter, allowed, find_threshold
from moect.monitor.measuring.score import add_up
from moect.monitor.measuring.windows import TokenisedDocument
from moect.monitor.rows import GATE, read_rows
from moect.monitor.threshold import render_threshold
from moect.train.loop import train

GATED = {"fusion": "add", "experts": 3, "width": 16, "language_gate": True}
ABOVE_ALL = 0.99999999999999  # above the evidence that a gate can give


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_so_many_may_be_touched_as_the_binomial_distribution_says(limit, confidence):
    for n in (1, 5, 13, 14, 58, 59, 120, 299, 3000):
        below_K = binom.cdf(np.arange(n + 1), n, limit)
        assert allowed(n, limit, confidence) == (max(np.flatnonzero(below_K <= 1 - confidence), default=None))
    few = fewest_documents(limit, confidence)
    assert allowed(few, limit, confidence) == 0 and allowed(few - 1, limit, confidence) is None


def test_rule_of_three():
    assert fewest_documents(0.01, 0.95) == 299


def test_other_text_of_the_kind_is_touched_no_more_often_than_promised():
    """Of 2,000 calibrations on 400 documents whose greatest logits are known to be uniform."""
    gate, generator = GateConfig(max_touched_old_documents=0.05, confidence=0.9), np.random.default_rng(0)
    broken, shares = 0, []
    for _ in range(2000):
        found = find_threshold(torch.from_numpy(generator.uniform(0, 1, 400)), ["en"] * 400, gate)
        logit = math.log(found.threshold / (1 - found.threshold))
        shares.append(1 - logit)
        broken += shares[-1] > 0.05
    assert 0.05 < broken / 2000 < 0.1  # as often as allowed, but for the steps of the distribution
    assert 0.03 < np.mean(shares) < 0.05


def test_the_threshold_is_the_lowest_that_keeps_the_promise_for_every_language():
    gate = GateConfig(max_touched_old_documents=0.05, confidence=0.9)
    easy, hard = torch.arange(-100.0, 0.0), torch.arange(-90.0, 10.0)
    found = find_threshold(torch.cat([easy, hard]), ["de"] * 100 + ["en"] * 100, gate)
    k = allowed(100, 0.05, 0.9)
    assert found.touched == {"de": 0, "en": k} and k > 0 and found.documents == {"de": 100, "en": 100}
    assert math.log(found.threshold / (1 - found.threshold)) == pytest.approx(9 - k, abs=0.01)
    with pytest.raises(DataError, match="20 documents of 'en': .* needs 45 at least"):
        find_threshold(torch.zeros(20), ["en"] * 20, gate)


def test_a_gate_that_is_certain_of_an_old_document_is_closed_all_the_same(caplog):
    gate = GateConfig(max_touched_old_documents=0.5, confidence=0.5)
    find_threshold(torch.tensor([29.0, 29.0, 29.0]), ["en"] * 3, gate, highest=30.0)
    assert not caplog.text
    found = find_threshold(torch.tensor([30.0, 30.0, 30.0]), ["en"] * 3, gate, highest=30.0)
    assert "with certainty (3 of 3 in 'en') that it stays shut for every text" in caplog.text
    assert found.threshold < 1 and MoeConfig(gate_threshold=found.threshold).threshold_logit > 30
    with pytest.raises(DataError, match="with certainty"):
        find_threshold(torch.tensor([50.0, 50.0, 50.0]), ["en"] * 3, gate)
    with pytest.raises(DataError, match=r"open the language gate by themselves \(2 of 3 in 'en'\)"):
        find_threshold(torch.tensor([OPEN, OPEN, -1.0]), ["en"] * 3, gate)
    some = find_threshold(torch.tensor([OPEN, *[-1.0] * 5]), ["en"] * 6, gate)
    assert some.touched == {"en": 1} and some.threshold < 0.3


def test_a_documents_greatest_logit_is_that_of_all_its_tokens_in_all_its_windows():
    model = append_moe(tiny_model("qwen3", initializer_range=0.2), MoeConfig(**GATED))
    disturb(model, scale=0.3)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (3, 8, 21, 5, 30)]
    documents = [TokenisedDocument(i, 1, len(i), len(i)) for i in ids]
    meter = TouchMeter(len(ids), torch.device("cpu"))
    add_up(model, documents, window=12, stride=6, batch_size=3, touch=meter)
    for text, greatest in zip(ids, meter.greatest_G.tolist(), strict=True):
        seen = []
        for start in range(0, max(1, len(text) - 12 + 6), 6):
            record = ForwardRecord()
            with torch.no_grad():
                model.model(torch.tensor([text[start : start + 12]]), use_cache=False, moect_record=record)
            seen.append(record.gate_logit_T.max().item())
        assert greatest <= max(seen) + 1e-5
        if len(text) <= 12:
            with torch.no_grad():
                record = ForwardRecord()
                model.model(torch.tensor([text[:-1]]), use_cache=False, moect_record=record)
            assert greatest == pytest.approx(record.gate_logit_T.max().item(), abs=1e-5)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    place = Place(inputs, tmp_path_factory.mktemp("calibrated"))
    valid = place.output / "en.valid.jsonl"
    old, new = (
        [json.loads(line)["text"].split() for line in (inputs / f"{lang}.train.jsonl").read_text().splitlines()[:60]]
        for lang in ("en", "cy")
    )
    # with some words of the new language, or the gate would find all of them equally old: at their first token
    texts = [" ".join([*reversed(words), *new[i][: i % 5], words[0]]) for i, words in enumerate(old)]
    valid.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    place.valid = [{"path": str(valid), "lang": "en"}]
    values = {
        "moe": GATED,
        "gate": {"max_touched_old_documents": 0.1},
        "monitor": {"enabled": True, "samples": 0, "resamples": 0},
        "data": {"calibration": place.valid},
    }
    return place, values, train(place.config(**values))


def test_each_checkpoint_has_its_threshold_and_is_measured_at_it(run):
    _, _, folder = run
    rows = read_rows(folder / "monitor", GATE)
    assert [row["step"] for row in rows] == [0, 3, 6]
    for row in rows:
        assert row["documents"] == {"en": 60} and row["touched"] == {"en": allowed(60, 0.1, 0.95)}
        assert (row["limit"], row["confidence"]) == (0.1, 0.95)
    assert len({row["threshold"] for row in rows}) == 3
    assert load_config(folder / "config.yaml").moe.gate_threshold == 0.5  # what was asked for stays


def test_the_export_has_the_threshold_of_its_checkpoint(run, tmp_path):
    _, _, folder = run
    for row in read_rows(folder / "monitor", GATE)[1:]:
        output = tmp_path / str(row["step"])
        export_run(folder, ExportOptions(output=output, checkpoint=f"step-{row['step']}"))
        assert AutoConfig.from_pretrained(output).moe["gate_threshold"] == row["threshold"]


def test_a_run_that_goes_on_calibrates_as_one_that_was_not_stopped(run):
    place, values, folder = run
    stopped = {**values, "train": {"stop_after": 3}}
    train(place.config("again", **stopped))
    again = train(place.config("again", resume="auto", **values))
    assert read_rows(again / "monitor", GATE) == read_rows(folder / "monitor", GATE)
    changed = [json.loads(line).get("changed") for line in (again / "log.jsonl").read_text().splitlines()]
    assert not any("gate_threshold" in key for keys in changed if keys for key in keys)
    one, other = (load_file(f / "checkpoints/step-6/module.safetensors") for f in (folder, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_promise_is_kept_by_evaluating_again(run, tmp_path):
    folder = copy_run(run[2], "stricter")
    before = {row["step"]: row["threshold"] for row in read_rows(folder / "monitor", GATE)}
    evaluation = evaluate_run(folder, "step-6", ["gate.max_touched_old_documents=0.06"])
    row = read_rows(folder / "monitor", GATE)[-1]
    assert (row["step"], row["limit"]) == (6, 0.06) and row["threshold"] > before[6]
    assert evaluation.rows[0]["step"] == 6
    export_run(folder, ExportOptions(output=tmp_path / "e", checkpoint="step-6", verify=False))
    assert AutoConfig.from_pretrained(tmp_path / "e").moe["gate_threshold"] == row["threshold"]

    card = (tmp_path / "e" / "README.md").read_text()
    of_step = [row for row in read_rows(folder / "monitor") if row["step"] == 6]
    now, then = (next(row for row in rows if row["lang"] == "cy") for rows in (evaluation.rows, of_step))
    assert f"{now['bits_per_byte']:.4f}" in card and now["bits_per_byte"] != then["bits_per_byte"]


def test_a_promise_that_was_taken_back_or_made_stricter_no_longer_holds(run):
    folder = copy_run(run[2], "changed")
    text = (folder / "config.yaml").read_text()
    assert text.count("max_touched_old_documents: 0.1\n") == 1
    found = read_rows(folder / "monitor", GATE)[-1]["threshold"]
    for promise, expected in (("null", 0.5), ("0.05", None), ("0.2", found)):
        (folder / "config.yaml").write_text(text.replace("documents: 0.1\n", f"documents: {promise}\n"))
        if expected is None:
            with pytest.raises(ConfigError, match="no threshold was found"):
                open_run(folder, "step-6")
        else:
            assert open_run(folder, "step-6").config.moe.gate_threshold == expected


def test_a_threshold_may_be_tried_by_hand(run):
    folder = copy_run(run[2], "tried")
    before = (folder / "monitor" / GATE).read_bytes()
    evaluation = evaluate_run(folder, "step-6", [f"moe.gate_threshold={ABOVE_ALL}"])
    rows = evaluation.rows
    assert render_threshold(folder, rows[0]) is None  # nothing was promised of that one
    trained = next(row for row in read_rows(folder / "monitor") if row["step"] == 6)
    assert f"tokens pass above {trained['gate_threshold']:.6g}" in render_threshold(folder, trained)
    assert all(row["gate_threshold"] == ABOVE_ALL and row["open_share"] == 0 for row in rows)
    assert (folder / "monitor" / GATE).read_bytes() == before


def test_a_promise_that_was_not_kept_is_not_exported(run):
    folder = copy_run(run[2], "unmeasured")
    (folder / "monitor" / GATE).unlink()
    with pytest.raises(ConfigError, match="no threshold was found .* at step 6 .*moect evaluate"):
        export_run(folder, ExportOptions(checkpoint="step-6"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"gate": {"max_touched_old_documents": 0}}, "`gate.max_touched_old_documents` is 0.0: it must lie between"),
        ({"gate": {"confidence": 1.0}}, "`gate.confidence` is 1.0"),
        ({"data": {"calibration": []}}, "held-out text of en in `data.calibration`, 29 documents"),
        ({"data": {"calibration": [{"path": "cy.test.jsonl", "lang": "cy"}]}}, "is of a new language, cy"),
    ],
)
def test_promises_that_cannot_be_kept_are_refused(run, change, problem):
    place, values, _ = run
    merged = {key: {**values.get(key, {}), **change.get(key, {})} for key in {*values, *change}}
    with pytest.raises(ConfigError, match=problem):
        place.config(**merged)
