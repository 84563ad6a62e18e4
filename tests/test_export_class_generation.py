"""Generation with the exported class: beams, batches with padding on the left, and every attention kernel on a CPU."""

import pytest
import torch
from export_helpers import exported, extended
from test_append import VARIANTS
from tiny import FAMILIES, logits, tokens
from transformers import AutoModelForCausalLM

GATES = ("gate", "language-gate")
OPTIONS = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


def load(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # from a file's mapping products round differently
    return model


@pytest.fixture(scope="module", params=GATES)
def saved(request, tmp_path_factory):
    """A trained model and its export."""
    model = extended("qwen3", VARIANTS[request.param])
    return model, exported(model, tmp_path_factory.mktemp("generation") / "export")


def test_beams_with_the_cache_are_those_without_it_and_those_of_the_trained_model(saved):
    model, folder = saved
    reloaded = load(folder)
    beams = {"num_beams": 3, "num_return_sequences": 2, **OPTIONS}
    cached = reloaded.generate(tokens(2, 8), **beams)
    assert cached.shape == (4, 18)
    assert torch.equal(cached, reloaded.generate(tokens(2, 8), use_cache=False, **beams))
    assert torch.equal(cached, model.generate(tokens(2, 8), **beams))
    assert not torch.equal(cached[::2], reloaded.generate(tokens(2, 8), **OPTIONS))


def test_beams_of_padded_texts_are_those_of_each_text_alone(saved):
    reloaded = load(saved[1])
    ids, lengths = tokens(3, 12), (12, 5, 8)
    mask = torch.stack([(torch.arange(12) >= 12 - n).long() for n in lengths])
    batch = reloaded.generate(ids * mask, attention_mask=mask, num_beams=3, **OPTIONS)
    for row, text, n in zip(batch, ids, lengths, strict=True):
        assert torch.equal(row[12:], reloaded.generate(text[None, -n:], num_beams=3, **OPTIONS)[0, n:])


@pytest.mark.parametrize(
    ("family", "kernels"),
    [*((family, ("sdpa", "eager")) for family in FAMILIES)]
    + [pytest.param(family, ("sdpa", "flex_attention"), marks=pytest.mark.slow) for family in ("llama", "mistral")],
)
def test_kernels_of_attention_agree_on_padded_and_packed_rows(family, kernels, tmp_path):
    window = {"sliding_window": 6} if family == "mistral" else {}
    folder = exported(extended(family, VARIANTS["language-gate"], **window), tmp_path / "export")
    ids = tokens(2, 12)
    padded = {"attention_mask": torch.stack([torch.ones(12), torch.arange(12) >= 5]).long()}
    packed = {"position_ids": torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)}
    model = load(folder)
    for kind, seen in ((padded, padded["attention_mask"].bool()), (packed, torch.ones(2, 12, dtype=torch.bool))):
        got = {}
        for kernel in kernels:
            model.set_attn_implementation(kernel)
            assert {block.self_attn.config._attn_implementation for block in model.model.layers} == {kernel}
            got[kernel] = logits(model, ids, **kind)[seen]
        assert (got[kernels[0]] - got[kernels[1]]).abs().max() < 2e-5
    second = logits(model, ids[:, 7:])
    assert (logits(model, ids, **packed)[:, 7:] - second).abs().max() < 2e-5


def test_a_kernel_asked_for_when_loading_reaches_every_block(saved):
    for kernel in ("eager", "sdpa"):
        model = load(saved[1], attn_implementation=kernel)
        assert model.config._attn_implementation == model.config.base_config._attn_implementation == kernel
        assert {block.self_attn.config._attn_implementation for block in model.model.layers} == {kernel}
