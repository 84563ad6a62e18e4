"""The verification of an export: it finds what is wrong, in every way of comparing, and leaves nothing behind."""

import json

import pytest
import torch
from export_helpers import export_run, extended
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, logits, tokens

from moect.errors import ExportError
from moect.export import folder as writing
from moect.export.folder import export_model
from moect.export.proof import by_block as by_block_module
from moect.export.proof import verify as proving
from moect.export.proof.assembled import assemble
from moect.export.proof.comparison import Comparison, Text
from moect.export.proof.verify import verify
from moect.export.shards import plan_shards
from moect.export.targets.choice import choose
from moect.export.targets.form import HEAD
from moect.export.trained import TrainedModel, of_model
from moect.model import base_only, modules_of
from moect.model.embeddings import append_rows
from moect.train.loop import train

NATIVE = {"fusion": "add", "router": "sigmoid", "balance": "bias"}
GATED = {"fusion": "add", "language_gate": True, "layers": [0, 2]}
TARGETS = {"glm4_moe": NATIVE, "qwen2_moe": {"fusion": "add"}, "moect": GATED}


def texts():
    return [Text("en", row[None]) for row in tokens(2)]


def proof(model, folder, name, by_block=None):
    """The verification of a folder that was written earlier."""
    trained = of_model(model)
    target = choose(name, trained.subject)
    return verify(folder, target, trained, trained, plan_shards(target, trained), texts(), by_block)


def change(folder, action):
    tensors = load_file(folder / "model.safetensors")
    action(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", TARGETS)
def test_both_ways_of_comparing_find_the_same(name, tmp_path):
    model = extended("llama", TARGETS[name])
    export_model(model, tmp_path / "export", name)
    whole, by_block = (proof(model, tmp_path / "export", name, by_block) for by_block in (False, True))
    assert (whole.difference, whole.routes, whole.agreement) == (0.0, by_block.routes, 1.0)
    assert by_block.difference == 0.0 and by_block.by_block and whole.tokens == by_block.tokens == {"en": 34}
    assert whole.routes == by_block.routes > 0


@pytest.mark.parametrize("layers", ["all", [1, 2]], ids=str)
def test_both_ways_show_a_gate_that_counts_the_tokens(layers, tmp_path):
    moe = {"fusion": "add", "language_gate": True, "gate_sees": "pairs", "layers": layers}
    model = extended("llama", moe)
    export_model(model, tmp_path / "export", "moect")
    whole, by_block = (proof(model, tmp_path / "export", "moect", by_block) for by_block in (False, True))
    assert whole.difference == by_block.difference == 0.0
    assert whole.routes == by_block.routes > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_assembled_model_computes_what_the_trained_model_computes(family):
    model = extended(family, GATED if family == "qwen3" else {"fusion": "discrete"})
    append_rows(model, [3, 5, 90], 96, [[4, 5], [7]])
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.shape[-1] == 32 and len(parameter) == 5:
            parameter.data.normal_()
    model.set_attn_implementation("eager")
    for moe in modules_of(model):
        moe.experts.backend = "reference"
    trained = of_model(model)
    got = assemble(trained.subject, trained)
    assert torch.equal(logits(got, tokens()), logits(model, tokens()))
    with base_only(got), base_only(model):
        assert torch.equal(logits(got, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.layers.0.moe.router.weight"), "1 tensors of the model are missing, first model.layers"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra, which the model does not have"),
        (lambda t: t["lm_head.weight"].view(torch.int32)[0].bitwise_xor_(1), "lm_head.weight is not what"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}), "lm_head.weight is not what"),
    ],
    ids=["missing", "left-over", "one-bit", "dtype"],
)
def test_every_tensor_is_accounted_for(damage, message, tmp_path):
    model = extended("llama")
    export_model(model, tmp_path / "export", "moect")
    change(tmp_path / "export", damage)
    with pytest.raises(ExportError, match=message):
        proof(model, tmp_path / "export", "moect")


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("wrong", [1e-2, float("nan")], ids=["another-number", "not-a-number"])
def test_logits_that_differ_fail_the_verification(wrong, by_block, tmp_path, monkeypatch):
    """Nothing that a tensor could show: the target's own configuration is wrong."""
    model = extended("llama", NATIVE)
    target = choose("glm4_moe", of_model(model).subject)
    right = type(target).values
    monkeypatch.setattr(type(target), "values", lambda self, subject: {**right(self, subject), "rms_norm_eps": wrong})
    with pytest.raises(ExportError, match="its logits differ by .*bound 1e-05.*routes are the same"):
        export_model(model, tmp_path / "export", "glm4_moe", by_block=by_block)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by_block", [False, True])
