"""Interrupted and resumed is uninterrupted; what does not fit together is refused; damage is stepped over."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import Place, assert_same_bits, checkpoint, copy_run, events, figures, losses, tensors
from tiny import tiny_model

from moect.config import load_config
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.errors import CheckpointError
from moect.train.checkpoints.reading import read_info
from moect.train.checkpoints.writing import save_checkpoint
from moect.train.loop import train

LANGUAGE_GATE = {"fusion": "add", "balance": "bias", "language_gate": True, "experts": 3, "router": "sigmoid"}
VARIANTS = {
    "gate and balance loss": {"moe": {"fusion": "gate", "experts": 4, "top_k": 2}},
    "language gate and selection bias": {"moe": LANGUAGE_GATE, "loss": {"bias_rate": 0.01}},
    "counting gate, rows of all tokens": {
        "moe": LANGUAGE_GATE | {"gate_sees": "pairs"},
        "model": {"train_embeddings": "all"},
    },
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "block-expansion": {"method": "block-expansion", "expansion": {"layers": [1]}},
}


def stopped_at_3(place, name="run", **sections):
    """A run of six steps with checkpoints 2 and 3, stopped there, as the configuration that goes on with it."""
    train_section = {"stop_after": 3, "save_every": 2, **sections.pop("train", {})}
    train(place.config(name, **sections, train=train_section))
    train_section["stop_after"] = None
    return place.config(name, **sections, train=train_section, resume="auto")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(place, variant, precision):
    settings = {"precision": precision, "save_every": 2}
    whole = train(place.config("whole", **VARIANTS[variant], train=settings))
    config = stopped_at_3(place, **VARIANTS[variant], train=settings)
    assert losses(config.folder) == losses(whole)[:3]
    resumed = train(config)
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 6
    assert_same_bits(resumed, whole, 6)
    told = [line["event"] for line in events(resumed)]
    before, after = ["start", *["checkpoint"] * 2, "base", "stop"], ["resume", *["checkpoint"] * 2, "base", "end"]
    assert told == before + after


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_resume_is_exact_under_every_zero_stage(place, stage):
    settings = {"zero_stage": stage, "save_every": 2}
    whole = train(place.config("whole", train=settings))
    resumed = train(stopped_at_3(place, train=settings))
    assert losses(resumed) == losses(whole)
    assert_same_bits(resumed, whole, 6)


def test_checkpoint_is_resumed_under_another_zero_stage_and_the_user_is_told(place, capsys):
    whole = train(place.config("whole"))
    config = stopped_at_3(place, train={"zero_stage": 3})
    config.train.zero_stage = 1
    capsys.readouterr()
    resumed = train(config)
    assert "changed: train.zero_stage: 3 -> 1" in capsys.readouterr().out
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)


def test_settings_that_do_not_change_the_training_may_change_and_are_told(place, capsys):
    whole = train(place.config("whole"))
    config = stopped_at_3(place)
    config.moe.dispatch, config.train.log_every = "reference", 3
    capsys.readouterr()
    resumed = train(config)
    changes = ["moe.dispatch: 'auto' -> 'reference'", "train.log_every: 1 -> 3"]
    assert [line["changed"] for line in events(resumed) if line["event"] == "resume"] == [changes]
    out = capsys.readouterr().out
    assert all(f"changed: {change}" in out for change in changes)
    assert sorted(figures(resumed)) == [1, 2, 3, 6]
    assert figures(resumed)[6]["loss"] == pytest.approx(figures(whole)[6]["loss"], abs=1e-4)


def test_the_folder_keeps_the_configuration_from_before_a_changed_resume(place):
    config = stopped_at_3(place)
    train(config)
    assert load_config(config.folder / "config-before-resume-1.yaml").train.stop_after == 3
    assert load_config(config.folder / "config.yaml") == config


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("moe", "experts", 5),
        ("moe", "fusion", "fixed"),
        ("data", "sequence_length", 16),
        ("data", "packing", "best-fit"),
        ("train", "batch_size", 4),
        (None, "seed", 6),
        (None, "method", "full"),
    ],
)
def test_resume_with_another_meaning_is_refused_by_the_key_s_name(place, section, key, value):
    config = stopped_at_3(place)
    before = tensors(config.folder, 3)
    setattr(getattr(config, section) if section else config, key, value)
    with pytest.raises(CheckpointError) as refusal:
        train(config)
    assert f"made with {section + '.' if section else ''}{key}: " in str(refusal.value)
    assert f"the configuration says {value!r}" in str(refusal.value) and "\n" not in str(refusal.value)
    after = tensors(config.folder, 3)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refused_resume_leaves_the_run_s_configuration_as_it_was(place):
    config = stopped_at_3(place)
    before = {path.name: path.read_bytes() for path in config.folder.iterdir() if path.is_file()}
    config.seed = 6
    with pytest.raises(CheckpointError):
        train(config)
    assert {path.name: path.read_bytes() for path in config.folder.iterdir() if path.is_file()} == before


def test_another_base_is_refused_by_its_fingerprint(place):
    config = stopped_at_3(place)
    other = place.output / "other-base"
    tiny_model("qwen3", seed=1, vocab_size=300, initializer_range=0.2).save_pretrained(other)
    load_tokenizer(config.model).save_pretrained(other)
    config.model.base = str(other)
    with pytest.raises(CheckpointError, match=f"made with another base .fingerprint .*{other}.* set model.base"):
        train(config)


def test_the_same_base_elsewhere_is_accepted(place):
    whole = train(place.config("whole"))
    config = stopped_at_3(place)
    config.model.base = str(shutil.copytree(config.model.base, place.output / "moved"))
    assert_same_bits(train(config), whole, 6)


def test_changed_corpus_is_refused(place):
    data = place.values()["data"] | {"root": str(shutil.copytree(place.inputs, place.output / "texts"))}
    config = stopped_at_3(place, data=data)
    with (place.output / "texts" / "cy.train.jsonl").open("a") as file:
        file.write('{"text": "un dau tri"}\n')
    with pytest.raises(CheckpointError, match="the text of `cy.train.jsonl`"):
        train(config)


def test_resume_of_a_run_that_has_no_checkpoint_begins_at_the_start(place):
    whole = train(place.config("whole"))
    config = place.config(resume="auto")
    (config.folder / "checkpoints" / ".writing-step-3").mkdir(parents=True)
    assert_same_bits(train(config), whole, 6)


def test_resume_of_a_finished_run_changes_nothing(place):
    run = train(place.config())
    before = tensors(run, 6)
    train(place.config(resume="auto"))
    after = tensors(run, 6)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(figures(run)) == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def interrupted(inputs, tmp_path_factory):
    """A stopped run with checkpoints 2 and 3, and its uninterrupted twin."""
    place = Place(inputs, tmp_path_factory.mktemp("interrupted"))
    whole = train(place.config("whole", train={"save_every": 2}))
    return stopped_at_3(place), whole


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
@pytest.mark.parametrize(
    "file", ["module.safetensors", "optimizer.safetensors", "trainer.safetensors", "checkpoint.json"]
)
def test_damaged_checkpoint_is_stepped_over_and_the_user_is_told(interrupted, damage, file, caplog):
    config, whole = interrupted
    run = copy_run(config.folder, "damaged")
    try:
        damage(checkpoint(run, 3) / file)
        config = load_config(run / "config.yaml", ["name=damaged", "resume=auto", "train.stop_after=null"])
        train(config)
        assert [line["step"] for line in events(run) if line["event"] == "resume"] == [2]
        assert any("step-3: " in m and file in m and "trying the checkpoint before it" in m for m in caplog.messages)
        assert losses(run) == losses(whole)
        assert_same_bits(run, whole, 6)
    finally:
        shutil.rmtree(run)


def test_run_with_damaged_checkpoints_only_is_refused(interrupted):
    config, _ = interrupted
    run = copy_run(config.folder, "all-damaged")
    for path in (run / "checkpoints").iterdir():
        truncate(path / "module.safetensors")
    config = load_config(run / "config.yaml", ["name=all-damaged", "resume=auto"])
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        train(config)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-3"]


def test_checkpoint_whose_tensors_are_of_another_model_is_refused(interrupted):
    config, _ = interrupted
    run = copy_run(config.folder, "other-tensors")
    stranger = checkpoint(train(load_config(config.folder / "config.yaml", ["name=stranger", "moe.experts=5"])), 3)
    files = {path.stem: load_file(path) for path in stranger.glob("*.safetensors")}
    info = read_info(checkpoint(run, 3))
    save_checkpoint(run / "checkpoints", info.pop("step"), files, info)
    config = load_config(run / "config.yaml", ["name=other-tensors", "resume=auto"])
    with pytest.raises(CheckpointError, match="of another model"):
        train(config)
