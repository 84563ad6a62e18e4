"""What `moect export` does beside the whole model: chat models, adapters, the hub; and what it refuses."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from export_helpers import export_run, extended
from safetensors.torch import load_file, save_file
from small_runs import Place
from small_runs import tensors as kept
from test_embeddings_train import tied_base
from tiny import logits, tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import moect
from moect.cli import main
from moect.config import load_config
from moect.errors import ExportError
from moect.export import push as pushing
from moect.export.adapter import load, write_adapter
from moect.export.instruct import add_instruct_delta
from moect.export.source import open_run
from moect.export.trained import of_model, of_run
from moect.model import base_only
from moect.train.loop import train

NATIVE = {"fusion": "add", "router": "sigmoid", "balance": "bias"}


def told(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = main([str(a) for a in arguments]) or 0
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def trained_once(inputs, tmp_path_factory):
    return train(Place(inputs, tmp_path_factory.mktemp("native")).config(moe=NATIVE, train={"steps": 3}))


@pytest.fixture
def native(trained_once, tmp_path):
    """A run that can be exported as glm4_moe."""
    return shutil.copytree(trained_once, tmp_path / "native")


@pytest.fixture
def chat(place):
    """A chat model made from the base: its weights moved a little, a chat template, an end of its own."""
    folder = place.output / "chat"
    model = AutoModelForCausalLM.from_pretrained(place.inputs / "base", dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(place.inputs / "base")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("moe", "copies"), [(NATIVE, False), ({"fusion": "gate"}, True)], ids=["silent", "copies"])
def test_chat_model_s_difference_is_added_to_what_was_frozen_and_to_each_copy(place, chat, moe, copies):
    run = train(place.config(moe=moe, train={"steps": 3}))
    plain, extended_chat = export_run(run), export_run(run, output=place.output / "out", instruct=str(chat))
    base, instruct = (load_file(folder / "model.safetensors") for folder in (place.inputs / "base", chat))
    got, trained = {}, kept(run, 3, "module")
    assert (json.loads((extended_chat / "config.json").read_text())["model_type"] == "glm4_moe") == (not copies)
    got = open_run(run).trained
    got = add_instruct_delta(got, AutoTokenizer.from_pretrained(place.inputs / "base"), str(chat)).trained
    for name, tensor in instruct.items():
        assert torch.equal(got[name], tensor), name
    start = "model.layers.1"
    expert = trained[f"module:{start}.moe.experts.down_proj"]
    name = f"{start}.mlp.down_proj.weight"
    wanted = expert + (instruct[name] - base[name]) if copies else expert
    assert torch.equal(got[f"{start}.moe.experts.down_proj"], wanted)
    halves = [instruct[n] - base[n] for n in (f"{start}.mlp.gate_proj.weight", f"{start}.mlp.up_proj.weight")]
    expert = trained[f"module:{start}.moe.experts.gate_up_proj"]
    assert torch.equal(got[f"{start}.moe.experts.gate_up_proj"], expert + torch.cat(halves) if copies else expert)
    tokenizer = AutoTokenizer.from_pretrained(extended_chat)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False) == "<user>one"
    assert json.loads((extended_chat / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    card = (extended_chat / "README.md").read_text()
    assert "The difference between `chat` and the base was added" in card and plain.is_dir()


def test_other_models_are_no_chat_models_of_the_base(place, chat, tmp_path, capsys, native):
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(chat).save_pretrained(tmp_path / "other")
    code, _, err = told(capsys, "export", native, "--instruct-delta", tmp_path / "other")
    assert code == 2 and "is not made from this base: " in err
    assert sum("moect: error" in line for line in err.splitlines()) == 1 and "Traceback" not in err
    code, _, err = told(capsys, "export", native, "--instruct-delta", tmp_path / "nothing")
    assert code == 2 and "--instruct-delta" in err and "cannot be loaded" in err
    tensors = load_file(chat / "model.safetensors")
    (chat / "model.safetensors").unlink()
    torch.save(tensors, chat / "pytorch_model.bin")
    code, _, err = told(capsys, "export", native, "--instruct-delta", chat)
    assert code == 2 and "has pickled weights only, which could run code; --pickle reads them" in err
    code, out, err = told(capsys, "export", native, "--instruct-delta", chat, "--pickle")
    assert code == 0 and "wrote" in out
    full = train(place.config("full", method="full", train={"steps": 3}))
    code, _, err = told(capsys, "export", full, "--instruct-delta", chat)
    assert code == 2 and "it serves runs of method moe-ct" in err


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_and_base_joined_are_the_trained_model(place, tied, tmp_path, capsys):
    model = {"base": tied_base(place)} if tied else {}
    sections = {"moe": {"fusion": "add", "language_gate": True}, "model": {**model, "train_embeddings": "unseen"}}
    run = train(place.config(**sections, train={"steps": 3}))
    code, out, _ = told(capsys, "export", run, "--adapter")
    assert code == 0 and out.endswith(f"wrote {run / 'adapter'}\n")
    assert sorted(p.name for p in (run / "adapter").iterdir())[:3] == [
        "README.md",
        "adapter.json",
        "adapter.safetensors",
    ]
    base = tied_base(place) if tied else place.inputs / "base"
    joined = moect.load(base, run / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(export_run(run))
    for mine in (joined, whole):
        for module in mine.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
    assert torch.equal(logits(joined, tokens()), logits(whole, tokens()))
    with base_only(joined):
        plain = AutoModelForCausalLM.from_pretrained(base)
        assert torch.equal(logits(joined, tokens()), logits(plain, tokens()))
    assert AutoTokenizer.from_pretrained(run / "adapter").get_vocab()
    assert (run / "adapter" / "adapter.safetensors").stat().st_size < (
        run / "export" / "model.safetensors"
    ).stat().st_size


def test_low_rank_adapter_is_what_peft_reads(place):
    from peft import PeftModel

    run = train(place.config(method="lora", train={"steps": 3}))
    write_adapter(open_run(run), run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(place.inputs / "base", dtype=torch.float32)
    joined = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()
    whole = AutoModelForCausalLM.from_pretrained(export_run(run))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, joined.state_dict()[name]), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter.json").unlink(), "no adapter there"),
        (lambda f: (f / "adapter.json").write_text("{"), "adapter.json is damaged"),
        (lambda f: (f / "adapter.json").write_text('{"format": 9}'), "is of format 9, this version reads 1"),
        (lambda f: (f / "adapter.json").write_text('{"format": 1}'), "has no `base`"),
        (lambda f: (f / "adapter.safetensors").write_bytes(b"x" * 99), "adapter.safetensors cannot be read"),
        (lambda f: save_file({"a": torch.zeros(1)}, f / "adapter.safetensors"), "does not fit adapter.json: "),
    ],
)
def test_damaged_adapter_is_refused(place, damage, message, native):
    write_adapter(open_run(native), native / "adapter")
    damage(native / "adapter")
    with pytest.raises(ExportError, match=message):
        load(place.inputs / "base", native / "adapter")


def test_adapter_of_another_base_is_refused(place, chat, native):
    write_adapter(open_run(native), native / "adapter")
    with pytest.raises(ExportError, match="of another base than .*chat: base; give that one"):
        load(chat, native / "adapter")
    assert load(chat, native / "adapter", check=False).moe_config.fusion == "add"
    with pytest.raises(ExportError, match="method full trains the whole model"):
        full = train(place.config("full", method="full", train={"steps": 3}))
        write_adapter(open_run(full), full / "adapter")


def test_trained_run_is_exported_as_the_stock_class_that_its_plan_named(place, capsys):
    config = place.config(moe={**NATIVE, "width": 24}, train={"steps": 4, "precision": "bf16"})
    path = place.write(config)
    code, out, _ = told(capsys, "plan", "--config", path)
    line = next(line for line in out.splitlines() if line.startswith("export"))
    assert code == 0 and line.split(maxsplit=1)[1].startswith("as glm4_moe: to rounding; ")  # padded
    assert "moect: bit for bit" in out and "not qwen2_moe, granitemoeshared: its router" in out
    run = train(config)
    capsys.readouterr()
    code, out, _ = told(capsys, "export", run)
    assert code == 0 and out.splitlines()[0] == "target    glm4_moe"
    found = re.fullmatch(
        r"verified  logits in fp32: (.*); (.*) of the routes are the same \(tokens: (.*)\)", out.splitlines()[1]
    )
    assert found and found[2] == "100.00%" and found[3].startswith("en ")
    card = (run / "export" / "README.md").read_text()
    assert "Written in bf16 as the architecture `glm4_moe`" in card and found[1] in card
    assert "vllm serve FOLDER\n" in card and "--disable-shared-experts-fusion" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["moect", "moe-ct"]
    assert AutoModelForCausalLM.from_pretrained(run / "export").config.model_type == "glm4_moe"


def test_a_target_that_the_run_asks_for_in_vain_is_told_by_its_plan(place, capsys):
    path = place.write(place.config(export={"target": "glm4_moe"}))
    code, _, err = told(capsys, "plan", "--config", path)
    assert code == 2 and "export target glm4_moe: " in err and "can be written as moect" in err


def test_logits_are_not_compared_where_nobody_wants_it_and_random_tokens_serve_without_text(place, capsys, native):
    capsys.readouterr()
    code, out, _ = told(capsys, "export", native, "--no-verify")
    assert code == 0 and "verified  no (--no-verify), its files only" in out
    assert "Logits were not compared" in (native / "export" / "README.md").read_text()
    values = yaml.safe_load((native / "config.yaml").read_text())
    values["data"]["evaluation"] = []
    (native / "config.yaml").write_text(yaml.safe_dump(values))
    code, out, _ = told(capsys, "export", native, "--output", place.output / "out")
    assert code == 0 and "(tokens: random tokens 256)" in out


class Hub:
    """In the place of the hub's client: what it was told."""

    endpoint = "https://hub"

    def __init__(self):
        self.calls = Hub.calls

    def create_repo(self, name, **options):
        self.calls.append((name, options))

    def upload_folder(self, repo_id, folder_path, **options):
        self.calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))


