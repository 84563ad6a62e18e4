"""Each target with each family, and what a base or a module can be made of: transformers computes what was trained.

The truth is the model as it trained, in its own classes; transformers' own saving names the tensors.
"""

import json
from typing import get_args, get_type_hints

import pytest
import torch
from export_helpers import extended
from safetensors.torch import load_file
from tiny import FAMILIES, logits, tiny_config, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from moect.config import ExportConfig
from moect.errors import ExportError
from moect.export.folder import export_model
from moect.export.targets.choice import NAMES, TARGETS, answers, choose, describe
from moect.export.targets.form import Subject, power_of_two
from moect.export.trained import of_model
from moect.model import MoeConfig, modules_of
from moect.model.embeddings import append_rows

NATIVE = {"fusion": "add", "router": "sigmoid", "balance": "bias", "routed_scale": 1.7}
SOFTMAX = {"fusion": "add"}
FULL = {"sliding_window": None}  # mistral's default is a window
ROUTED = {"fusion": "routed"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 64, "rope_theta": 5e5},
}

# (family, module, changes of the base) by target: what exists
CASES = {
    "glm4_moe": [
        *((family, NATIVE, FULL if family == "mistral" else {}) for family in FAMILIES),
        ("llama", {**NATIVE, "balance": "loss", "renormalise": False, "top_k": 3}, {"tie_word_embeddings": True}),
        ("qwen2", {**NATIVE, "layers": [1]}, {"tie_word_embeddings": True}),
        ("qwen3", {**NATIVE, "layers": [0, 2]}, {"num_key_value_heads": 1, "rope_parameters": YARN}),
        ("llama", {**NATIVE, "width": 24}, {"rope_parameters": LLAMA3}),  # 64 = 3 x 24 - 8: padded
        ("llama", {**NATIVE, "width": 16}, {"head_dim": 12, "num_key_value_heads": 4}),
        ("mistral", {**NATIVE, "width": 128}, {"sliding_window": 256}),  # as long as the base can see
        ("llama", {"fusion": "add", "router": "sigmoid", "experts": 1, "top_k": 1, "renormalise": False}, {}),
        ("qwen3", {"fusion": "fixed", "router": "sigmoid", "fixed_weight": 0.3, "width": 32}, {}),
        ("llama", {"fusion": "fixed", "router": "sigmoid", "fixed_weight": 0.25}, {}),
    ],
    "qwen2_moe": [
        *((family, SOFTMAX, FULL if family == "mistral" else {}) for family in ("llama", "qwen2", "mistral")),
        ("mistral", {**SOFTMAX, "layers": [2], "width": 24}, {"sliding_window": 6}),
        ("qwen2", SOFTMAX, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("llama", {**SOFTMAX, "renormalise": False, "routed_scale": 1.7, "top_k": 3}, {"tie_word_embeddings": True}),
        ("llama", {"fusion": "fixed", "fixed_weight": 0.3}, {"rope_parameters": LLAMA3}),
        ("qwen2", {"fusion": "fixed", "width": 8}, {"num_key_value_heads": 4}),
    ],
    "granitemoeshared": [
        ("llama", SOFTMAX, {"tie_word_embeddings": True}),
        ("mistral", {**SOFTMAX, "layers": [0, 1], "width": 24, "routed_scale": 0.5}, FULL),
        ("llama", {"fusion": "fixed", "fixed_weight": 0.5}, {"rope_parameters": YARN}),
    ],
    "mixtral": [
        ("llama", ROUTED, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        ("mistral", {**ROUTED, "experts": 3, "top_k": 3}, {"sliding_window": 6}),
        ("llama", {**ROUTED, "experts": 2, "top_k": 1}, {"head_dim": 12, "num_key_value_heads": 4}),
    ],
    "qwen3_moe": [
        ("qwen3", ROUTED, {}),
        ("qwen3", {**ROUTED, "layers": [0, 2], "experts": 5}, {"tie_word_embeddings": True, "attention_bias": True}),
    ],
    "moect": [(family, {"fusion": fusion}, {}) for family in FAMILIES for fusion in ("gate", "routed")],
}
ALL = [(name, *case) for name, cases in CASES.items() for case in cases]


def computing_alike(model):
    """The same kernels on both sides: what is left is the target's own doing."""
    model.set_attn_implementation("eager")
    for moe in modules_of(model):
        moe.experts.backend = "reference"
    return model


def loaded(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager", **options
    )
    assert not any(report.values()), report
    for parameter in model.parameters():  # weights mapped from a file lie anywhere, and products round otherwise
        parameter.data = parameter.data.clone()
    return computing_alike(model)


@pytest.mark.parametrize(("name", "family", "moe", "changes"), ALL, ids=lambda v: v if isinstance(v, str) else None)
def test_exported_model_computes_what_was_trained(name, family, moe, changes, tmp_path):
    model = computing_alike(extended(family, moe, **changes))
    support = answers(of_model(model).subject)[name]
    comparison = export_model(model, tmp_path / "export", name)
    reloaded = loaded(tmp_path / "export")
    assert reloaded.config.model_type == name
    difference = (logits(reloaded, tokens()) - logits(model, tokens())).abs().max().item()
    assert difference <= (0 if support.bitwise else 1e-4)
    assert comparison.agreement == 1.0 and comparison.difference <= comparison.bound
    ids = tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(reloaded.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize(
    ("name", "family", "moe", "changes"),
    [case for case in ALL if case[2].get("fixed_weight", 0.5) in (0.5, 0.25) and "routed_scale" not in case[2]]
    + [("glm4_moe", family, NATIVE, FULL if family == "mistral" else {}) for family in FAMILIES],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_in_bf16_the_weights_are_those_that_trained(name, family, moe, changes, tmp_path):
    """What bf16 computes depends on kernels; in fp32 the same bf16 weights compute the same."""
    model = extended(family, moe, dtype=torch.bfloat16, **changes)
    comparison = export_model(model, tmp_path / "export", name)
    reloaded = loaded(tmp_path / "export")
    assert reloaded.dtype == torch.bfloat16
    model = computing_alike(model.float())
    difference = (logits(reloaded.float(), tokens()) - logits(model, tokens())).abs().max().item()
    assert difference <= (0 if answers(of_model(model).subject)[name].bitwise else 1e-4)
    assert comparison.difference <= comparison.bound


@pytest.mark.parametrize("name", ["glm4_moe", "qwen2_moe", "granitemoeshared", "mixtral", "qwen3_moe"])
def test_tensors_have_the_names_and_shapes_that_transformers_itself_saves(name, tmp_path):
    family, moe, changes = CASES[name][0]
    export_model(extended(family, moe, **changes), tmp_path / "export", name)
    ours = load_file(tmp_path / "export" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["glm4_moe", "qwen2_moe"])
def test_rows_of_tokens_are_added_to_embedding_and_head(name, tied, tmp_path):
    model = extended("qwen2", NATIVE if name == "glm4_moe" else SOFTMAX, tie_word_embeddings=tied)
    append_rows(model, [3, 5, 90], 96, [[4, 5], [7]])
    for parameter_name, parameter in model.named_parameters():
        if ".rows." in parameter_name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    export_model(computing_alike(model), tmp_path / "export", name)
    reloaded = loaded(tmp_path / "export")
    assert reloaded.config.vocab_size == 98 == reloaded.get_input_embeddings().num_embeddings
    ids = tokens(vocab=98)
    assert (logits(reloaded, ids) - logits(model, ids)).abs().max() < 1e-4
    assert not answers(of_model(model).subject)[name].bitwise
    rounded = extended("qwen2", NATIVE if name == "glm4_moe" else SOFTMAX, torch.bfloat16, tie_word_embeddings=tied)
    append_rows(rounded, [3, 5, 90], 96, [[4, 5], [7]])
    assert export_model(rounded, tmp_path / "bf16", name).difference <= 1e-4


REASONS = {
    "glm4_moe": [
        ("llama", {"fusion": "gate", "router": "sigmoid"}, {}, "moe.fusion is `gate`"),
        ("llama", {"fusion": "add", "language_gate": True, "router": "sigmoid"}, {}, "moe.language_gate"),
        ("llama", SOFTMAX, {}, "moe.router is `softmax`"),
        ("llama", NATIVE, {"attention_bias": True}, "no bias on the output projection"),
        ("mistral", NATIVE, {"sliding_window": 64}, "sees 64 tokens only"),
    ],
    "qwen2_moe": [
        ("qwen3", SOFTMAX, {}, "has another form than qwen3's"),
        ("llama", {**SOFTMAX, "balance": "bias"}, {}, "no selection bias"),
        ("llama", SOFTMAX, {"head_dim": 12}, "the width of a head"),
        ("llama", NATIVE, {}, "moe.router is `sigmoid`"),
    ],
    "granitemoeshared": [
        ("qwen2", SOFTMAX, {}, "has another form than qwen2's"),
        ("llama", {**SOFTMAX, "renormalise": False}, {}, "moe.renormalise is false"),
        ("llama", {**SOFTMAX, "balance": "bias"}, {}, "no selection bias"),
        ("mistral", SOFTMAX, {"sliding_window": 64}, "sees 64 tokens only"),
        ("llama", SOFTMAX, {"head_dim": 12}, "the width of a head"),
    ],
    "mixtral": [
        ("llama", SOFTMAX, {}, "moe.fusion is `add`"),
        ("qwen2", ROUTED, {}, "has no biases"),
        ("qwen3", ROUTED, {}, "has another form than qwen3's"),
        ("llama", {**ROUTED, "layers": [1]}, {}, "moe.layers leaves some out"),
        ("llama", {**ROUTED, "balance": "bias"}, {}, "no selection bias"),
    ],
    "qwen3_moe": [
        ("llama", ROUTED, {}, "has another form than llama's"),
        (
            "qwen3",
            ROUTED,
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            "sees 6 tokens only",
        ),
        ("qwen3", {**ROUTED, "balance": "bias"}, {}, "no selection bias"),
    ],
}


@pytest.mark.parametrize(
    ("name", "family", "moe", "changes", "reason"), [(n, *case) for n, cases in REASONS.items() for case in cases]
)
def test_target_that_cannot_hold_the_model_says_why(name, family, moe, changes, reason):
    subject = Subject(tiny_config(family, **changes), MoeConfig(**moe))
    assert reason in answers(subject)[name].reason
    with pytest.raises(ExportError, match=f"export target {name}: .*; this model can be written as .*moect"):
        choose(name, subject)


@pytest.mark.parametrize(("name", "factor"), [("glm4_moe", 0.3), ("qwen2_moe", 0.3), ("granitemoeshared", 0.3)])
def test_weights_that_bf16_would_have_to_round_are_refused_in_bf16_only(name, factor):
    router = "sigmoid" if name == "glm4_moe" else "softmax"
    moe = MoeConfig(fusion="fixed", fixed_weight=factor, router=router)
    assert "--dtype fp32 takes it" in answers(Subject(tiny_config("llama"), moe, "bf16"))[name].reason
    assert answers(Subject(tiny_config("llama"), moe, "fp32"))[name].reason is None


@pytest.mark.parametrize(
    ("family", "moe", "name"),
    [
        ("qwen3", NATIVE, "glm4_moe"),
        ("qwen2", SOFTMAX, "qwen2_moe"),
        ("llama", {**NATIVE, "width": 24}, "glm4_moe"),  # to rounding, as any other stock class
        ("mistral", ROUTED, "mixtral"),
        ("qwen3", ROUTED, "qwen3_moe"),
        ("qwen3", {"fusion": "gate"}, "moect"),
    ],
)
def test_auto_takes_a_stock_class_the_exact_ones_first_and_ours_for_the_rest(family, moe, name):
    assert choose("auto", Subject(tiny_config(family), MoeConfig(**moe), "fp32")).name == name


def test_plan_says_what_each_target_answers():
    lines = describe(Subject(tiny_config("llama"), MoeConfig(**SOFTMAX), "fp32"))
    assert lines[0].startswith("as qwen2_moe: bit for bit; its router computes in the dtype of the weights")
    assert lines[1:3] == ["granitemoeshared: to rounding", "moect: bit for bit"]
    assert lines[3:] == [
        "not glm4_moe: its router is a sigmoid, and moe.router is `softmax`",
        "not mixtral, qwen3_moe: its FFN is one of the routed experts, and moe.fusion is `add`",
    ]
    gated = describe(Subject(tiny_config("llama"), MoeConfig(fusion="add", language_gate=True), "fp32"))
    assert gated[1:] == [
        "not glm4_moe, qwen2_moe, granitemoeshared, mixtral, qwen3_moe: it has no gate that skips the experts "
        "(moe.language_gate)"
    ]


def test_configuration_knows_every_target():
    allowed = set(get_args(get_type_hints(ExportConfig)["target"]))
    assert allowed == {"auto", *NAMES} and len({target.name for target in TARGETS}) == len(TARGETS)


def test_glm4_moe_says_all_of_its_rotary_width_and_its_biases(tmp_path):
    export_model(extended("qwen2", NATIVE), tmp_path / "export", "glm4_moe")
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    assert values["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert values["attention_bias"] is True and values["use_qk_norm"] is False
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert config.first_k_dense_replace == 0 and config.architectures == ["Glm4MoeForCausalLM"]


@pytest.mark.parametrize(("factor", "exact"), [(1.0, True), (0.5, True), (4.0, True), (1.5, False), (0.3, False)])
def test_powers_of_two_are_known(factor, exact):
    assert power_of_two(factor) is exact
