"""The exported class with `device_map`: blocks that lie on disk until they are called, the deciding one among them."""

import pytest
import torch
from export_helpers import exported, extended
from safetensors.torch import load_file, save_file
from test_append import VARIANTS
from test_embeddings import ids_with_added, with_rows
from tiny import logits, tokens
from transformers import AutoModelForCausalLM

from moect.errors import UnsupportedModelError

PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head")
GATES = {"fusion-gate": VARIANTS["gate"], "language-gate": {**VARIANTS["language-gate"], "balance": "bias"}}


def loaded(folder, tmp_path, on_disk=()):
    """The model with these parts on disk."""
    where = {place: "disk" if place in on_disk else "cpu" for place in PLACES}
    where["model.rotary_emb"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "offload")
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == {
        name for name, _ in model.named_parameters() if name.startswith(tuple(on_disk))
    }
    return model


@pytest.fixture(scope="module", params=GATES)
def saved(request, tmp_path_factory):
    """An export, its logits and greedy text where nothing is offloaded, and the logits of its base."""
    folder = exported(extended("qwen3", GATES[request.param]), tmp_path_factory.mktemp("offload") / "export")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with model.base_only():
        base = logits(model, tokens())
    return folder, logits(model, tokens()), greedy(model), base


def greedy(model):
    return model.generate(tokens(2, 8), max_new_tokens=8, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"], ids=str)
def test_a_model_placed_by_accelerate_is_the_same_model(device_map, saved):
    folder, expected, _, _ = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), tokens()), expected)


@pytest.mark.parametrize(
    "on_disk",
    [("model.layers.0",), ("model.layers.1", "model.layers.2", "lm_head"), PLACES[1:4], PLACES],
    ids=["the-deciding-block", "blocks-above-it", "all-blocks", "all"],
)
def test_blocks_on_disk_compute_the_same_bits(on_disk, saved, tmp_path):
    folder, expected, text, base = saved
    model = loaded(folder, tmp_path, on_disk)
    assert torch.equal(logits(model, tokens()), expected)
    assert torch.equal(greedy(model), text)
    with model.base_only():
        assert torch.equal(logits(model, tokens()), base)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_are_fetched_from_disk_with_their_matrix(tied, tmp_path):
    trained = with_rows(tied, gate=True)
    folder = exported(trained, tmp_path / "export")
    ids = ids_with_added(trained)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    assert torch.equal(
        logits(loaded(folder, tmp_path, ("model.embed_tokens", "model.layers.0", "lm_head")), ids), expected
    )


def test_an_export_with_the_gate_of_an_earlier_version_is_refused(tmp_path):
    folder = exported(extended("llama", VARIANTS["language-gate"]), tmp_path / "export")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    old = {n.replace(".evidence.", ".in_proj."): t.clone() for n, t in tensors.items()}
    save_file(old, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="a language gate of an earlier form"):
        AutoModelForCausalLM.from_pretrained(folder)
