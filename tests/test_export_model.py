"""The exported class against the model it was exported from."""

import copy
from dataclasses import asdict

import pytest
import torch
from export_helpers import exported, extended
from test_append import VARIANTS
from tiny import FAMILIES, logits, open_by_half, tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from moect.model import MoeConfig, base_only, modules_of
from moect.model.modeling_moect import MoectConfig, MoectForCausalLM


def reload(folder, **kwargs):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(report.values()), report
    assert isinstance(model, MoectForCausalLM)
    for parameter in model.parameters():
        # weights mapped from a file lie at odd addresses, where matrix products round differently
        parameter.data = parameter.data.clone()
    return model


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """An extended model with a language gate that is open for some tokens only, and its export."""
    model = extended("qwen3", {"fusion": "add", "language_gate": True, "balance": "bias"})
    open_by_half(model, tokens())
    return model, exported(model, tmp_path_factory.mktemp("gated") / "export")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_logits_are_bitwise_those_of_the_trained_model(family, variant, tmp_path):
    tied = list(VARIANTS).index(variant) % 2 == FAMILIES.index(family) % 2
    model = extended(family, VARIANTS[variant], tie_word_embeddings=tied)
    reloaded = reload(exported(model, tmp_path / "export"))
    assert torch.equal(logits(reloaded, tokens()), logits(model, tokens()))
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    with base_only(model):
        base_logits = logits(model, tokens())
    assert not torch.equal(base_logits, logits(model, tokens()))
    with reloaded.base_only():
        assert torch.equal(logits(reloaded, tokens()), base_logits)


@pytest.mark.parametrize("variant", ["gate", "add-sigmoid", "language-gate"])
def test_bf16_weights_are_bitwise_and_the_selection_bias_stays_fp32(variant, tmp_path):
    model = extended("qwen2", VARIANTS[variant], dtype=torch.bfloat16)
    reloaded = reload(exported(model, tmp_path / "export"))
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(logits(reloaded, tokens()), logits(model, tokens()))
    for moe, twin in zip(modules_of(model), modules_of(reloaded), strict=True):
        if moe.router.selection_bias is not None:
            assert twin.router.selection_bias.dtype == torch.float32
            assert torch.equal(twin.router.selection_bias, moe.router.selection_bias)


def test_module_in_some_blocks_only_is_reloaded_there(tmp_path):
    model = extended("llama", {"layers": [2], "fusion": "add"})
    reloaded = reload(exported(model, tmp_path / "export"))
    assert [moe.index for moe in modules_of(reloaded)] == [2]
    assert torch.equal(logits(reloaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"tie_word_embeddings": True, "pad_token_id": None, "eos_token_id": [2, 5]}),
    ],
    ids=str,
)
def test_config_survives_saving_and_loading_exactly(family, changes, tmp_path):
    base = tiny_config(family, **changes)
    moe = asdict(MoeConfig(fusion="add", layers=[0, 2], routed_scale=1.7))
    config = MoectConfig(base_config=base, moe=moe)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoectConfig)
    assert loaded.moe == moe

    def values(config):
        return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}

    assert type(loaded.base_config) is type(base)
    assert values(loaded.base_config) == values(base)
    assert values(loaded) == values(config)
    assert loaded.get_text_config(decoder=True) is loaded  # else engines take it for a model of images and text
    assert loaded.tie_word_embeddings == base.tie_word_embeddings and loaded.vocab_size == base.vocab_size


def test_config_keeps_no_path_of_the_machine_that_trained(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    MoectConfig(base_config=base.config).save_pretrained(tmp_path)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    assert base.config._attn_implementation == "sdpa"  # making the new config left the old one alone


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_the_cache_equals_generation_without(family, tmp_path):
    window = {"sliding_window": 6} if family == "mistral" else {}
    model = extended(family, {"fusion": "gate"}, **window)
    reloaded = reload(exported(model, tmp_path / "export"))
    ids = tokens(3, 9)
    cached = reloaded.generate(ids, max_new_tokens=24, do_sample=False, use_cache=True, eos_token_id=None)
    plain = reloaded.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False, eos_token_id=None)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None))
    assert cached.shape == (3, 33) and all(len(row[9:].unique()) > 4 for row in cached)


