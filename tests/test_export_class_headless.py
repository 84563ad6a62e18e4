"""The class without a head, used as serving engines use a model of transformers.

What they do is done here: the model is made from its configuration with parameters on the meta device, linear maps and
attention are replaced, tensors filled in by their names, and tokens of several texts come as one row. The head is ours.
"""

import json

import accelerate
import pytest
import torch
from export_helpers import exported, extended
from safetensors.torch import load_file
from test_append import VARIANTS
from test_embeddings import with_rows
from tiny import FAMILIES, logits, tokens
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from moect.errors import UnsupportedModelError
from moect.model import ForwardRecord, modules_of
from moect.model.modeling_moect import MoectModel

LENGTHS = (12, 5, 8)


class TheirLinear(nn.Module):
    """A linear map that is no `nn.Linear`."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def attend(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
    """Tokens of several texts in one row: each sees its own text's earlier ones, within the window."""
    assert attention_mask is None
    text = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(text))
    back = place[:, None] - place
    seen = (text[:, None] == text) & (back >= 0) & (back < (sliding_window or len(text)))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("an-engine", attend)


def served(folder, dtype=torch.float32):
    """The model as an engine makes it, and the checkpoint's tensors that it has no place for."""
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config()._attn_implementation = "an-engine"
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, dtype=dtype)
    assert not any(buffer.is_meta for buffer in model.buffers())
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, TheirLinear(child))
    tensors = {name.removeprefix("model."): t for name, t in load_file(folder / "model.safetensors").items()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.full(parameter.shape, torch.nan, dtype=dtype)))
    there = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in tensors.keys() & there.keys():
            there[name].copy_(tensors[name])
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    return model.eval(), {name: tensors[name] for name in tensors.keys() - there.keys()}


def one_row(model, **kwargs):
    """Hidden states of the texts, (T, D), and nothing kept between calls."""
    texts = [tokens(1, length, seed)[0] for seed, length in enumerate(LENGTHS)]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        return model(
            input_ids=torch.cat(texts)[None],
            inputs_embeds=None,
            use_cache=False,
            position_ids=positions[None],
            return_dict=False,
            **kwargs,
        )[0][0]


@pytest.mark.parametrize("variant", ["gate", "discrete-narrow", "add-sigmoid", "language-gate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_in_one_row_get_the_logits_they_get_alone(family, variant, tmp_path):
    window = {"sliding_window": 6} if family == "mistral" else {}
    folder = exported(extended(family, VARIANTS[variant], **window), tmp_path / "export")
    model, over = served(folder)
    assert isinstance(model, MoectModel) and over.keys() == {"lm_head.weight"}
    whole = AutoModelForCausalLM.from_pretrained(folder).double()
    model.double()  # a row of another length rounds otherwise; so only routers do, which are in fp32
    for moe in (*modules_of(model), *modules_of(whole)):
        moe.experts.backend = "reference"
    alone = [logits(whole, tokens(1, length, seed))[0] for seed, length in enumerate(LENGTHS)]
    for _ in range(2):
        got = one_row(model) @ over["lm_head.weight"].double().T
        assert (got - torch.cat(alone)).abs().max() < 1e-5


def test_the_gate_decides_in_fp32_where_the_engine_computes_in_bf16(tmp_path):
    variant = {**VARIANTS["language-gate"], "balance": "bias"}
    folder = exported(extended("qwen3", variant, dtype=torch.bfloat16), tmp_path / "export")
    model, _ = served(folder, torch.bfloat16)
    record = ForwardRecord()
    assert one_row(model, moect_record=record).dtype == torch.bfloat16
    assert record.gate_logit_T.dtype == torch.float32
    assert modules_of(model)[0].router.selection_bias.dtype == torch.float32
    assert "selection_bias" in model._keep_in_fp32_modules_strict


def test_engines_find_one_text_config_that_answers_for_the_base(tmp_path):
    folder = exported(extended("mistral", {"fusion": "add"}, sliding_window=6), tmp_path / "export")
    config = AutoConfig.from_pretrained(folder)
    assert config.get_text_config() is config
    assert (config.head_dim, config.num_key_value_heads, config.sliding_window) == (8, 2, 6)
    assert not hasattr(config, "num_experts") and not hasattr(config, "num_local_experts")
    config.sliding_window = 4
    assert config.base_config.sliding_window == 4 and "sliding_window" not in vars(config)
    assert json.loads(config.to_json_string())["base_config"]["sliding_window"] == 4
    assert config.base_model_tp_plan["layers.*.self_attn.q_proj"] == "colwise"


def test_a_model_made_twice_has_the_same_classes(tmp_path):
    folder = exported(extended("llama", {"fusion": "add"}), tmp_path / "export")
    first, second = (AutoModel.from_config(AutoConfig.from_pretrained(folder)) for _ in range(2))
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]
    assert first.get_decoder() is first and type(first) is not MoectModel
    assert first.tp_plan and first.supports_pp_plan


def test_a_pipeline_is_refused_with_a_language_gate_and_served_without(tmp_path):
    for variant in ("gate", "language-gate"):
        folder = exported(extended("llama", VARIANTS[variant]), tmp_path / variant)
        model, _ = served(folder)
        model.layers[0] = Elsewhere()  # as on every stage but the first
        if variant == "gate":
            assert one_row(model).isfinite().all()
        else:
            with pytest.raises(UnsupportedModelError, match="stages of a pipeline"):
                one_row(model)


class Elsewhere(nn.Module):
    """In the place of a block that another stage has."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_are_refused_where_an_engine_puts_its_own_head_on_top(tied, tmp_path):
    folder = exported(with_rows(tied, gate=True), tmp_path / "export")
    config = AutoConfig.from_pretrained(folder)
    for engine in ("vllm", "sglang"):
        config.get_text_config()._attn_implementation = engine
        with pytest.raises(
            UnsupportedModelError, match=f"6 tokens .* this serving engine \\({engine}\\) cannot add them"
        ):
            AutoModel.from_config(config)


def test_a_gate_that_counts_is_refused_by_an_engine_with_a_cache_of_its_own(tmp_path):
    folder = exported(extended("qwen3", VARIANTS["counting-gate"]), tmp_path / "export")
    config = AutoConfig.from_pretrained(folder)
    for engine in ("vllm", "sglang"):
        config.get_text_config()._attn_implementation = engine
        with pytest.raises(UnsupportedModelError, match=f"serving engine \\({engine}\\) shows it the last one only"):
            AutoModel.from_config(config)


def test_the_class_without_head_is_saved_and_loaded_as_itself(tmp_path):
    folder = exported(extended("qwen2", VARIANTS["language-gate"]), tmp_path / "export")
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again, report = AutoModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with model.base_only(), torch.no_grad():
        base = model(tokens()).last_hidden_state
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with whole.base_only(), torch.no_grad():
        assert torch.equal(base, whole.model(tokens()).last_hidden_state)
