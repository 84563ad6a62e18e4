"""Runs with rows that train: what moved and what did not, resume, ranks and stages, the monitor, the export."""

import json
import shutil

import pytest
import torch
from export_helpers import export_run
from plain_loop import train_plainly
from safetensors.torch import load_file
from small_runs import VOCABULARY, assert_same_bits, checkpoint, events, figures, launch, losses, tensors
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moect.data.vocabulary.extended_tokenizer import extension_of
from moect.data.vocabulary.tokenizer import (
    find_tokenizer,
    keep_tokenizer,
    kept_tokenizer,
    load_tokenizer,
    run_tokenizer,
)
from moect.errors import CheckpointError, ConfigError
from moect.export.proof.assembled import assemble
from moect.export.source import open_run
from moect.monitor.rows import read_rows
from moect.train.checkpoints.reading import read_info
from moect.train.checkpoints.writing import save_checkpoint
from moect.train.loop import train
from moect.train.token_rows import planned_rows

GATE = {"moe": {"fusion": "add", "experts": 4, "top_k": 2, "language_gate": True}, "loss": {"gate": 1.0}}
UNSEEN = {"model": {"train_embeddings": "unseen"}}
EMBEDDING, HEAD = "module:model.embed_tokens.rows", "module:lm_head.rows"


def counted_by_hand(place) -> list[int]:
    """Tokens of the new language's text that the old one's does not have."""
    tokenizer = AutoTokenizer.from_pretrained(place.inputs / "base")
    found = {}
    for lang in ("en", "cy"):
        lines = (place.inputs / f"{lang}.train.jsonl").read_text().splitlines()
        found[lang] = {i for line in lines for i in tokenizer(json.loads(line)["text"])["input_ids"]}
    return sorted(found["cy"] - found["en"])


def tied_base(place) -> str:
    folder = place.output / "tied"
    if not folder.exists():
        shutil.copytree(place.inputs / "base", folder)
        tiny_model("llama", vocab_size=VOCABULARY, initializer_range=0.2, tie_word_embeddings=True).save_pretrained(
            folder
        )
    return str(folder)


def test_only_rows_of_unseen_tokens_move_resume_is_exact_and_the_export_holds_the_base(place, capsys):
    whole = train(place.config("whole", **UNSEEN, **GATE))
    out = capsys.readouterr().out
    chosen = counted_by_hand(place)
    assert 5 < len(chosen) < VOCABULARY / 2
    assert f"{len(chosen)} of {VOCABULARY} tokens have rows of their own, which train" in out
    assert events(whole)[0]["plan"]["embeddings"]["rows"] == len(chosen)
    kept = tensors(whole, 6, "module")
    for name in (EMBEDDING, HEAD):
        assert kept[f"{name}.ids"].tolist() == chosen and kept[f"{name}.delta"].shape == (len(chosen), 32)
        assert (kept[f"{name}.delta"].abs().amax(1) > 1e-4).all(), "each of them moved"

    train(place.config("run", **UNSEEN, **GATE, train={"stop_after": 3}))
    run = train(place.config("run", **UNSEEN, **GATE, resume="auto"))
    assert losses(run) == losses(whole)
    assert_same_bits(run, whole, 6)

    written = load_file(export_run(run) / "model.safetensors")
    for name, tensor in load_file(place.inputs / "base" / "model.safetensors").items():
        assert torch.equal(written[name], tensor), name
    trained = open_run(run, "step-6", "fp32").trained
    model = assemble(trained.subject, trained)
    ids = torch.tensor([chosen[:8], range(10, 18)])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(run / "export")(ids, use_cache=False).logits
        torch.testing.assert_close(loaded, model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_trainer_moves_all_rows_as_a_plain_loop_does(place, tied):
    base = {"base": tied_base(place)} if tied else {}
    settings = {"steps": 4, "schedule": "constant", "weight_decay": 0.1, "clip": 0.05, "micro_batch": 2}
    config = place.config(model={**base, "train_embeddings": "all"}, moe={"fusion": "add"}, train=settings)
    run = train(config)
    steps, trained = train_plainly(config, place.output / "plain")
    assert [figures(run)[s]["loss"] for s in range(1, 5)] == pytest.approx([s["loss"] for s in steps], rel=1e-4)
    module = tensors(run, 4, "module")
    assert {n for n in module if not n.endswith(".ids")} == {f"module:{name}" for name in trained}
    for name, tensor in trained.items():
        assert (module[f"module:{name}"] - tensor).abs().max() < 1e-5, name
    assert module[f"{EMBEDDING}.delta"].shape == (VOCABULARY, 32) and (f"{HEAD}.delta" in module) != tied


@pytest.mark.slow
def test_added_tokens_on_two_ranks_under_zero_3_learn_as_on_one_under_zero_2(place):
    """Divided, tied and with recomputed activations; the second half on the other number of ranks and stage."""
    sections = {**GATE, "model": {"base": tied_base(place), "train_embeddings": "unseen", "extend_tokenizer": 20}}
    divided = {"zero_stage": 3, "micro_batch": 2, "activation_checkpointing": True}
    alone = train(place.config("alone", **sections))
    two = place.config("two", **sections, train=divided)
    launch(place.write(two), 2, "train.stop_after=3")
    run = train(place.config("two", **sections, resume="auto"))
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5) and len(losses(run)) == 6
    mine, theirs = tensors(run, 6, "module"), tensors(alone, 6, "module")
    assert mine.keys() == theirs.keys() and (mine[f"{EMBEDDING}.ids"] >= VOCABULARY).sum() == 20
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_base_is_measured_in_its_own_tokenization_and_the_export_has_the_added_tokens(place, caplog):
    monitor = {"monitor": {"enabled": True}, "train": {"precision": "bf16", "steps": 3}}
    plain = train(place.config("plain", **GATE, **monitor))
    extended = place.config("extended", **GATE, **monitor, model={"extend_tokenizer": 20})
    run = train(extended)
    assert any("rows of added tokens stay the means of their pieces" in m for m in caplog.messages)
    of_base = [
        {(row["lang"], row["base_bits_per_byte"]) for row in map(json.loads, path.read_text().splitlines())}
        for path in (folder / "monitor" / "forgetting.jsonl" for folder in (plain, run))
    ]
    assert of_base[0] == of_base[1] and len(of_base[0]) == 2
    folder = export_run(run)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == VOCABULARY + 20
    ids = tokenizer("un dau tri pedwar pump chwech", return_tensors="pt")["input_ids"]
    assert (ids >= VOCABULARY).any() and ids.shape[1] < len(
        load_tokenizer(extended.model)("un dau tri pedwar pump chwech")["input_ids"]
    )
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_a_run_goes_on_with_the_rows_of_the_run_it_starts_from(place):
    first = train(place.config("first", **UNSEEN, train={"steps": 3}))
    values = place.values()["data"]["train"]
    other = {"train": [values[0], {**values[1], "limit": 3}]}  # too little text to choose the same tokens from
    second = train(place.config("second", model={"train_embeddings": "unseen", "start": str(first)}, data=other))
    assert torch.equal(tensors(first, 3, "module")[f"{HEAD}.ids"], tensors(second, 6, "module")[f"{HEAD}.ids"])


