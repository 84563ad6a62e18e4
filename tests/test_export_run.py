"""`moect export`: from a run's folder and checkpoint to a folder that plain transformers loads."""

import copy
import dataclasses
import json
from dataclasses import replace

import pytest
import torch
import yaml
from export_helpers import export_run, exported, extended, python
from safetensors.torch import load_file, save_file
from tiny import disturb, logits, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moect.config import config_from_dict, config_to_yaml, load_config
from moect.data.vocabulary.tokenizer import train_tokenizer
from moect.errors import CheckpointError, ExportError
from moect.export.folder import export_model
from moect.export.generate import generate_text
from moect.model.build import base_fingerprint, build_model, lora_layers
from moect.train.checkpoints.reading import trained_tensors
from moect.train.checkpoints.writing import save_checkpoint

VOCABULARY = 300
MOE = {"fusion": "gate", "router": "sigmoid", "balance": "bias", "experts": 3}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny base in bf16 with tokenizer, licence, and a generation config that transformers grumbles about."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("qwen3", dtype=torch.bfloat16, vocab_size=VOCABULARY, initializer_range=0.2).save_pretrained(folder)
    train_tokenizer(["one two three", "un dau tri"], VOCABULARY, folder)
    (folder / "LICENSE.txt").write_text("of the base")
    values = {"do_sample": False, "temperature": 0.3, "max_new_tokens": 5, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def make_run(base_folder, tmp_path):
    """A run's folder as the trainer leaves it, and the fp32 model that the checkpoint was taken from."""

    def make(method="moe-ct", steps=(5,), rows=(), **sections):
        values = {
            "name": "run",
            "output": str(tmp_path),
            "method": method,
            "model": {"base": str(base_folder)},
            "moe": MOE,
            "data": {
                "languages": {"en": "old", "cy": "new"},
                "train": [{"path": "cy.txt", "lang": "cy"}],
            },
            **sections,
        }
        config = config_from_dict(values)
        model = build_model(replace(config, train=replace(config.train, precision="fp32"))).eval()
        folder = config.folder
        (folder / "monitor").mkdir(parents=True)
        (folder / "config.yaml").write_text(config_to_yaml(config))
        (folder / "monitor" / "forgetting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in steps:
            disturb(model, scale=0.05, seed=step)
            tensors = {name: tensor.detach().clone() for name, tensor in trained_tensors(model)}
            info = {
                "base_fingerprint": base_fingerprint(config.model, config.seed),
                "config": dataclasses.asdict(config),
            }
            save_checkpoint(folder / "checkpoints", step, {"module": tensors}, info)
        return folder, model

    return make


def greatest_difference(a, b, ids):
    return (logits(a, ids) - logits(b, ids)).abs().max().item()


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def row(lang, role, step, **values):
    return {
        "step": step,
        "lang": lang,
        "role": role,
        "domain": "held-out",
        "bits_per_byte": 1.5,
        "base_bits_per_byte": 2.0,
        "delta": -0.5,
        "bytes": 12345,
        **values,
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_run_is_exported_with_its_checkpoint_rounded_once(make_run, dtype):
    run, model = make_run(train={"precision": dtype})
    folder = export_run(run)
    assert folder == run / "export"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "export", "monitor"]
    written = load_file(folder / "model.safetensors")
    expected = model.state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        kind = torch.float32 if dtype == "fp32" or "selection_bias" in name else torch.bfloat16
        assert tensor.dtype == kind
        assert torch.equal(tensor, expected[name].to(kind)), name
    if dtype == "fp32":
        assert greatest_difference(load(folder), model, tokens(vocab=VOCABULARY)) == 0


def test_dtype_asked_for_wins_over_the_run(make_run):
    run, _ = make_run(train={"precision": "bf16"}, export={"dtype": "bf16"})
    assert load(export_run(run, dtype="fp32"), "auto").dtype == torch.float32


def test_named_checkpoint_is_the_one_exported(make_run, tmp_path):
    run, last = make_run(steps=(3, 5), train={"precision": "fp32"})
    name = "model.layers.1.moe.router.weight"
    newest = load(export_run(run, output=tmp_path / "newest")).state_dict()[name]
    third = load(export_run(run, "step-3", tmp_path / "third")).state_dict()[name]
    assert torch.equal(newest, last.state_dict()[name]) and not torch.equal(newest, third)
    with pytest.raises(CheckpointError, match="checkpoints there: step-5, step-3"):
        export_run(run, "step-4", tmp_path / "fourth")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_full_and_lora_runs_load_in_plain_transformers_without_moect(make_run, method, tmp_path):
    run, model = make_run(method, train={"precision": "fp32"})
    assert bool(lora_layers(model)) == (method == "lora")
    ids = tokens(vocab=VOCABULARY)
    save_file({"ids": ids, "logits": logits(model, ids)}, tmp_path / "expected.st")
    folder = export_run(run)
    assert not (folder / "modeling_moect.py").exists()
    code = (
        "import sys, torch\nfrom safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "expected = load_file(sys.argv[2])\n"
        "with torch.no_grad(): got = model(expected['ids']).logits\n"
        "close = (got - expected['logits']).abs().max() < 1e-4\n"
        "print(type(model).__name__, sum(map(len, report.values())), bool(close), 'moect' in sys.modules)"
    )
    printed = python(code, folder, tmp_path / "expected.st", cwd=tmp_path, isolated=True)
    assert printed == "Qwen3ForCausalLM 0 True False"
    base = load(load_config(run / "config.yaml").model.base)
    assert greatest_difference(load(folder), base, ids) > 0.01  # it was trained


def test_low_rank_updates_are_added_before_rounding(make_run):
    run, model = make_run("lora", train={"precision": "bf16"})
    written = load_file(export_run(run) / "model.safetensors")
    layer = model.model.layers[0].mlp.up_proj
    expected = layer.get_base_layer().weight + layer.get_delta_weight("default")
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight"], expected.to(torch.bfloat16))


def test_base_trained_from_scratch_is_exported_as_its_family(make_run, base_folder):
    shape = {k: v for k, v in tiny_config("llama", vocab_size=VOCABULARY).to_dict().items() if v is not None}
    shape.pop("transformers_version")
    model_section = {"from_config": json.loads(json.dumps(shape)), "tokenizer": str(base_folder)}
    run, model = make_run("full", model=model_section, train={"precision": "fp32"})
    reloaded = load(export_run(run))
    assert type(reloaded).__name__ == "LlamaForCausalLM"
    assert greatest_difference(reloaded, model, tokens(vocab=VOCABULARY)) == 0


@pytest.mark.parametrize("method", ["moe-ct", "full"])
def test_export_carries_tokenizer_licence_generation_config_and_modelling_file(method, make_run, base_folder):
    run, _ = make_run(method)
    folder = export_run(run)
    text = "one dau tri"
    theirs, ours = AutoTokenizer.from_pretrained(base_folder), AutoTokenizer.from_pretrained(folder)
    assert ours(text).input_ids == theirs(text).input_ids and ours.eos_token == theirs.eos_token
    assert (folder / "LICENSE.txt").read_text() == "of the base"
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.temperature, generation.max_new_tokens, generation.eos_token_id) == (0.3, 5, 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MoectForCausalLM" if method == "moe-ct" else "Qwen3ForCausalLM"]
    assert ("auto_map" in config) == (method == "moe-ct")
    for reference in config.get("auto_map", {}).values():
        module, name = reference.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()


def test_weights_are_sharded_when_they_are_large(make_run):
    run, model = make_run(train={"precision": "fp32"})
    folder = export_run(run, shard_bytes=40_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert greatest_difference(load(folder), model, tokens(vocab=VOCABULARY)) == 0


def test_model_card_states_origin_forgetting_and_use(make_run, base_folder):
    rows = [
        row("en", "old", 3, bits_per_byte=9.0),
        row("cy", "new", 5, gain=0.25),
        row("en", "old", 5, retention=0.987654),
    ]
    run, _ = make_run(rows=rows)
    card = (export_run(run) / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["language"] == ["en", "cy"] and front["library_name"] == "transformers"
    assert "base_model" not in front and str(base_folder) not in card  # a folder is nothing that others could open
    assert f"`{base_folder.name}`" in card and "5 steps" in card and "3 experts" in card
    assert "- en: old (to keep)" in card and "- cy: new (to learn)" in card
    table = [line for line in card.splitlines() if line.startswith(("| en", "| cy"))]
    assert table == [
        "| en | old | held-out | 2.0000 | 1.5000 | -0.5000 | retention 98.77% | 12,345 |",
        "| cy | new | held-out | 2.0000 | 1.5000 | -0.5000 | gain 25.00% | 12,345 |",
    ]
    assert "import moect" in card and "trust_remote_code=True" in card


def test_model_card_says_when_nothing_was_measured(make_run):
    run, _ = make_run(rows=[row("en", "old", 3)])  # another step
    assert "Not measured" in (export_run(run) / "README.md").read_text()


def test_existing_output_is_refused_and_kept(make_run, tmp_path):
    run, _ = make_run()
    output = tmp_path / "there"
    output.mkdir()
    (output / "precious").write_text("1")
    with pytest.raises(ExportError, match="there exists: remove it"):
        export_run(run, output=output)
    assert [p.name for p in output.iterdir()] == ["precious"]
    (output / "precious").unlink()
    assert (export_run(run, output=output) / "config.json").exists()  # an empty folder is as good as none


def test_another_base_is_refused(make_run, tmp_path):
    run, _ = make_run()
    other = tmp_path / "other"
    tiny_model("qwen3", seed=9, dtype=torch.bfloat16, vocab_size=VOCABULARY).save_pretrained(other)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["base"] = str(other)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ExportError, match="trained on another base"):
        export_run(run)
    assert not (run / "export").exists()


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no run there"):
        export_run(tmp_path)


def test_checkpoint_of_another_module_is_refused(make_run):
    run, _ = make_run()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["moe"]["experts"] = 4
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match="made with moe.experts: 3, the configuration says 4"):
        export_run(run)
    assert not (run / "export").exists()


def test_model_in_training_mode_is_not_exported(tmp_path):
    with pytest.raises(ExportError, match=r"call model.eval\(\) first"):
        export_model(extended("llama").train(), tmp_path / "export")


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = extended("llama", {"fusion": "add", "language_gate": True})
    before = copy.deepcopy(model.state_dict())
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    settings = (copy.deepcopy(model.generation_config.to_dict()), model.config._attn_implementation)
    exported(model, tmp_path / "export")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert settings == (model.generation_config.to_dict(), model.config._attn_implementation)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_exported_model_continues_a_text(make_run):
    run, _ = make_run()
    folder = export_run(run)
    text = generate_text(folder, "one two", tokens=6)
    assert text.startswith("one two") and text == generate_text(folder, "one two", tokens=6)
    drawn = [generate_text(folder, "one two", tokens=12, sample=True, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generating_from_nothing_is_refused(tmp_path, make_run):
    with pytest.raises(ExportError, match="no exported model there"):
        generate_text(tmp_path, "text")
    run, _ = make_run()
    with pytest.raises(ExportError, match="--tokens is 0"):
        generate_text(export_run(run), "text", tokens=0)
