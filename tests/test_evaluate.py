"""`moect evaluate`: what a training measured at a checkpoint, measured again; other texts; other ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROLES, copy_run, free_port

from moect.errors import CheckpointError, ConfigError
from moect.evaluate import evaluate_mixed, evaluate_run
from moect.monitor.rows import APART, MIXED, SAMPLES, read_rows
from moect.train.loop import train

METHODS = {
    "moe-ct": {"moe": {"fusion": "add", "experts": 3, "language_gate": True}},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module", params=["moe-ct", "full", pytest.param("lora", marks=pytest.mark.slow)])
def run(request, inputs, tmp_path_factory):
    from small_runs import Place

    place = Place(inputs, tmp_path_factory.mktemp("evaluated"))
    return train(place.config(**METHODS[request.param], monitor={"enabled": True, "sample_tokens": 6}))


def test_a_checkpoint_measured_again_has_the_numbers_that_the_training_wrote(run, tmp_path):
    copy = copy_run(run, "again")
    before = {(r["step"], r["lang"]): r for r in read_rows(copy / "monitor")}
    samples = read_rows(copy / "monitor", SAMPLES)
    evaluation = evaluate_run(copy, "step-3")
    assert evaluation.checkpoint == copy / "checkpoints" / "step-3" and len(evaluation.rows) == len(ROLES)
    for row in evaluation.rows:
        assert row == before[3, row["lang"]]
    assert {(r["step"], r["lang"]): r for r in read_rows(copy / "monitor")} == before
    assert read_rows(copy / "monitor", SAMPLES) == samples


def test_documents_of_two_languages_are_measured_where_there_is_a_gate(run):
    copy = copy_run(run, "mixed")
    if not (run / "config.yaml").read_text().count("language_gate: true"):
        with pytest.raises(ConfigError, match="and it has none"):
            evaluate_mixed(copy)
        return
    evaluation = evaluate_mixed(copy, "step-3", ["moe.gate_threshold=0.2"])
    rows = read_rows(copy / "monitor", MIXED)
    assert rows == evaluation.rows and evaluation.checkpoint.name == "step-3"
    assert {(r["step"], r["old"], r["new"], r["gate_threshold"]) for r in rows} == {(3, "en", "cy", 0.2)}
    assert evaluate_mixed(copy, "step-3").rows[0]["gate_threshold"] == 0.5


def test_without_a_name_it_is_the_checkpoint_that_would_be_exported(run):
    gains = {r["step"]: r["gain"] for r in read_rows(run / "monitor") if r["lang"] == "cy" and r["step"]}
    best = max(gains, key=lambda step: (gains[step], step))
    assert evaluate_run(copy_run(run, "best")).checkpoint.name == f"step-{best}"


def test_other_texts_are_added_to_what_was_measured(run, tmp_path):
    copy = copy_run(run, "more")
    (tmp_path / "news.jsonl").write_text('{"text": "one two three four"}\n{"text": "seven hundred and two"}\n')
    texts = json.dumps([{"path": str(tmp_path / "news.jsonl"), "lang": "en", "domain": "news"}])
    evaluation = evaluate_run(copy, "step-6", [f"data.evaluation={texts}", "monitor.stride=2"])
    assert [(r["step"], r["lang"], r["domain"]) for r in evaluation.rows] == [(6, "en", "news")]
    assert read_rows(copy / "monitor") == read_rows(run / "monitor")  # the training's own stay
    assert read_rows(copy / "monitor", APART) == evaluation.rows


def test_what_is_not_measurement_cannot_be_changed(run):
    with pytest.raises(ConfigError, match="override 'train.lr=1': only what is measured can differ from the run"):
        evaluate_run(run, overrides=["train.lr=1"])
    with pytest.raises(ConfigError, match="data.evaluation is empty"):
        evaluate_run(run, overrides=["data.evaluation=[]"])
    with pytest.raises(CheckpointError, match="step-5: .*checkpoints there: step-6, step-3"):
        evaluate_run(run, "step-5")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        evaluate_run(run / "monitor")


def test_two_ranks_measure_what_one_does_and_the_command_says_what_it_wrote(inputs, tmp_path):
    from small_runs import Place

    place = Place(inputs, tmp_path)
    folder = train(place.config(**METHODS["moe-ct"], monitor={"enabled": True, "sample_tokens": 6}))
    before = read_rows(folder / "monitor")
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launched} | {"DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    result = subprocess.run(
        [*launcher, "--module", "moect.cli", "evaluate", folder, "--checkpoint", "step-6", "monitor.batch_size=3"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"wrote {folder}/report.html") == 1
    assert result.stdout.count("bits per byte on held-out text") == 1
    assert read_rows(folder / "monitor") == before
    measured = {(r["step"], r["lang"]): r for r in read_rows(folder / "monitor", APART)}  # to a rounding
    assert all(key[0] == 6 for key in measured)
    for was in (r for r in before if r["step"] == 6):
        row = measured.get((6, was["lang"]), was)
        for key in ("bits_per_byte", "delta", "gate", "open_share"):
            assert row[key] == pytest.approx(was[key], abs=1e-6)
        assert row["exact"]["identical_tokens"] == was["exact"]["identical_tokens"]
