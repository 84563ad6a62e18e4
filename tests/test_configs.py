"""Every shipped configuration can be planned, and says of its cost what `moect plan` says today. No network."""

import pytest
import torch
from plan_comments import MARK, ROOT, SHAPES, expected, found, with_shapes
from transformers import AutoConfig, AutoModelForCausalLM

from moect.cli import main
from moect.plan import render
from moect.stages import load_stages, plan_stages

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
REAL = [path for path in CONFIGS if MARK in path.read_text(encoding="utf-8")]
PUBLISHED = {  # parameters, as the models' pages on the hub count them
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
}
names = [path.stem for path in CONFIGS]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_of_real_models_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHAPES / name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("path", CONFIGS, ids=names)
def test_every_stage_of_a_shipped_configuration_is_planned(path):
    stages = with_shapes(load_stages(path))
    for stage, plan in zip(stages, plan_stages(stages, ranks=1), strict=True):
        assert plan["steps"] == stage.train.steps and plan["parameters"]["trainable"] > 0
        assert len(plan["mixture"]) == len(stage.data.train) and "memory a rank" in render(plan)


@pytest.mark.parametrize("path", REAL, ids=[path.stem for path in REAL])
def test_a_configuration_says_of_its_cost_what_the_planner_says(path):
    assert found(path) == expected(path), "stale: `python tests/plan_comments.py` prints what to paste, --write does it"


@pytest.mark.parametrize("path", REAL, ids=[path.stem for path in REAL])
def test_a_configuration_for_a_real_model_fits_its_gpu_and_measures_text_that_it_does_not_train_on(path):
    text = "\n".join(expected(path))
    assert ": fits" in text and "does not fit" not in text
    for stage in load_stages(path):
        trained = {(s.dataset, s.subset, s.split) for s in stage.data.train}
        measured = {(s.dataset, s.subset, s.split) for s in stage.data.evaluation}
        assert not trained & measured
        assert (
            {s.lang for s in stage.data.evaluation} == set(stage.data.languages) == {s.lang for s in stage.data.train}
        )


def test_there_is_a_configuration_for_each_kind_of_machine():
    assert {path.stem for path in REAL} == {
        "qwen3-0.6b",
        "llama-3.2-1b",
        "llama-3.1-8b",
        "llama-3.1-8b-nodes",
        "qwen3-8b",
        "qwen3-8b-nodes",
    }


def test_a_file_of_stages_is_planned_stage_by_stage(capsys):
    base = f"model.base={SHAPES / 'Qwen3-0.6B'}"
    command = ["plan", "--config", str(ROOT / "configs" / "qwen3-0.6b.yaml"), "--gpu", "rtx 4090", "--mfu", "0.4", base]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.index("stage learn\n") < out.index("stage settle\n")
    assert out.count("GiB on RTX 4090: fits") == 2 and out.count("at an assumed 40% MFU") == 2
    assert out.count("7 of 7 corpora are not tokenized yet") == 2 and "25.0%" in out


def test_that_there_is_no_tokenizer_is_said_once(caplog, capsys):
    caplog.set_level("INFO")
    main(["plan", "--config", str(ROOT / "configs" / "qwen3-0.6b.yaml"), f"model.base={SHAPES / 'Qwen3-0.6B'}"])
    assert sum("are not counted" in record.message for record in caplog.records) == 1
    assert "?" in capsys.readouterr().out


def test_an_unknown_gpu_is_one_line_with_those_that_are_known(capsys):
    command = ["plan", "--config", str(ROOT / "configs" / "qwen3-0.6b.yaml"), "--gpu", "RTX 9999"]
    assert main([*command, f"model.base={SHAPES / 'Qwen3-0.6B'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert (
        error.splitlines()[-1].startswith("moect: error: --gpu 'RTX 9999'") and "RTX 4090" in error and "H200" in error
    )


def test_a_run_too_large_for_its_gpu_is_told_what_to_change(capsys):
    command = ["plan", "--config", str(ROOT / "configs" / "llama-3.1-8b.yaml"), "--ranks", "8", "--gpu", "A100 40GB"]
    assert main([*command, f"model.base={SHAPES / 'Llama-3.1-8B'}"]) == 0
    assert "of 39 GiB on A100 40GB: does not fit; set train.micro_batch=1" in capsys.readouterr().out