def test_export_is_pushed_as_it_lies_there(place, monkeypatch, capsys, native):
    Hub.calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    capsys.readouterr()
    code, out, _ = told(capsys, "export", native, "--push", "lab/model")
    assert code == 0 and out.splitlines()[-1] == "pushed to https://hub/lab/model"
    assert Hub.calls[0] == ("lab/model", {"private": True, "exist_ok": True})
    assert Hub.calls[1] == ("lab/model", sorted(p.name for p in (native / "export").iterdir()))
    pushing.push(native / "export", "lab/open", public=True)
    assert Hub.calls[2] == ("lab/open", {"private": False, "exist_ok": True})


def test_hub_that_cannot_be_reached_leaves_the_export_and_says_how_to_go_on(place, monkeypatch, capsys, native):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    capsys.readouterr()
    code, out, err = told(capsys, "export", native, "--push", "lab/model")
    assert code == 2 and (native / "export" / "config.json").is_file() and "wrote" in out
    assert err.splitlines()[-1].endswith(f"send it with: hf upload lab/model {native / 'export'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "model"], "--push model: is no name of a repository; give ORGANISATION/NAME"),
        (["--public"], "--public says nothing without --push"),
        (["--pickle"], "--pickle says nothing without --instruct-delta"),
        (["--adapter", "--target", "moect"], "--adapter: --target say nothing for it"),
        (["--target", "llama"], "export target llama: there is no such target; this model can be written as glm4_moe"),
        (["--target", "qwen2_moe"], "export target qwen2_moe: its router is a softmax"),
        (["--shard-size", "0"], "--shard-size"),
    ],
)
def test_options_that_say_nothing_or_cannot_be_are_refused_in_a_line(place, options, message, capsys, native):
    capsys.readouterr()
    code, _, err = told(capsys, "export", native, *options)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (native / "export").exists()


