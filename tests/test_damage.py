"""Damage to a checkpoint is always found, whatever was done to whichever file; the one before it is taken, and said.

MOECT_DAMAGE=1000 python -m pytest tests/test_damage.py tests/test_damage_inputs.py      a thousand examples a test
"""

import json
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from damage_cases import damages, examples, fresh_copy, mutated
from hypothesis import assume, given
from hypothesis import strategies as st
from small_runs import Place, checkpoint
from small_runs import tensors as saved_tensors

from moect import distributed
from moect.checkpoints import prunable, table, take_stock
from moect.errors import CheckpointError
from moect.train.checkpoints.reading import (
    INFO,
    Tensors,
    damage,
    find_checkpoint,
    newest_module_digest,
    read_info,
    values_digest,
)
from moect.train.checkpoints.restore import find_origin
from moect.train.checkpoints.writing import begin, commit, write_part
from moect.train.loop import Run, train


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """A run with checkpoints 2, 3 as one rank writes them, and the same in the files of two ranks."""
    place = Place(inputs, tmp_path_factory.mktemp("damage"))
    alone = train(place.config(train={"stop_after": 3, "save_every": 2}))
    two = shutil.copytree(alone, alone.with_name("two"))
    info, kinds = read_info(checkpoint(alone, 3)), {"module": {}, "optimizer": {}, "trainer": {}}
    for name, tensor in saved_tensors(alone, 3).items():
        kinds[name.split(":")[0]][name.split(":")[1]] = tensor
    begin(two / "checkpoints", 3, 1)
    halves = [{k: dict(list(t.items())[rank::2]) for k, t in kinds.items()} for rank in (0, 1)]
    written = [write_part(two / "checkpoints", 3, half, rank, 2) for rank, half in enumerate(halves)]
    commit(two / "checkpoints", info.pop("step"), written, {k: v for k, v in info.items() if k != "files"})
    assert {p.name for p in checkpoint(two, 3).iterdir()} > {
        "module-2-of-2.safetensors",
        "optimizer-1-of-2.safetensors",
    }
    return {1: alone, 2: two}


@pytest.fixture
def scratch():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def only_spaces(path: Path, whole: Path) -> bool:
    """Whether two checkpoints' plain values differ in the spaces and line ends between them only: no damage."""
    text = (path / INFO).read_bytes() if (path / INFO).is_file() else b""
    try:
        return json.loads(text) == json.loads((whole / INFO).read_text(encoding="utf-8"))
    except ValueError:
        return False


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_damage_to_any_file_is_found_and_the_checkpoint_before_it_is_taken(runs, ranks, scratch, caplog):
    files = sorted(path.name for path in checkpoint(runs[ranks], 3).iterdir())
    run = fresh_copy(runs[ranks], scratch / "run")

    @examples(5)
    @given(st.sampled_from(files), damages())
    def check(name, harm):
        path = fresh_copy(checkpoint(runs[ranks], 3), checkpoint(run, 3))
        harm.do(path / name)
        assume(name != INFO or not only_spaces(path, checkpoint(runs[ranks], 3)))
        fault = damage(path)
        assert fault is not None and name in fault and "\n" not in fault, harm
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert find_checkpoint(run) == checkpoint(run, 2)
        assert [f"{path}: {fault}; trying the checkpoint before it"] == caplog.messages
        with pytest.raises(CheckpointError, match="step-3: .*; checkpoints there: step-3, step-2"):
            find_checkpoint(run, "step-3")
        stock = take_stock(run, verify=True)
        assert [bool(k.fault) for k in stock.kept] == [True, False] and fault in table(stock)
        assert checkpoint(run, 2) not in prunable(stock, keep_last=1)

    check()


@pytest.mark.parametrize("ranks", [1, 2])
def test_files_that_changed_places_are_found(runs, ranks, scratch):
    files = sorted(path.name for path in checkpoint(runs[ranks], 3).glob("*.safetensors"))

    @examples(4)
    @given(st.lists(st.sampled_from(files), min_size=2, max_size=2, unique=True), st.sampled_from([2, 3]))
    def check(names, step):
        path = fresh_copy(checkpoint(runs[ranks], 3), scratch / "step-3")
        theirs = checkpoint(runs[1], step) / names[1].split("-")[0].replace(".safetensors", "")
        source = theirs.with_suffix(".safetensors") if step == 2 else path / names[1]
        content = source.read_bytes()
        if content != (path / names[0]).read_bytes():
            (path / names[0]).write_bytes(content)
            assert names[0] in damage(path)

    check()


