"""A second set of languages for a model that has learned one: the role `learnt` in mixture, gate, monitor, report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from moect.config import config_from_dict
from moect.data.batches.loader import Loader
from moect.data.batches.mixture import corpus_weights
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.errors import ConfigError
from moect.evaluate import evaluate_run
from moect.monitor.comparing.comparison import compare
from moect.monitor.reporting.table import render_table
from moect.monitor.rows import read_rows
from moect.monitor.verdict import judge
from moect.stages import load_stages, run_stages
from moect.train.gate_start import evidence_of
from moect.train.loop import train

THIRD = "einn tveir thrir fjorir fimm sex sjo hundrad"
LATER = {"en": "old", "cy": "learnt", "is": "new"}


def texts(folder: Path) -> None:
    """Texts of a third language beside those of the first two."""
    rng = np.random.default_rng(3)
    for part, count in (("train", 120), ("test", 6)):
        lines = (" ".join(rng.choice(THIRD.split(), size=rng.integers(2, 15))) for _ in range(count))
        (folder / f"is.{part}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def later(place, **sections) -> dict:
    """What the second stage has of its own."""
    texts(place.inputs)
    data = {"languages": LATER, "replay": 0.5}
    data["train"] = [{"path": f"{lang}.train.jsonl", "lang": lang} for lang in LATER]
    data["evaluation"] = [{"path": f"{lang}.test.jsonl", "lang": lang} for lang in LATER]
    model = {"base": str(place.inputs / "base"), "start": "stage:first"}
    return {"name": "later", "model": model, "data": data, **sections}


def write(place, *stages: dict, **common) -> Path:
    values = place.values("life", **{"monitor": {"enabled": True}, **common})
    del values["model"]
    path = place.output / "life.yaml"
    path.write_text(yaml.safe_dump(values | {"stages": list(stages)}))
    return path


def first(place) -> dict:
    return {"name": "first", "model": {"base": str(place.inputs / "base")}}


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Both stages, run once."""
    from small_runs import Place, make_inputs

    folder = tmp_path_factory.mktemp("life")
    (folder / "inputs").mkdir()
    place = Place(make_inputs(folder / "inputs"), folder)
    run_stages(load_stages(write(place, first(place), later(place))))
    return place


def rows_of(place, stage: str) -> dict:
    rows = read_rows(place.output / "life" / stage / "monitor")
    return {(row["step"], row["lang"]): row for row in rows}


def test_what_was_learnt_is_held_against_the_beginning_of_the_run(life):
    learned, now = rows_of(life, "first")[6, "cy"], rows_of(life, "later")
    begun = now[0, "cy"]["bits_per_byte"]
    assert begun == pytest.approx(learned["bits_per_byte"]) and begun < learned["base_bits_per_byte"]
    for step in (0, 3, 6):
        row = now[step, "cy"]
        assert row["role"] == "learnt" and "gain" not in row
        assert row["base_bits_per_byte"] == begun
        assert row["retention"] == pytest.approx(begun / row["bits_per_byte"])
        assert row["retention_low"] <= row["retention"] <= row["retention_high"]
        # that of the base itself is compared with the base, and logits with the base's only there
        assert now[step, "en"]["base_bits_per_byte"] == now[0, "en"]["base_bits_per_byte"]
        assert "exact" in now[step, "en"] and "exact" in now[step, "is"] and "exact" not in row
    assert now[0, "cy"]["retention"] == 1.0 and now[6, "cy"]["retention"] != 1.0
    assert now[6, "is"]["gain"] > now[0, "is"]["gain"]


def test_it_takes_part_in_the_replay_by_its_size(life):
    position = json.loads((life.output / "life/later/checkpoints/step-6/checkpoint.json").read_text())["data"]
    drawn = position["drawn"]
    assert drawn["is.train.jsonl"] == 24 and drawn["en.train.jsonl"] + drawn["cy.train.jsonl"] == 24
    assert drawn["cy.train.jsonl"] > 4
    weights = corpus_weights([10, 30, 60], ["old", "learnt", "new"], [None] * 3, replay=0.4, temperature=1.0)
    np.testing.assert_allclose(weights, [0.1, 0.3, 0.6])