def test_base_with_other_tensors_beside_is_exported_and_says_so(place, tmp_path, caplog):
    """Old conversions hold buffers, and a tied base may hold its head too."""
    folder = tied_base(place)
    tensors = load_file(f"{folder}/model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    save_file({**tensors, **extra}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    run = train(place.config(model={"base": folder}, moe=NATIVE, train={"steps": 3}))
    reloaded = AutoModelForCausalLM.from_pretrained(export_run(run))
    assert "1 tensors are none of the model's, first model.layers.0.self_attn.rotary_emb.inv_freq" in caplog.text
    assert torch.equal(reloaded.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_model_in_half_precision_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"the model is in torch\.float16: export it in float32 or bfloat16"):
        of_model(extended("llama").half())


def test_the_weights_that_transformers_takes_are_those_exported(place):
    """A single file wins over an index beside it: what an older save has left."""
    folder = tied_base(place)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data += 1
    model.save_pretrained(place.output / "sharded", max_shard_size="20KB")
    for path in (place.output / "sharded").glob("model*"):
        shutil.copy(path, folder)
    assert (Path(folder) / "model.safetensors").exists() and (Path(folder) / "model.safetensors.index.json").exists()
    run = train(place.config(model={"base": folder}, moe=NATIVE, train={"steps": 3}))
    exported = AutoModelForCausalLM.from_pretrained(export_run(run))
    assert torch.equal(exported.model.norm.weight, AutoModelForCausalLM.from_pretrained(folder).model.norm.weight)


@pytest.mark.parametrize("moe", [NATIVE, {"fusion": "gate"}], ids=["stock", "ours"])
def test_added_tokens_whose_rows_did_not_train_are_the_means_of_their_pieces(place, moe):
    run = train(place.config(model={"extend_tokenizer": 12}, moe=moe, train={"steps": 3}))
    folder = export_run(run)
    config, trained = load_config(run / "config.yaml"), open_run(run).trained
    live = open_run(run).live()
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = tokens(vocab=config_vocabulary(trained))
    assert (logits(exported, ids) - logits(live, ids)).abs().max() < 1e-4
    assert config.model.extend_tokenizer == 12


def config_vocabulary(trained) -> int:
    return trained.subject.base.vocab_size + trained.subject.rows["added_tokens"]


@pytest.mark.parametrize("damage", ["unprefixed", "no embedding"])
def test_base_with_other_names_is_refused_in_a_line(place, damage, capsys):
    folder = tied_base(place)
    run = train(place.config(model={"base": folder}, moe=NATIVE, train={"steps": 3}))
    tensors = load_file(f"{folder}/model.safetensors")
    if damage == "unprefixed":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    else:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    info = json.loads((run / "checkpoints" / "step-3" / "checkpoint.json").read_text())
    assert info["base_fingerprint"]
    code, _, err = told(capsys, "export", run)
    assert code == 2 and "trained on another base" in err  # said first: its files changed
    with pytest.raises(ExportError, match="has no tensor named model.*; load the base with transformers and save it"):
        of_run(load_config(run / "config.yaml"), run / "checkpoints" / "step-3", "fp32")


def test_unrelated_model_of_the_same_shape_is_no_chat_model(place, chat, native, capsys):
    model = AutoModelForCausalLM.from_pretrained(chat)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(chat)
    code, _, err = told(capsys, "export", native, "--instruct-delta", chat)
    assert code == 2 and "is too far from the base to be made from it" in err


def test_chat_tokenizer_with_tokens_of_its_own_is_the_one_written(place, chat, native):
    tokenizer = AutoTokenizer.from_pretrained(chat)
    vocabulary = load_config(native / "config.yaml") and AutoModelForCausalLM.from_pretrained(chat).config.vocab_size
    if len(tokenizer) < vocabulary:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(chat)
    folder = export_run(native, output=place.output / "out", instruct=str(chat))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(dtype="int8"), "adapter.json is damaged"),
        (lambda v: v.update(moe=None), "adapter.json is damaged"),
        (lambda v: v["moe"].update(fusion="other"), "adapter.json is damaged"),
        (lambda v: v["moe"].update(experts=3), "is not what adapter.json says"),
        (lambda v: v.update(rows={"rows": "many"}), "adapter.json is damaged"),
    ],
)
def test_adapter_that_says_what_it_does_not_hold_is_refused(place, native, change, message):
    write_adapter(open_run(native), native / "adapter")
    values = json.loads((native / "adapter" / "adapter.json").read_text())
    change(values)
    (native / "adapter" / "adapter.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match=message):
        load(place.inputs / "base", native / "adapter")


def test_adapter_whose_tensor_has_another_shape_is_refused_and_not_broadcast(place, native):
    write_adapter(open_run(native), native / "adapter")
    path = native / "adapter" / "adapter.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.moe.router.weight"] = torch.zeros(1, 1)
    save_file(tensors, path)
    with pytest.raises(ExportError, match=r"moe\.router\.weight is not what adapter\.json says"):
        load(place.inputs / "base", native / "adapter")


