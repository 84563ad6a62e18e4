"""Writing shard by shard: one in memory at a time, one after the other on the disk, and never twice."""

import errno
import json
import multiprocessing
import os
import signal

import pytest
import torch
from export_helpers import extended
from safetensors.torch import load_file
from tiny import logits, tokens
from transformers import AutoModelForCausalLM

from moect import locks
from moect.errors import ExportError
from moect.export import shards as writer
from moect.export.folder import Extras, write_folder
from moect.export.proof.comparison import random_text
from moect.export.shards import plan_shards, write_shards
from moect.export.targets.choice import choose
from moect.export.targets.form import Piece
from moect.export.trained import TrainedModel, of_model

NATIVE = {"fusion": "add", "router": "sigmoid", "balance": "bias"}
SMALL = 60_000  # bytes: less than a block of the tiny model


def write(trained, folder, target="glm4_moe", origin=None, **options):
    chosen = choose(target, trained.subject)
    texts = [random_text(96, 16, 0)]
    return write_folder(trained, chosen, folder, texts, Extras(), lambda found: "card", origin, SMALL, **options)


def test_shards_hold_whole_blocks_and_the_index_names_every_tensor(tmp_path):
    model = extended("llama", NATIVE)
    write(of_model(model), tmp_path / "export")
    files = sorted(p.name for p in (tmp_path / "export").glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-00004.safetensors" for n in range(1, 5)]
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    there = {name: file for file in files for name in load_file(tmp_path / "export" / file)}
    assert index["weight_map"] == there
    tensors = [t for file in files for t in load_file(tmp_path / "export" / file).values()]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors)
    for block in range(3):
        assert len({file for name, file in there.items() if f"layers.{block}." in name}) == 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert (logits(reloaded, tokens()) - logits(model, tokens())).abs().max() < 1e-4


def test_one_shard_at_a_time_is_read_and_each_tensor_once(tmp_path):
    """Counted in tensors asked for: those of a shard, once each, before the file of the next one is begun."""
    trained, asked = of_model(extended("llama", NATIVE)), []
    watched = TrainedModel(trained.subject, trained.slots, lambda name: asked.append(name) or trained[name])
    shards = plan_shards(choose("glm4_moe", trained.subject), trained, SMALL)
    seen = []
    save = writer.save_file
    try:
        writer.save_file = lambda tensors, path, metadata: (seen.append(list(asked)), save(tensors, path, metadata))
        write_shards(shards, watched, tmp_path)
    finally:
        writer.save_file = save
    assert len(seen) == len(shards) == 4 and len(asked) == len(set(asked)) == len(trained)
    for number, shard in enumerate(shards):
        wanted = {part for piece in shard.pieces for part in piece.parts}
        before = set(seen[number - 1]) if number else set()
        assert set(seen[number]) - before == wanted


class Killed(BaseException):
    """The end of a process that nothing catches."""


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_interrupted_export_goes_on_and_ends_with_the_same_bytes(killed_at, tmp_path, monkeypatch, caplog):
    trained, origin = of_model(extended("qwen3", NATIVE)), {"step": 5}
    write(trained, tmp_path / "whole", origin=origin)
    save, written = writer.save_file, []

    def save_some(tensors, path, metadata):
        if len(written) == killed_at:
            path.write_bytes(b"half")
            raise Killed
        written.append(path)
        save(tensors, path, metadata)

    monkeypatch.setattr(writer, "save_file", save_some)
    with pytest.raises(Killed):
        write(trained, tmp_path / "export", origin=origin)
    assert not (tmp_path / "export").exists()
    again = []
    monkeypatch.setattr(
        writer, "save_file", lambda tensors, path, metadata: again.append(path) or save(tensors, path, metadata)
    )
    caplog.set_level("INFO", "moect.export")
    write(trained, tmp_path / "export", origin=origin)
    assert (
        len(again) == 4 - killed_at and f"goes on with an export that was interrupted, {killed_at} files" in caplog.text
    )
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "export" / path.name).read_bytes() == path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "export"}


def test_export_of_something_else_that_was_interrupted_is_not_gone_on_with(tmp_path, monkeypatch, caplog):
    first, second = (of_model(extended("qwen3", NATIVE, seed=seed)) for seed in (0, 1))
    monkeypatch.setattr("moect.export.folder.verify", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write(first, tmp_path / "export", origin={"step": 5})
    monkeypatch.undo()
    caplog.set_level("INFO", "moect.export")
    write(second, tmp_path / "export", origin={"step": 6})
    assert "of another export that was interrupted; it is written anew" in caplog.text
    written = {}
    for file in (tmp_path / "export").glob("*.safetensors"):
        written |= load_file(file)
    assert torch.equal(
        written["model.layers.1.self_attn.q_proj.weight"], second["model.layers.1.self_attn.q_proj.weight"]
    )


def test_a_shard_damaged_between_two_attempts_is_found(tmp_path, monkeypatch):
    trained = of_model(extended("qwen3", NATIVE))
    monkeypatch.setattr("moect.export.folder.verify", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write(trained, tmp_path / "export", origin={"step": 5})
    monkeypatch.undo()
    path = tmp_path / ".writing-export" / "model-00002-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ExportError, match="is not what the model has"):
        write(trained, tmp_path / "export", origin={"step": 5})
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_folder_do_not_meet(tmp_path):
    with locks.acquire(tmp_path / ".writing-export.lock", 0):
        with pytest.raises(ExportError, match=r"export: process \d+ on .* is writing it"):
            write(of_model(extended("llama", NATIVE)), tmp_path / "export")
    write(of_model(extended("llama", NATIVE)), tmp_path / "export")


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = writer.shutil.disk_usage
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage(path)._replace(free=200_000))
    with pytest.raises(
        ExportError, match=r"the export takes [\d.]+ KiB and 195\.3 KiB are free; free space, or choose"
    ):
        write(of_model(extended("llama", NATIVE)), tmp_path / "export")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_full_disk_keeps_what_is_written_and_says_how_to_go_on(tmp_path, monkeypatch):
    save, trained = writer.save_file, of_model(extended("llama", NATIVE))

    def full(tensors, path, metadata):
        if "00003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(ExportError, match="No space left on device; free space and give the same command"):
        write(trained, tmp_path / "export", origin={"step": 1})
    assert len(list((tmp_path / ".writing-export").glob("*.safetensors"))) == 2
    monkeypatch.undo()
    write(trained, tmp_path / "export", origin={"step": 1})


def _export(folder):
    write(of_model(extended("qwen3", NATIVE)), folder, origin={"step": 5})


def _export_and_die(folder):
    save = writer.save_file

    def save_and_die(tensors, path, metadata):
        save(tensors, path, metadata)
        if "00002" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)

    writer.save_file = save_and_die
    _export(folder)


def test_killed_process_leaves_neither_lock_nor_half_a_folder(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_export_and_die, args=(tmp_path / "export",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "export").exists()
    _export(tmp_path / "export")
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_piece_may_be_made_of_several_tensors_or_of_none():
    trained = of_model(extended("llama", NATIVE))
    pieces = [Piece("none", (), lambda: torch.zeros(2)), Piece("two", ("model.norm.weight",) * 2, torch.add)]
    tensors = writer.Shard("x", pieces).tensors(trained)
    assert torch.equal(tensors["two"], 2 * trained["model.norm.weight"]) and torch.equal(
        tensors["none"], torch.zeros(2)
    )
