"""`moect checkpoints`: lists, verifies and prunes; never takes what a run would go on from, nor the best."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from small_runs import Place, checkpoint, copy_run, start

from moect.cli import main
from moect.errors import TrainingError
from moect.train.checkpoints.reading import read_info, values_digest
from moect.train.loop import train
from moect.train.run_lock import lock_of, take_lock


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """A run with checkpoints 2, 4, 6, 8, measured; only read."""
    place = Place(inputs, tmp_path_factory.mktemp("checkpoints"))
    settings = {"steps": 8, "save_every": 2, "keep_last": 0}
    return train(place.config(train=settings, monitor={"enabled": True, "samples": 0, "resamples": 0}))


@pytest.fixture
def run(made, tmp_path):
    """The same, of this test's own."""
    return copy_run(made, str(tmp_path / "run"))


def command(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["checkpoints", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def there(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def best_and_newest(run) -> tuple[str, str]:
    """By hand: the step of greatest gain, whose checkpoint is there, and the greatest step."""
    rows = [json.loads(line) for line in (run / "monitor" / "forgetting.jsonl").read_text().splitlines()]
    gains = {row["step"]: row["gain"] for row in rows if row["role"] == "new" and row["step"] > 0}
    return f"step-{max(gains, key=lambda step: (gains[step], step))}", f"step-{max(gains)}"


def test_table_has_every_checkpoint_newest_first_with_marks_size_and_measurement(run, capsys):
    code, out, _ = command(capsys, run)
    heading, rule, *rows = out.splitlines()
    assert code == 0 and set(rule) == {"-"}
    assert heading.split() == ["checkpoint", "saved", "size", "ranks", "retention", "gain", "budget"]
    assert [row.split()[0] for row in rows] == ["step-8", "step-6", "step-4", "step-2"]
    best, newest = best_and_newest(run)
    assert [row.split()[0] for row in rows if "newest" in row] == [newest]
    assert [row.split()[0] for row in rows if "best" in row] == [best]
    on_disk = sum(path.stat().st_size for path in checkpoint(run, 8).iterdir())
    assert f"{on_disk / 2**20:,.1f} MiB" in rows[0] or f"{on_disk / 2**10:,.1f} KiB" in rows[0]
    assert all("%" in row and "within" in row for row in rows)


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("module.safetensors", flip, "is damaged (its checksum differs)"),
        ("optimizer.safetensors", os.remove, "is missing"),
        ("checkpoint.json", flip, "is damaged"),
    ],
)
def test_verify_names_the_damaged_file_and_ends_with_2(run, capsys, name, spoil, told):
    spoil(checkpoint(run, 6) / name)
    code, out, err = command(capsys, run, "--verify")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{checkpoint(run, 6)}: {name} {told}" in err and "a run goes on from step-8" in err
    assert f"{name} {told}" in next(row for row in out.splitlines() if row.startswith("step-6"))
    assert len(there(run)) == 4


def test_verify_of_whole_checkpoints_says_so(run, capsys):
    code, out, err = command(capsys, run, "--verify")
    assert (code, err) == (0, "") and out.endswith("\nevery file is what its checksum says\n")


def test_prune_shows_and_deletes_only_with_yes(run, capsys):
    keep = {*best_and_newest(run)}
    gone = sorted({"step-2", "step-4", "step-6", "step-8"} - keep)
    code, out, _ = command(capsys, run, "--prune", "--keep-last", 1)
    assert code == 0 and "--yes does it" in out and all(name in out.splitlines()[-1] for name in gone)
    assert len(there(run)) == 4
    code, out, _ = command(capsys, run, "--prune", "--keep-last", 1, "--yes")
    assert code == 0 and out.splitlines()[-1].startswith("deleted ")
    assert there(run) == sorted(keep)


def test_prune_goes_by_the_configuration_of_the_run_and_keeps_what_is_for_good(run, capsys):
    _, out, _ = command(capsys, run, "--prune", "--yes")
    assert out.splitlines()[-1] == "nothing to delete" and len(there(run)) == 4  # keep_last is 0
    command(capsys, run, "--prune", "--keep-last", 1, "--keep-every", 4, "--yes")
    assert there(run) == sorted({"step-4", "step-8", *best_and_newest(run)})


def test_prune_never_takes_the_newest_whole_one_for_a_damaged_newer_one(run, capsys):
    flip(checkpoint(run, 8) / "module.safetensors")
    shutil.rmtree(run / "monitor")  # no best
    left = run / "checkpoints" / ".writing-step-9"
    left.mkdir()
    code, out, _ = command(capsys, run, "--prune", "--keep-last", 1, "--yes")
    assert code == 0 and ".writing-step-9" in out and "left over by a kill" in out
    assert there(run) == ["step-6"]


def test_prune_leaves_the_only_one_of_a_step_that_was_being_replaced(run, capsys):
    newest, aside = checkpoint(run, 8), run / "checkpoints" / ".replaced-step-8"
    newest.rename(aside)  # killed between the two renames
    code, out, _ = command(capsys, run, "--prune", "--keep-last", 1, "--yes")
    assert code == 0 and aside.is_dir() and ".replaced-step-8" not in out


def test_prune_takes_nothing_where_no_checkpoint_is_whole(run, capsys):
    for path in (run / "checkpoints").iterdir():
        flip(path / "module.safetensors")
    code, out, _ = command(capsys, run, "--prune", "--keep-last", 1, "--yes")
    assert code == 0 and "nothing to delete" in out and len(there(run)) == 4


def test_prune_leaves_what_another_version_of_moect_wrote(run, capsys):
    path = checkpoint(run, 8) / "checkpoint.json"
    path.write_text(json.dumps({"format": 99}))
    code, out, _ = command(capsys, run, "--prune", "--keep-last", 1, "--yes")
    assert code == 0 and "of another version of moect" in out and "step-8" in there(run)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_folder_that_is_no_run_or_has_none_is_refused_in_one_line(tmp_path, capsys, content):
    code, _, err = command(capsys, tmp_path)
    assert code == 2 and "no run there" in err
    (tmp_path / "config.yaml").write_text(content)
    code, _, err = command(capsys, tmp_path)
    assert code == 2 and len(err.splitlines()) == 1


def test_prune_is_refused_while_a_training_holds_the_run(run, capsys):
    before = there(run)
    lock = take_lock(run)
    try:
        code, _, err = command(capsys, run, "--prune", "--keep-last", 1, "--yes")
        assert code == 2 and f"{run}: a training is at work there (process {os.getpid()} on " in err
        assert command(capsys, run, "--prune", "--keep-last", 1)[0] == 0  # to look is allowed
        assert there(run) == before
    finally:
        lock.close()


def test_second_training_in_a_folder_waits_for_the_first_and_is_refused_when_it_goes_on_for_too_long(place, caplog):
    config = place.config(resume="auto", train={"steps": 3})
    config.health.timeout_minutes = 1e-4
    lock = take_lock(config.folder)
    try:
        with pytest.raises(TrainingError, match="another training is still at work there .*another name="):
            train(config)
        assert not config.folder.exists()
        assert "waits for it, 0.0001 minutes at most" in caplog.text
    finally:
        lock.close()
    assert train(config).is_dir()


@pytest.mark.slow
def test_second_training_goes_on_where_the_first_was_killed(place):
    """The first is killed while the second waits for it: the lock ends with its process."""
    config = place.config(train={"steps": 5000, "schedule": "constant", "save_every": 2}, resume="auto")
    first = start(place.write(config))
    while not (config.folder / "checkpoints" / "step-2").exists():
        assert first.poll() is None
    second = start(place.write(config), 0, "train.stop_after=1000000")
    for line in second.stderr:
        if "another training is at work there" in line:
            break
    first.kill()
    first.communicate()
    for line in second.stdout:
        if line.startswith("resumed from"):
            break
    else:
        pytest.fail("the second one did not resume")
    second.kill()
    second.communicate()


def test_a_file_system_without_locks_is_told_and_trained_on(place, monkeypatch, caplog):
    def without_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("moect.train.run_lock.acquire", without_locks)
    assert train(place.config(train={"steps": 3})).is_dir()
    assert "run.lock: no lock (Operation not supported); let no second training write to" in caplog.text


def test_the_lock_is_found_by_any_path_to_the_run(place, tmp_path):
    config = place.config()
    link = tmp_path / "elsewhere"
    link.symlink_to(config.folder)
    config.folder.mkdir()
    assert lock_of(link) == lock_of(config.folder) == config.folder.parent.resolve() / ".cache" / "run.lock"


@pytest.mark.slow
def test_listing_does_not_wait_for_deepspeed(run):
    code = (
        "import sys; from moect.checkpoints import show; from pathlib import Path; show(Path(sys.argv[1]), True)\n"
        "assert 'deepspeed' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_values_that_no_checkpoint_can_have_are_damage_whatever_their_checksum(run):
    path = checkpoint(run, 8) / "checkpoint.json"
    info = read_info(path.parent) | {"step": "eight"}
    path.write_text(json.dumps({**info, "sha256": values_digest(info)}))
    with pytest.raises(Exception, match=r"is damaged \(`step` is no int\)"):
        read_info(path.parent)