@pytest.mark.parametrize("rows", ["unseen", "all"])
def test_tokens_that_old_text_never_has_open_the_gate_in_run_resume_and_export(place, rows):
    sections = {**GATE, "model": {"train_embeddings": rows}, "monitor": {"enabled": True}}
    whole = train(place.config("whole", **sections))
    ids, opens = (tensors(whole, 6, "module")[f"{EMBEDDING}.{name}"] for name in ("ids", "opens"))
    assert ids[opens.bool()].tolist() == counted_by_hand(place)
    train(place.config("run", **sections, train={"stop_after": 3}))
    resumed = train(place.config("run", **sections, resume="auto"))
    assert_same_bits(resumed, whole, 6)
    assert export_run(whole).is_dir()  # where logits are compared with those of the model in training
    of_new = next(row for row in read_rows(whole / "monitor") if row["lang"] == "cy" and row["step"] == 6)
    assert of_new["open_share"] > 0.3
    off = train(place.config("off", **sections, gate={"telling_tokens": False}, train={"steps": 3}))
    assert not tensors(off, 3, "module")[f"{EMBEDDING}.opens"].any()
    on = {**sections, "model": {**sections["model"], "start": str(off)}}
    with pytest.raises(CheckpointError, match="it has gate.telling_tokens: False and the configuration says True"):
        train(place.config("started", **on, train={"steps": 3}))


def test_a_run_that_starts_from_another_gets_rows_for_what_only_its_own_text_has(place):
    values = place.values()["data"]["train"]
    little = {"train": [values[0], {**values[1], "limit": 3}]}
    first = train(place.config("first", **UNSEEN, train={"steps": 3}, data=little))
    model = {"train_embeddings": "unseen", "start": str(first)}
    second = train(place.config("second", model=model, train={"stop_after": 3}))
    of_first, of_second = tensors(first, 3, "module"), tensors(second, 3, "module")
    had, has = of_first[f"{HEAD}.ids"].tolist(), of_second[f"{HEAD}.ids"].tolist()
    assert set(had) < set(has) and has == counted_by_hand(place)
    began = train(place.config("began", model=model, train={"lr": 1e-30, "eps": 1.0, "steps": 3}))
    rows = tensors(began, 3, "module")[f"{EMBEDDING}.delta"]
    expected = torch.zeros_like(rows)
    expected[[has.index(token) for token in had]] = of_first[f"{EMBEDDING}.delta"]
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)
    moved = (of_second[f"{EMBEDDING}.delta"] - expected).abs().amax(1)
    assert (moved > 1e-4).all(), "the new ones too"


