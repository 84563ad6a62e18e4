"""After a training the base is proven to be what it was, in memory and on disk; where it is not, the run says so."""

import hashlib
import json
import shutil

import pytest
import torch
from export_helpers import export_run
from safetensors import safe_open
from small_runs import checkpoint, events, launch

from moect.errors import CheckpointError, ExportError, TrainingError
from moect.model import build
from moect.train import loop
from moect.train.checkpoints.reading import read_info, values_digest
from moect.train.loop import train


def proofs(run) -> list[dict]:
    return [line for line in events(run) if line["event"] == "base"]


@pytest.fixture
def own_base(place):
    """A copy of the base that a test may change, as keys of a configuration."""
    return {"base": str(shutil.copytree(place.inputs / "base", place.output / "base"))}


def spoiled_after(monkeypatch, step: int, spoil) -> None:
    """Let `spoil` act on the run once it has taken so many steps."""
    plain = loop.Run.save

    def save_and_spoil(run):
        plain(run)
        if run.step == step:
            spoil(run)

    monkeypatch.setattr(loop.Run, "save", save_and_spoil)


def flip_lowest_bit(tensor: torch.Tensor, at: int) -> None:
    tensor.detach().view(-1).view(torch.uint8)[at] ^= 1


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="moe-ct"),
        pytest.param({"method": "lora"}, id="lora", marks=pytest.mark.slow),
        pytest.param({"method": "block-expansion"}, id="block-expansion", marks=pytest.mark.slow),
        pytest.param({"train": {"precision": "bf16"}}, id="bf16", marks=pytest.mark.slow),
        pytest.param({"train": {"zero_stage": 3}}, id="zero 3", marks=pytest.mark.slow),
    ],
)
def test_at_the_end_every_tensor_of_the_base_is_what_its_files_hold(place, capsys, sections):
    config = place.config(**{"train": {"steps": 3}, **sections})
    config.train.steps = 3
    run = train(config)
    with safe_open(place.inputs / "base" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        sizes = sum(file.get_tensor(name).numel() for name in names)
    width = 2 if config.train.precision == "bf16" else 4
    [proof] = proofs(run)
    assert proof == {
        "event": "base",
        "unchanged": True,
        "tensors": len(names),
        "bytes": width * sizes,
        "files": 1,
        "fingerprint": read_info(checkpoint(run, 3))["base_fingerprint"],
        "step": 3,
    }
    assert "the base is unchanged in memory (" in capsys.readouterr().out
    assert [line["event"] for line in events(run)][-2:] == ["base", "end"]


def test_digest_in_the_checkpoint_is_that_of_the_base_s_files(place):
    run = train(place.config(train={"steps": 3}))
    digests = {}
    with safe_open(place.inputs / "base" / "model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            array = file.get_tensor(name)
            digests[name] = hashlib.sha256(f"torch.float32 {array.shape} ".encode() + array.tobytes()).hexdigest()
    assert read_info(checkpoint(run, 3))["base_memory"] == values_digest(digests)


@pytest.mark.slow
def test_digest_does_not_depend_on_the_zero_stage(place):
    runs = [train(place.config(f"zero-{n}", train={"steps": 3, "zero_stage": n})) for n in (0, 2, 3)]
    assert len({read_info(checkpoint(run, 3))["base_memory"] for run in runs}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_digest_does_not_depend_on_the_ranks(place, stage):
    alone = train(place.config("alone", train={"steps": 3}))
    config = place.config("two", train={"steps": 3, "zero_stage": stage})
    launch(place.write(config), 2)
    digests = [read_info(checkpoint(run, 3))["base_memory"] for run in (alone, config.folder)]
    assert digests[0] == digests[1] is not None
    assert [proof["unchanged"] for proof in proofs(config.folder)] == [True]


@pytest.mark.slow
def test_training_in_full_has_no_frozen_tensor_and_its_files_are_proven(place, capsys):
    run = train(place.config(method="full", train={"steps": 3}))
    [proof] = proofs(run)
    assert (proof["tensors"], proof["bytes"], proof["files"]) == (0, 0, 1)
    assert "the base is unchanged on disk" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_bit_of_the_base_that_changed_in_memory_ends_the_run_and_names_the_tensor(place, monkeypatch, stage):
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(run):
        parameter = run.objective.model.get_parameter(name)
        flip_lowest_bit(parameter.ds_tensor if stage == 3 else parameter.data, 77)

    spoiled_after(monkeypatch, 3, spoil)
    with pytest.raises(TrainingError, match=rf"{name} of the frozen base \(1 of \d+ tensors\) has changed in memory"):
        train(place.config(train={"zero_stage": stage}))
    assert proofs(place.output / "run") == []
    assert "end" not in [line["event"] for line in events(place.output / "run")]


def test_base_that_was_replaced_on_disk_is_told_with_the_file_and_export_refuses(place, monkeypatch, own_base):
    path = place.output / "base" / "model.safetensors"
    content = path.read_bytes()
    other = place.output / "other"
    other.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    spoiled_after(monkeypatch, 3, lambda run: other.replace(path))
    with pytest.raises(TrainingError, match=r"has changed on disk .* \(model.safetensors\); put the files back"):
        train(place.config(model=own_base, train={"steps": 3}))
    with pytest.raises(ExportError, match="trained on another base"):
        export_run(place.output / "run")
    with pytest.raises(CheckpointError, match="made with another base"):
        train(place.config(model=own_base, resume="auto", train={"steps": 3}))
    path.write_bytes(content)
    assert export_run(place.output / "run").is_dir()


@pytest.mark.slow
def test_base_that_was_written_to_in_place_changes_in_memory_too_and_that_is_told(place, monkeypatch, own_base):
    """On a CPU, tensors that need no other dtype are the file itself, mapped into memory."""
    path = place.output / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    spoiled_after(monkeypatch, 3, lambda run: path.write_bytes(content))
    with pytest.raises(TrainingError, match=r"changed in memory .* so has the file .*\(model.safetensors\)$"):
        train(place.config(model=own_base, train={"steps": 3}))


@pytest.mark.slow
def test_base_whose_config_changed_or_that_is_gone_is_told(place, monkeypatch, own_base):
    path = place.output / "base" / "config.json"
    values = json.loads(path.read_text())

    def spoil(run):
        path.write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))

    spoiled_after(monkeypatch, 3, spoil)
    with pytest.raises(TrainingError, match=r"has changed on disk since the run started \(config.json\)"):
        train(place.config(model=own_base, train={"steps": 3}))
    path.write_text(json.dumps(values))
    spoiled_after(monkeypatch, 3, lambda run: shutil.rmtree(place.output / "base"))
    with pytest.raises(TrainingError, match="cannot be read any more .* put the files back"):
        train(place.config("again", model=own_base, train={"steps": 3}))


@pytest.mark.slow
def test_base_that_is_read_otherwise_than_when_the_run_began_is_refused_at_resume(place, monkeypatch):
    """The files are the same, as where another version of a library makes other tensors of them."""
    train(place.config(train={"stop_after": 3}))
    plain = build.load_base

    def load_otherwise(config, dtype, seed=0, meta=False, zero3=None):
        model = plain(config, dtype, seed, meta, zero3)
        if not meta:
            model.model.norm.weight.data = model.model.norm.weight.data + 1e-6
        return model

    monkeypatch.setattr(build, "load_base", load_otherwise)
    with pytest.raises(CheckpointError, match="files are those that it was trained with, but its tensors in memory"):
        train(place.config(resume="auto"))


@pytest.mark.slow
def test_resume_in_another_precision_does_not_compare_the_tensors_in_memory(place):
    train(place.config(train={"stop_after": 3}))
    run = train(place.config(resume="auto", train={"precision": "bf16"}))
    assert [proof["step"] for proof in proofs(run)] == [3, 6]
