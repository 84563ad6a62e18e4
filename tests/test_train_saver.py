"""Checkpoints as they are written: by all ranks, while training goes on, where there is space, whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import threading

import pytest
import torch
from small_runs import assert_same_bits, checkpoint, events, free_port, launch, losses, tensors

from moect.data.batches.loader import Loader
from moect.errors import CheckpointError, ConfigError
from moect.train.checkpoints import saver
from moect.train.checkpoints.reading import Tensors, list_checkpoints, read_info, step_of, values_digest
from moect.train.checkpoints.writing import ASIDE, GONE, WRITING, begin, check_space, commit, remove, write_part
from moect.train.folder import check_shared
from moect.train.loop import train


def steps_of(run) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run / "checkpoints")]


def test_a_run_that_saves_in_the_background_ends_with_the_same_checkpoints(place):
    settings = {"save_every": 2, "steps": 7, "keep_last": 0}
    whole = train(place.config("whole", train=settings, monitor={"enabled": True}))
    run = train(place.config(train={**settings, "async_save": True}, monitor={"enabled": True}))
    assert steps_of(run) == steps_of(whole) == [7, 6, 4, 2]
    for step in (2, 4, 6, 7):
        assert_same_bits(run, whole, step)
        assert read_info(checkpoint(run, step))["data"] == read_info(checkpoint(whole, step))["data"]
    assert [e["step"] for e in events(run) if e["event"] == "checkpoint"] == [2, 4, 6, 7]
    assert losses(run) == losses(whole)


def test_training_goes_on_while_a_checkpoint_is_written_and_one_is_in_flight_at_most(place, monkeypatch):
    taken, written, plain, next_step = [], [], write_part, Loader.next_step
    beyond = {step: threading.Event() for step in (2, 4, 6)}

    def slow(folder, step, *rest):
        assert threading.current_thread() is not threading.main_thread()
        assert [p.name for p in folder.glob(f"{WRITING}*")] == [f"{WRITING}step-{step}"]
        if step < 6:  # the last is waited for
            assert beyond[step].wait(60), "the run has waited for its checkpoint"
        written.append((step, len(taken)))
        return plain(folder, step, *rest)

    def counted(self):
        taken.append(None)
        if len(taken) - 1 in beyond:  # a step after the one that was saved
            beyond[len(taken) - 1].set()
        return next_step(self)

    monkeypatch.setattr(saver, "write_part", slow)
    monkeypatch.setattr(Loader, "next_step", counted)
    run = train(place.config(train={"save_every": 2, "keep_last": 0, "async_save": True}))
    assert steps_of(run) == [6, 4, 2]
    assert [step for step, _ in written] == [2, 4, 6]
    assert all(at > step for step, at in written[:2])


def test_a_write_that_fails_in_the_background_ends_the_run_and_is_no_checkpoint(place, monkeypatch):
    plain = saver.write_part

    def failing(folder, step, *rest):
        if step == 4:
            raise CheckpointError("no space")
        return plain(folder, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_part", failing)
        with pytest.raises(CheckpointError, match="no space"):
            train(place.config(train={"save_every": 2, "async_save": True}))
    run = place.output / "run"
    assert steps_of(run) == [2]
    train(place.config(train={"save_every": 2, "async_save": True}, resume="auto"))
    assert_same_bits(run, train(place.config("whole", train={"save_every": 2})), 6)
    assert not list((run / "checkpoints").glob(".*"))


def test_two_ranks_go_on_from_one_and_each_tensor_is_in_one_file_of_about_the_same_size(place):
    settings = {"micro_batch": 2, "zero_stage": 1}
    path = place.write(place.config(train=settings))
    run = train(place.config(train={**settings, "stop_after": 3}))
    launch(path, 2, "resume=auto")
    folder = checkpoint(run, 6)
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    assert names == [
        *(f"{kind}-{part}-of-2.safetensors" for kind in ("module", "optimizer") for part in (1, 2)),
        "trainer-1-of-2.safetensors",
    ]
    sizes = [(folder / f"optimizer-{part}-of-2.safetensors").stat().st_size for part in (1, 2)]
    assert min(sizes) > 0.8 * max(sizes)
    alone = train(place.config("alone", train=settings))
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    mine, theirs = tensors(run, 6), tensors(alone, 6)  # by name; a tensor in two files would be counted once
    assert mine.keys() == theirs.keys() and {k: t.shape for k, t in mine.items()} == {
        k: t.shape for k, t in theirs.items()
    }
    lazily = Tensors(folder, "module", "optimizer", "trainer")
    assert sum(len(load) for load in _by_file(folder).values()) == len(lazily) == len(mine)
    assert {f"{kind}:{k}" for kind, ks in _by_kind(folder).items() for k in ks} == mine.keys()
    for kind, keys in _by_kind(folder).items():
        assert all(torch.equal(lazily[key], mine[f"{kind}:{key}"]) for key in keys)


def _by_file(folder) -> dict[str, list[str]]:
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = list(file.keys())
    return found


def _by_kind(folder) -> dict[str, list[str]]:
    kinds = {}
    for name, keys in _by_file(folder).items():
        kinds.setdefault(name.split("-")[0].removesuffix(".safetensors"), []).extend(keys)
    return kinds


def test_a_checkpoint_of_the_format_before_is_resumed(place):
    """Format 1: one file of each kind, by name; what one rank writes today but for the number."""
    run = train(place.config(train={"stop_after": 3}))
    path = checkpoint(run, 3) / "checkpoint.json"
    values = json.loads(path.read_text())
    del values["sha256"]
    values["format"] = 1
    path.write_text(json.dumps({**values, "sha256": values_digest(values)}))
    train(place.config(resume="auto"))
    assert_same_bits(run, train(place.config("whole")), 6)


def test_keep_every_keeps_for_good_what_keep_last_would_delete(place):
    run = train(place.config(train={"steps": 9, "save_every": 1, "keep_last": 2, "keep_every": 4}))
    assert steps_of(run) == [9, 8, 4]


def test_a_checkpoint_that_is_deleted_is_gone_at_once_for_whoever_looks(tmp_path, monkeypatch):
    path = tmp_path / "step-3"
    path.mkdir()
    (path / "module.safetensors").touch()
    seen = []
    plain = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, **k: (seen.append(list_checkpoints(tmp_path)), plain(p, **k)))
    remove(path)
    assert seen[-1] == [] and list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_somebody_reads_on_a_network_file_system_may_stay_a_while(tmp_path, monkeypatch):
    """NFS keeps a file that is open, and its folder with it."""
    for name in ("step-3", f"{GONE}step-2", f"{ASIDE}step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.safetensors").touch()
    plain = shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    remove(tmp_path / "step-3")
    assert list_checkpoints(tmp_path) == []
    begin(tmp_path, 3, 0)
    commit(tmp_path, 3, [write_part(tmp_path, 3, {"module": {"a": torch.ones(2)}}, 0, 1)], {})
    begin(tmp_path, 3, 0)
    commit(tmp_path, 3, [write_part(tmp_path, 3, {"module": {"a": torch.ones(2)}}, 0, 1)], {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-3"]
    monkeypatch.setattr(shutil, "rmtree", plain)
    begin(tmp_path, 4, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{WRITING}step-4", "step-3"]


def test_what_a_kill_left_of_writing_and_deleting_is_removed_before_the_next_is_written(tmp_path):
    for name in (f"{WRITING}step-4", f"{GONE}step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.safetensors").touch()
    begin(tmp_path, 6, 0)
    assert [p.name for p in tmp_path.iterdir()] == [f"{WRITING}step-6"]


def test_a_file_that_rank_0_does_not_see_is_no_part_of_a_checkpoint(tmp_path):
    begin(tmp_path, 6, 0)
    mine = write_part(tmp_path, 6, {"module": {"a": torch.ones(2)}}, 0, 2)
    theirs = {"module-2-of-2.safetensors": ("0" * 64, 10)}
    with pytest.raises(
        CheckpointError, match=r"rank 1 has written module-2-of-2\.safetensors, .* that all nodes share"
    ):
        commit(tmp_path, 6, [mine, theirs], {})
    assert list_checkpoints(tmp_path) == []


def test_space_is_looked_for_before_the_first_step_and_before_each_checkpoint(place, monkeypatch):
    usage, free = shutil.disk_usage, [10**6]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free[0]))
    with pytest.raises(CheckpointError, match=r"a checkpoint takes [\d.]+ KiB and 976\.6 KiB are free; free space"):
        train(place.config())
    run = place.output / "run"
    assert "start" not in [e["event"] for e in events(run)]
    plain = Loader.next_step
    free[0] = 10**9

    def filling(self):  # the disk fills while the fifth step is taken
        if self.rows >= 4 * 8:
            free[0] = 10**6
        return plain(self)

    monkeypatch.setattr(Loader, "next_step", filling)
    with pytest.raises(CheckpointError, match="are free"):
        train(place.config(resume="auto"))
    assert steps_of(run) == [3] and free == [10**6]


@pytest.mark.slow
def test_a_disk_that_is_full_in_fact_leaves_the_checkpoint_before_and_the_run_goes_on_when_there_is_space(place):
    """A small file system of its own, filled by what the run is not told of."""
    if os.geteuid() != 0:
        pytest.skip("not root: no file system can be mounted")
    disk = place.output / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path = place.write(place.config(train={"save_every": 3}, output=str(disk)))
        launch(path, 0, "train.stop_after=3")
        with (disk / "filler").open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 300_000))
        for more in ([], ["train.async_save=true"]):
            _, err = launch(path, 0, "resume=auto", *more, code=2)
            told = [line for line in err.splitlines() if "moect: error" in line]
            assert len(told) == 1 and "free" in told[0] and "Traceback" not in err
            assert steps_of(disk / "run") == [3]
        (disk / "filler").unlink()
        launch(path, 0, "resume=auto")
        assert_same_bits(disk / "run", train(place.config("whole")), 6)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_log_that_cannot_be_written_ends_the_run_with_one_line(place):
    """The disk is full long before the next checkpoint."""
    script = place.output / "full.py"
    script.write_text(
        "import sys\n"
        "from moect.train.folder import RunLog\n"
        "plain = RunLog.write\n"
        "def write(self, **values):\n"
        "    if values.get('step') == 2 and self._file.name != '/dev/full':\n"
        "        self._file = open('/dev/full', 'a')\n"
        "    plain(self, **values)\n"
        "RunLog.write = write\n"
        "from moect.cli import process\n"
        "process(['train', *sys.argv[1:]])\n"
    )
    _, err = launch(place.write(place.config()), script=script, code=2)
    told = [line for line in err.splitlines() if "moect: error" in line]
    assert len(told) == 1 and "No space left on device; free space" in told[0] and "Traceback" not in err


def _look(rank: int, port: int, folders, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        check_shared(folders[rank])
        queue.put(None)
    except ConfigError as error:
        queue.put(str(error))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_node_that_does_not_see_the_output_is_named_at_the_start(tmp_path, shared):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    folders = [tmp_path / "a", tmp_path / ("a" if shared else "b")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    processes = torch.multiprocessing.spawn(_look, (free_port(), folders, queue), nprocs=2, join=False)
    told = [queue.get(), queue.get()]
    while not processes.join():
        pass
    if shared:
        assert told == [None, None]
    else:
        assert told[0] != told[1] or "rank 1 on" in told[0]
        assert all("cannot see what rank 0 on" in text and "all nodes share" in text for text in told)
    assert not list(tmp_path.glob("*/.seen-*"))


def test_check_space_counts_what_a_checkpoint_takes(place):
    run = train(place.config(train={"steps": 3}))
    taken = sum(p.stat().st_size for p in checkpoint(run, 3).iterdir())
    from moect import distributed
    from moect.train.loop import Run

    again = Run(place.config(train={"steps": 3}, resume="auto"), *distributed.start())
    size = again.saver.size()
    again.close()
    assert size <= taken <= size + 200_000
    with pytest.raises(CheckpointError):
        check_space(place.output, shutil.disk_usage(place.output).free * 2)