def test_a_tensor_that_the_architecture_does_not_know_fails_the_verification(by_block, tmp_path, monkeypatch):
    model = extended("llama", NATIVE)
    target = choose("glm4_moe", of_model(model).subject)
    right = type(target).mixture

    def renamed(self, subject, index):
        pieces = right(self, subject, index)
        return [*pieces[:-1], type(pieces[-1])(f"{pieces[-1].name}_", pieces[-1].parts, pieces[-1].make)]

    monkeypatch.setattr(type(target), "mixture", renamed)
    with pytest.raises(ExportError, match="transformers reports (missing|unexpected) keys"):
        export_model(model, tmp_path / "export", "glm4_moe", by_block=by_block)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_forgets_a_tensor_or_writes_one_twice_is_found(tmp_path, monkeypatch):
    model = extended("llama", NATIVE)
    target = choose("glm4_moe", of_model(model).subject)
    right = type(target).mixture
    monkeypatch.setattr(type(target), "mixture", lambda *args: right(*args)[:-1])
    with pytest.raises(ExportError, match=r"3 tensors of the model have no place in it, first model\.layers\.0\.mlp"):
        export_model(model, tmp_path / "export", "glm4_moe")
    monkeypatch.setattr(type(target), "mixture", lambda *args: [*right(*args), right(*args)[-1]])
    with pytest.raises(ExportError, match="a tensor would be written twice"):
        export_model(model, tmp_path / "export", "glm4_moe")


def test_files_that_are_wrong_fail_the_verification_and_nothing_stays(tmp_path, monkeypatch):
    write = writing.write_shards

    def write_wrong(shards, trained, folder):
        write(shards, trained, folder)
        change(folder, lambda tensors: tensors["model.norm.weight"].add_(0.5))

    monkeypatch.setattr(writing, "write_shards", write_wrong)
    with pytest.raises(ExportError, match=r"model\.norm\.weight is not what the model has"):
        export_model(extended("llama"), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_difference_that_is_no_number_is_never_within_the_bound():
    comparison = Comparison(bound=1.0)
    comparison.add_logits(texts()[0], torch.tensor([0.0]), torch.tensor([float("nan")]))
    comparison.add_logits(texts()[0], torch.zeros(1), torch.zeros(1))
    with pytest.raises(ExportError, match="differ by nan"):
        comparison.check("there")


def test_what_was_found_is_said_with_its_numbers():
    comparison = Comparison(bound=1e-4, difference=2.5e-6, tokens={"en": 1200, "cy": 3}, routes=8, same_routes=6)
    assert comparison.sentence() == (
        "logits in fp32: differ by at most 2.5e-06; 75.00% of the routes are the same (tokens: en 1,200, cy 3)"
    )


@pytest.mark.parametrize("by_block", [False, True])
def test_a_configuration_that_is_not_the_target_s_fails_the_verification(by_block, tmp_path):
    model = extended("llama", NATIVE)
    export_model(model, tmp_path / "export", "glm4_moe")
    path = tmp_path / "export" / "config.json"
    whole = json.loads(path.read_text())
    for key, value in (("rms_norm_eps", 1e-3), ("num_experts_per_tok", 1), ("routed_scaling_factor", float("nan"))):
        path.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(ExportError, match=f"config.json has {key} "):
            proof(model, tmp_path / "export", "glm4_moe", by_block)
    path.unlink()
    with pytest.raises(ExportError, match="config.json cannot be read"):
        proof(model, tmp_path / "export", "glm4_moe", by_block)


def test_updates_that_were_not_merged_are_found(place, monkeypatch):
    """The proof is against the model as training builds it, not against what the exporter has read."""
    run = train(place.config(method="lora", train={"steps": 4, "lr": 0.05}))
    monkeypatch.setattr("moect.export.trained.lora_layers", lambda model: [])
    with pytest.raises(ExportError, match="its logits differ by"):
        export_run(run)
    assert not (run / "export").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_were_added_wrongly_are_found(dtype, tmp_path, monkeypatch):
    model = extended("qwen2", NATIVE, dtype)
    append_rows(model, [3, 5, 90], 96, [[4, 5], [7]])
    for name, parameter in model.named_parameters():
        if ".rows." in name:
            parameter.data.add_(0.1)
    fold = proving.fold_rows

    def fold_wrongly(trained, exact=False):
        folded = fold(trained, exact)
        return TrainedModel(folded.subject, folded.slots, lambda n: 3 * folded[n] if n == HEAD else folded[n])

    for module in (proving, writing, by_block_module):
        monkeypatch.setattr(module, "fold_rows", fold_wrongly)
    with pytest.raises(ExportError, match="its logits differ by"):
        export_model(model, tmp_path / "export", "glm4_moe")


def test_damage_that_no_comparison_of_logits_follows_leaves_nothing_behind_either(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "check_tensors", lambda *args: (_ for _ in ()).throw(ExportError("damaged")))
    trained = of_model(extended("llama", NATIVE))
    with pytest.raises(ExportError, match="damaged"):
        writing.write_folder(
            trained,
            choose("moect", trained.subject),
            tmp_path / "export",
            [],
            writing.Extras(),
            lambda c: "",
            proven=False,
        )
    assert list(tmp_path.iterdir()) == []
