"""A model that was loaded by its own modelling file is saved with that file, and loads again without moect."""

import json

import pytest
import torch
from export_helpers import exported, extended, python
from safetensors.torch import save_file
from test_append import VARIANTS
from tiny import logits, tokens

import moect

CLASSES = {"AutoConfig": "MoectConfig", "AutoModel": "MoectModel", "AutoModelForCausalLM": "MoectForCausalLM"}

SAVE_AND_LOAD_AGAIN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import transformers

first, expected = Path(sys.argv[1]), load_file(sys.argv[2])
for name in ("AutoModelForCausalLM", "AutoModel"):
    load = getattr(transformers, name).from_pretrained
    again = first.parent / name
    load(first, trust_remote_code=True).save_pretrained(again)
    assert (again / "modeling_moect.py").read_text() == (first / "modeling_moect.py").read_text()
    config = json.loads((again / "config.json").read_text())
    model, report = load(again, trust_remote_code=True, output_loading_info=True)
    got = {}
    with torch.no_grad():
        got["all"] = model(expected["ids"], use_cache=False)[0]
        with model.base_only():
            got["base"] = model(expected["ids"], use_cache=False)[0]
    worst = max((got[kind] - expected[f"{kind} {name}"]).abs().max() for kind in got)
    print(name, type(model).__name__, sorted(config["auto_map"]), sum(map(len, report.values())), bool(worst < 1e-5))
assert not any(module.partition(".")[0] == "moect" for module in sys.modules)
"""


@pytest.mark.parametrize("variant", ["language-gate", pytest.param("gate", marks=pytest.mark.slow)])
def test_a_model_saved_again_by_whoever_has_no_moect_keeps_its_modelling_file(variant, tmp_path):
    model = extended("qwen3", VARIANTS[variant])
    for moe in moect.model.modules_of(model):
        moe.experts.backend = "segments"  # what the file has; it differs from compiled kernels in the last bits
    folder = exported(model, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {auto: f"modeling_moect.{ours}" for auto, ours in CLASSES.items()}
    expected = {"ids": tokens(), "all AutoModelForCausalLM": logits(model, tokens())}
    with torch.no_grad():
        expected["all AutoModel"] = model.model(tokens(), use_cache=False).last_hidden_state
        with moect.base_only(model):
            expected["base AutoModelForCausalLM"] = logits(model, tokens())
            expected["base AutoModel"] = model.model(tokens(), use_cache=False).last_hidden_state
    save_file(expected, tmp_path / "expected.st")
    lines = python(SAVE_AND_LOAD_AGAIN, folder, tmp_path / "expected.st", cwd=tmp_path, isolated=True).splitlines()
    classes = str(sorted(CLASSES))
    assert lines == [
        f"AutoModelForCausalLM MoectForCausalLM {classes} 0 True",
        f"AutoModel MoectModel {classes} 0 True",
    ]
