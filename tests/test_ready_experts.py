"""Experts that begin as the FFNs of a model that was trained further in full."""

from __future__ import annotations

import shutil

import pytest
import torch
from small_runs import VOCABULARY, assert_same_bits, losses, tensors
from tiny import logits, tiny_model, tokens
from transformers import AutoModelForCausalLM

from moect.config import config_from_dict
from moect.errors import CheckpointError, ConfigError
from moect.model.build import build_model
from moect.model.ready_experts import take_experts
from moect.stages import load_stages, run_stages
from moect.train.loop import train


@pytest.fixture
def further(place) -> str:
    """Another model of the base's shape."""
    folder = place.output / "further"
    shape = AutoModelForCausalLM.from_pretrained(place.inputs / "base").config.to_dict()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("head_dim", "tie_word_embeddings")
    model = tiny_model(shape["model_type"], seed=9, vocab_size=VOCABULARY, **{key: shape[key] for key in keys})
    model.save_pretrained(folder)
    return str(folder)


def test_the_block_mixes_the_frozen_ffn_with_the_other_model_s(place, further):
    config = place.config(moe={"fusion": "fixed", "fixed_weight": 0.25}, model={"experts_from": further})
    model = build_model(config).eval()
    base, other = (AutoModelForCausalLM.from_pretrained(path) for path in (place.inputs / "base", further))
    ids = tokens(vocab=VOCABULARY)
    torch.testing.assert_close(logits(model, ids), logits(base, ids), atol=1e-5, rtol=0)
    take_experts(model, config)
    for block, of_other in zip(base.model.layers, other.model.layers, strict=True):
        block.mlp.register_forward_hook(lambda ffn, x, f, second=of_other.mlp: 0.25 * f + 0.75 * second(x[0]))
    got, expected = logits(model, ids), logits(base, ids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_stage_takes_the_experts_of_an_earlier_one_and_resumes_without_it(place, capsys):
    values = place.values("both", train={"steps": 2, "save_every": 2, "warmup": 0})
    again = {"model": {"experts_from": "stage:ct"}, "train": {"steps": 4}}
    path = place.output / "both.yaml"
    stages = [{"name": "ct", "method": "full"}, {"name": "moe", **again}]
    path.write_text(str({**values, "resume": "auto", "stages": stages}))
    run_stages(load_stages(path))
    whole = place.output / "both" / "moe"
    plain = train(place.config("plain", train={"steps": 4, "save_every": 2, "warmup": 0}))
    assert losses(whole)[0] != pytest.approx(losses(plain)[0], abs=1e-3), "it began with other experts"

    stopped = {
        **values,
        "name": "stopped",
        "model": {**values["model"], "experts_from": str(whole.parent / "ct/export")},
    }
    stopped["train"] = {**values["train"], "steps": 4}
    train(config_from_dict({**stopped, "train": {**stopped["train"], "stop_after": 2}}))
    ct = whole.parent / "ct" / "export" / "model.safetensors"
    kept = ct.read_bytes()
    ct.write_bytes((whole.parent / "ct/export/config.json").read_bytes())
    with pytest.raises(CheckpointError, match="its experts did not begin as those of"):
        train(config_from_dict({**stopped, "resume": "auto"}))
    ct.write_bytes(kept)
    shutil.rmtree(whole.parent / "ct")
    resumed = train(config_from_dict({**stopped, "resume": "auto"}))
    assert losses(resumed) == losses(whole)
    assert_same_bits(resumed, whole, 4)


def test_divided_experts_get_the_same(place, further):
    settings = {"steps": 1, "save_every": 1, "warmup": 0, "lr": 1e-30, "eps": 1.0}
    model = {"experts_from": further}
    runs = [train(place.config(f"z{s}", model=model, train={**settings, "zero_stage": s})) for s in (2, 3)]
    two, three = (tensors(run, 1, "module") for run in runs)
    name = "module:model.layers.1.moe.experts.down_proj"
    expected = AutoModelForCausalLM.from_pretrained(further).model.layers[1].mlp.down_proj.weight
    assert torch.equal(two[name], expected.expand_as(two[name])) and torch.equal(three[name], two[name])


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"moe": {"fusion": "add"}}, "experts that begin as FFNs"),
        ({"method": "full"}, "experts that begin as FFNs"),
        ({"model": {"start": "runs/x"}}, "both say how experts begin"),
    ],
)
def test_what_cannot_begin_so_is_refused(place, further, sections, problem):
    model = {"experts_from": further, **sections.pop("model", {})}
    with pytest.raises(ConfigError, match=problem):
        place.config(model=model, **sections)


def test_a_model_of_another_shape_and_experts_that_are_no_copies_are_refused(place, further):
    tiny_model("qwen3", vocab_size=VOCABULARY, num_hidden_layers=2).save_pretrained(place.output / "shorter")
    config = place.config(model={"experts_from": str(place.output / "shorter")})
    with pytest.raises(ConfigError, match="has num_hidden_layers 2, the base 3"):
        take_experts(build_model(config), config)
    config = place.config(model={"experts_from": further}, moe={"width": 16})
    with pytest.raises(ConfigError, match="`moe.width: null`"):
        take_experts(build_model(config), config)