def test_generation_with_a_hard_gate_and_left_padding_equals_one_text_at_a_time(gated):
    reloaded = reload(gated[1])
    ids, lengths = tokens(3, 12), (12, 5, 8)
    mask = torch.stack([(torch.arange(12) >= 12 - n).long() for n in lengths])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    batch = reloaded.generate(ids * mask, attention_mask=mask, **options)
    for row, (text, n) in enumerate(zip(ids, lengths, strict=True)):
        alone = reloaded.generate(text[None, -n:], **options)
        assert torch.equal(batch[row, 12:], alone[0, n:])
        plain = reloaded.generate(text[None, -n:], use_cache=False, **options)
        assert torch.equal(alone, plain)


def test_forward_serves_labels_hidden_states_and_logits_to_keep(gated):
    model, folder = gated
    reloaded = reload(folder)
    ids = tokens()
    with torch.no_grad():
        full = reloaded(ids, labels=ids, output_hidden_states=True)
        expected = model(ids, labels=ids, output_hidden_states=True)
        assert torch.equal(full.loss, expected.loss)
        assert len(full.hidden_states) == 4
        for ours, theirs in zip(full.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(ours, theirs)
        last = reloaded(ids, logits_to_keep=1).logits
        assert last.shape == (2, 1, 96) and torch.allclose(last, full.logits[:, -1:], atol=1e-6)
        assert reloaded(ids, logits_to_keep=torch.tensor([0, 3])).logits.shape == (2, 2, 96)
        assert isinstance(reloaded(ids, return_dict=False), tuple)


def test_attention_kernel_is_the_one_asked_for(gated):
    model, folder = gated
    eager = reload(folder, attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    with torch.no_grad():
        outputs = eager(tokens(), output_attentions=True)
    assert len(outputs.attentions) == 3 and outputs.attentions[0] is not None
    assert (outputs.logits - logits(model, tokens())).abs().max() < 1e-4


def test_reloaded_model_trains_its_module_only_and_recomputes_activations(gated):
    gradients = []
    for recompute in (False, True):
        model = reload(gated[1]).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert all(block.gradient_checkpointing for block in model.model.layers)
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and all(".moe." in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], grad) for name, grad in gradients[0].items())


@pytest.mark.parametrize("more", [5, -3])
def test_a_model_with_another_vocabulary_is_saved_and_loaded(more, tmp_path):
    model = reload(exported(extended("qwen3", VARIANTS["counting-gate"]), tmp_path / "export"))
    V, gate = model.config.vocab_size, modules_of(model)[0].language_gate
    before = gate.of_token.clone()
    model.resize_token_embeddings(V + more)
    model.save_pretrained(tmp_path / "again")
    again = reload(tmp_path / "again")
    ids = tokens(2, 9, vocab=V + min(more, 0))
    assert torch.equal(logits(again, ids), logits(model, ids))
    table = modules_of(again)[0].language_gate.of_token
    assert len(table) == V + more and torch.equal(table[:V], before[: V + more]) and not table[V:].any()


def test_model_saved_again_by_transformers_is_the_same_model(gated, tmp_path):
    model, folder = gated
    reload(folder).save_pretrained(tmp_path)
    assert torch.equal(logits(reload(tmp_path), tokens()), logits(model, tokens()))
    assert "auto_map" not in (tmp_path / "config.json").read_text()  # the modelling file was not copied


@pytest.mark.parametrize("variant", ["gate", "add-sigmoid", "language-gate"])
def test_weights_of_a_bare_base_give_a_model_that_computes_the_base(variant, tmp_path):
    base = tiny_model("qwen3", seed=5)
    base.save_pretrained(tmp_path)
    config = MoectConfig(base_config=base.config, moe=asdict(MoeConfig(**VARIANTS[variant])))
    model = MoectForCausalLM.from_pretrained(tmp_path, config=config)
    assert (logits(model, tokens()) - logits(base, tokens())).abs().max() < 1e-5
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_tensors_that_were_loaded_survive_the_filling_in_of_others(tmp_path):
    model = extended("llama", {"fusion": "add", "balance": "bias"})
    folder = exported(model, tmp_path / "export")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.moe.experts.down_proj"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reloaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {lost}
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name == lost else tensors[name]), name


def test_model_made_from_its_config_alone_computes_its_base():
    torch.manual_seed(0)
    model = MoectForCausalLM(MoectConfig(base_config=tiny_config("llama"), moe={"fusion": "add"})).eval()
    changed = logits(model, tokens())
    with model.base_only():
        assert torch.equal(changed, logits(model, tokens()))
    assert changed.isfinite().all() and changed.std() > 0


def test_copying_a_reloaded_model_copies_its_function(gated):
    reloaded = reload(gated[1])
    assert torch.equal(logits(copy.deepcopy(reloaded), tokens()), logits(reloaded, tokens()))