def test_what_goes_on_from_a_checkpoint_has_its_tokenizer_and_a_failed_attempt_s_is_not_kept(place):
    values = place.values()["data"]["train"]
    model = {"extend_tokenizer": 20, "train_embeddings": "unseen"}
    little = {"train": [values[0], {**values[1], "limit": 4}]}
    first = place.config("first", model=model, train={"steps": 3}, resume="auto")
    keep_tokenizer(run_tokenizer(place.config("first", model=model, data=little)), first.folder)  # and then it died
    run = train(first)
    learned = extension_of(run_tokenizer(place.config("any", model=model)))
    assert extension_of(kept_tokenizer(first, run)) == learned
    assert extension_of(run_tokenizer(place.config("any", model=model, data=little))) != learned
    assert export_run(run).is_dir()
    (run / "tokenizer").rename(run / "moved")
    keep_tokenizer(run_tokenizer(place.config("first", model=model, data=little)), run)
    with pytest.raises(CheckpointError, match="made with other tokens added"):
        export_run(run, output=place.output / "wrong")
    shutil.rmtree(run / "tokenizer")
    (run / "moved").rename(run / "tokenizer")

    begun = {**model, "start": str(run)}
    second = place.config("second", model=begun, data=little, train={"stop_after": 3})
    assert extension_of(run_tokenizer(second)) == learned
    train(second)
    shutil.move(run, place.output / "elsewhere")
    again = place.config("second", model={**model, "start": None}, data=little, resume="auto")
    assert extension_of(find_tokenizer(again)) == learned
    assert len(losses(train(again))) == 6


def test_rows_of_other_added_tokens_are_refused_and_a_plan_knows_what_is_in_the_cache(place):
    model = {"extend_tokenizer": 5, "train_embeddings": "unseen"}
    config = place.config(model=model, train={"stop_after": 3})
    cache = place.output / ".cache"
    assert planned_rows(config, None, cache) == {}
    run = train(config)
    tokenizer = kept_tokenizer(config, run)
    kept = tensors(run, 3, "module")[f"{EMBEDDING}.ids"].tolist()
    planned = planned_rows(config, tokenizer, cache)
    assert planned["extension"] == extension_of(tokenizer) and len(planned["extension"].pieces) == 5
    assert sorted({*planned["rows"], *range(VOCABULARY, VOCABULARY + 5)}) == kept
    assert "rows of embedding and head were trained" in (export_run(run) / "README.md").read_text()
    path = checkpoint(run, 3)
    info = read_info(path)
    files = {p.stem: load_file(p) for p in path.glob("*.safetensors")}
    save_checkpoint(run / "checkpoints", info.pop("step"), files, {**info, "extension": "of others"})
    with pytest.raises(CheckpointError, match="made with other tokens added to the base's"):
        train(place.config(model=model, resume="auto"))


def test_unseen_without_old_text_is_refused_before_the_folder_is_made(place):
    data = {"train": [{"path": "cy.train.jsonl", "lang": "cy"}], "replay": None}
    config = place.config(**UNSEEN, data=data)
    with pytest.raises(ConfigError, match="`data.train` has none"):
        train(config)
    assert not config.folder.exists()


VARIANTS = {
    "unseen": {**UNSEEN, **GATE},
    "all": {"model": {"train_embeddings": "all"}},
    "added": {"model": {"train_embeddings": "unseen", "extend_tokenizer": 20}, **GATE},
    "added, frozen": {"model": {"extend_tokenizer": 20}, **GATE},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stage_resumes_exactly_with_rows(place, variant, precision):
    runs = []
    for stage in range(4):
        settings = {"zero_stage": stage, "precision": precision}
        whole = train(place.config(f"whole-{stage}", **VARIANTS[variant], train=settings))
        train(place.config(f"run-{stage}", **VARIANTS[variant], train={**settings, "stop_after": 3}))
        runs.append(train(place.config(f"run-{stage}", **VARIANTS[variant], train=settings, resume="auto")))
        assert losses(runs[-1]) == losses(whole)
        assert_same_bits(runs[-1], whole, 6)
        assert losses(runs[-1]) == pytest.approx(losses(runs[0]), abs=1e-4 if precision == "fp32" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_on_two_ranks_is_exact_with_rows(place, stage, precision):
    settings = {"zero_stage": stage, "precision": precision, "micro_batch": 2}
    whole = place.config("whole", **VARIANTS["added"], train=settings)
    launch(place.write(whole), 2)
    path = place.write(place.config("run", **VARIANTS["added"], train=settings))
    launch(path, 2, "train.stop_after=3")
    launch(path, 2, "resume=auto")
    run = place.output / "run"
    assert losses(run) == losses(whole.folder)
    assert_same_bits(run, whole.folder, 6)
    alone = train(place.config("alone", **VARIANTS["added"], train={**settings, "zero_stage": 2}))
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4 if precision == "fp32" else 0.05)