def test_files_that_nobody_asked_for_do_no_harm(runs, scratch):
    path = fresh_copy(checkpoint(runs[1], 3), scratch / "step-3")
    (path / "module-1-of-9.safetensors").write_bytes(b"no tensors")
    (path / "notes").mkdir()
    (path / ".nfs0001").touch()
    assert damage(path) is None and len(Tensors(path, "module")) > 4


def test_no_odd_name_of_a_folder_is_taken_for_a_checkpoint(runs, scratch):
    run = fresh_copy(runs[1], scratch / "run")
    for name in ("step-", "step-9x", "step--4", "step-09", "step-٣", "step-1e9", ".step-7", "step-²"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-11").touch()
    assert find_checkpoint(run) == checkpoint(run, 3)


def test_contents_that_do_not_fit_their_checksum_s_promise_are_refused(runs, scratch):
    """Damage of the tensor files under checksums made anew: what is read then is never half a file."""

    @examples(10)
    @given(st.sampled_from(["module", "optimizer", "trainer"]), damages("truncate", "zero", "flip", "insert", "empty"))
    def check(kind, harm):
        path = fresh_copy(checkpoint(runs[1], 3), scratch / "step-3")
        harm.do(path / f"{kind}.safetensors")
        try:
            tensors = Tensors(path, kind)
            assert all(tensors[name].shape == tensors.shapes[name] for name in tensors)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)

    check()


def seal(path: Path, values) -> None:
    """Write the plain values of a checkpoint with the checksum that belongs to them."""
    sealed = {**values, "sha256": values_digest({k: v for k, v in values.items() if k != "sha256"})}
    (path / "checkpoint.json").write_text(json.dumps(sealed))


def test_values_that_nobody_can_have_written_are_refused_in_a_line_or_do_no_harm(runs, inputs, scratch):
    """Under a checksum that fits. What is accepted is what a run goes on from: weights and position are the file's."""
    place = Place(inputs, scratch)
    run = fresh_copy(runs[1], scratch / "run")
    shutil.rmtree(checkpoint(run, 2))
    whole, path = read_info(checkpoint(run, 3)), checkpoint(run, 3)
    config = place.config(resume="auto", train={"save_every": 2})
    live = Run(config, *distributed.start())
    position, masters = live.loader.state_dict(), saved_tensors(run, 3, "module")

    def attempt(values):
        fresh_copy(checkpoint(runs[1], 3), path)
        try:
            seal(path, values)
        except (ValueError, TypeError):  # JSON has no such thing
            return
        live.loader.load_state_dict(position)
        newest_module_digest(run)
        table(take_stock(run, verify=True))
        try:
            origin = find_origin(config, live.fingerprint, None, live.loader)
            assert origin.checkpoint == path
            live.origin = origin
            live.base.check_resumed(origin.info, str(path))
            live.go_back(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            return
        assert live.step == read_info(path)["step"] <= config.train.steps
        then = {"skipped": position["skipped"], "segments": live.loader.state_dict()["segments"]} | values["data"]
        assert live.loader.state_dict()["drawn"] == then["drawn"]
        slots = dict(live.objective.model.named_parameters())
        assert all(torch.equal(slots[k.split(":")[1]].data, t) for k, t in masters.items() if k[7:] in slots)

    @examples(10)
    @given(mutated(whole))
    def check(values):
        attempt(values)

    try:
        attempt(whole)
        assert live.step == 3
        for key in whole:
            attempt({k: v for k, v in whole.items() if k != key})
        check()
    finally:
        live.close()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\ufeff{}", '{"format": 2}', "nul", ""]
)
def test_texts_that_are_no_values_are_refused(runs, scratch, text):
    path = fresh_copy(checkpoint(runs[1], 3), scratch / "step-3")
    (path / "checkpoint.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="checkpoint.json is "):
        read_info(path)