def test_a_resumed_run_compares_with_the_same_beginning(life, tmp_path, caplog):
    path = life.output / "life.yaml"
    folder = life.output / "life" / "later"
    whole = read_rows(folder / "monitor")
    kept = tmp_path / "later"
    shutil.copytree(folder, kept)
    try:
        shutil.rmtree(folder / "checkpoints" / "step-6")
        train(load_stages(path, ["resume=auto"])[1])
        assert read_rows(folder / "monitor") == whole
        # without it, it is told as what it is against the base
        shutil.rmtree(folder / "checkpoints" / "step-6")
        (folder / "monitor" / "start.json").write_text("[")
        train(load_stages(path, ["resume=auto"])[1])
        last = rows_of(life, "later")[6, "cy"]
        assert (
            last["role"] == "new"
            and last["gain"] > 0
            and "no limit of monitor.max_forgetting holds for it" in caplog.text
        )
    finally:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def test_what_it_may_lose_is_a_limit_like_any_other(life):
    stages = load_stages(life.output / "life.yaml")
    rows = [row for (step, _), row in rows_of(life, "later").items() if step == 6]
    data, monitor = stages[1].data, {"max_forgetting": {"cy": 0.01}}
    texts = [{"path": f"{lang}.test.jsonl", "lang": lang} for lang in LATER]
    changes = {"data": {"languages": data.languages, "evaluation": texts}, "monitor": monitor}
    config = config_from_dict(life.values("x", model={"start": "y"}, **changes))
    for row in rows:
        if row["lang"] == "cy":
            row["delta"] = 0.02
    verdict = judge(rows, config)
    assert [e.lang for e in verdict.excess] == ["cy"] and verdict.gain == pytest.approx(
        next(row["gain"] for row in rows if row["lang"] == "is")
    )


def test_table_report_and_comparison_tell_it_apart(life):
    later_run = life.output / "life" / "later"
    rows = [row for (step, _), row in rows_of(life, "later").items() if step == 6]
    roles = [line.split()[1] for line in render_table(rows).splitlines()[3:]]
    assert roles == ["old", "learnt", "new"]
    text = (later_run / "report.md").read_text()
    assert "learnt languages" in text
    left_out = compare([life.output / "life" / stage for stage in ("first", "later")]).left_out
    assert any("cy" in str(text) and "learnt in later" in why for text, why in left_out.items())


def test_evaluate_knows_the_beginning_on_the_run_s_own_texts(life):
    run = life.output / "life" / "later"
    before = rows_of(life, "later")[6, "cy"]
    evaluated = {row["lang"]: row for row in evaluate_run(run).rows}
    assert evaluated["cy"]["base_bits_per_byte"] == before["base_bits_per_byte"]
    others = evaluate_run(run, overrides=["data.evaluation=[{path: cy.train.jsonl, lang: cy, limit: 5}]"]).rows
    assert others[0]["role"] == "new" and others[0]["base_bits_per_byte"] > before["base_bits_per_byte"]


def test_a_gate_takes_what_was_learnt_for_new(place):
    texts(place.inputs)
    stage = later(place)
    config = config_from_dict(place.values("gate", model={"start": "x"}, data=stage["data"]))
    loader = Loader(config, load_tokenizer(config.model), place.output / "cache")
    role_of = {"old": 0, "learnt": 1, "new": 1}
    languages = sorted(LATER)
    seen = set()
    for batch in loader.next_step():
        for language_S, role_S in zip(batch.language_BS.tolist(), batch.role_BS.tolist(), strict=True):
            for language, role in zip(language_S, role_S, strict=True):
                if language >= 0:
                    seen.add(languages[language])
                    assert role == role_of[LATER[languages[language]]]
    assert seen == set(LATER)
    evidence_V, weight_V = evidence_of(config, loader.stores, 300, [])
    as_new = config_from_dict(place.values("gate", data=stage["data"] | {"languages": {**LATER, "cy": "new"}}))
    assert (evidence_V == evidence_of(as_new, loader.stores, 300, [])[0]).all() and weight_V.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"start": None}}, "no earlier run learned it: give that run as `model.start`"),
        ({"data": {"calibration": [{"path": "cy.test.jsonl", "lang": "cy"}]}}, "of a learnt language, cy"),
        (
            {"data": {"languages": {"en": "new", "cy": "new", "is": "new"}}},
            "`data.train` is of an old or learnt",
        ),
        ({"monitor": {"max_forgetting": {"is": 0.1}}}, "`is` is no old or learnt language"),
    ],
)
def test_what_cannot_be_meant_is_refused(place, changes, words):
    stage = later(place)
    sections = {"model": {"start": "x"}, "data": stage["data"]}
    merged = {key: {**sections.get(key, {}), **changes.get(key, {})} for key in {*sections, *changes}}
    with pytest.raises(ConfigError, match=words):
        config_from_dict(place.values("bad", **merged))