def test_exported_files_can_be_read_by_others(native):
    folder = export_run(native)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {oct(0o666 & ~current_umask())}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_training_text_that_is_gone_does_not_keep_held_out_text_from_being_compared_on(place, capsys):
    run = train(place.config(moe=NATIVE, train={"steps": 3}))
    (place.inputs / "cy.train.jsonl").rename(place.inputs / "away")
    try:
        capsys.readouterr()
        code, out, _ = told(capsys, "export", run)
    finally:
        (place.inputs / "away").rename(place.inputs / "cy.train.jsonl")
    assert code == 0 and "(tokens: en " in out


TRAINED = {
    "glm4_moe": ("qwen2", NATIVE),
    "qwen2_moe": ("llama", {"fusion": "add"}),
    "granitemoeshared": ("mistral", {"fusion": "add", "width": 24}),
    "mixtral": ("mistral", {"fusion": "routed"}),
    "qwen3_moe": ("qwen3", {"fusion": "routed", "layers": [0, 2]}),
    "moect": ("qwen2", {"fusion": "add", "language_gate": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("target", TRAINED)
def test_each_target_holds_a_trained_model(place, target, precision, capsys):
    """The export's own proof is against the model as training builds it; this one asks the folder once more."""
    family, moe = TRAINED[target]
    folder = place.output / "family"
    shutil.copytree(place.inputs / "base", folder)
    vocabulary = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    window = {"sliding_window": None} if target == "granitemoeshared" else {}
    tiny_model(family, vocab_size=vocabulary, initializer_range=0.2, **window).save_pretrained(folder)
    settings = {"steps": 6, "lr": 0.02, "precision": precision}
    run = train(place.config(model={"base": str(folder)}, moe=moe, train=settings))
    capsys.readouterr()
    code, out, err = told(capsys, "export", run, "--target", target)
    assert code == 0 and f"target    {target}" in out, err
    exported = AutoModelForCausalLM.from_pretrained(
        run / "export", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    live = open_run(run).live()
    assert (logits(exported, tokens()) - logits(live, tokens())).abs().max() < 1e-4
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(base, tokens()) - logits(live, tokens())).abs().max() > 0.01  # it was trained
