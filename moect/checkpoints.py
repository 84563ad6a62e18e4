"""The checkpoints of a run for a person: what is there, whether it is whole, and what may go."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from moect.config import RunConfig, load_config
from moect.errors import CheckpointError, DataError, TrainingError
from moect.locks import Held
from moect.monitor.rows import read_rows
from moect.monitor.verdict import Verdict, best, verdicts
from moect.tables import aligned, size
from moect.train.checkpoints.reading import INFO, READS, damage, list_checkpoints, read_info, step_of
from moect.train.checkpoints.writing import ASIDE, GONE, WRITING, remove, superseded
from moect.train.run_lock import take_lock

log = logging.getLogger("moect.checkpoint")
SPOILT = ("is damaged", "is missing")  # what no other version, and no other user, can read either


@dataclass
class Kept:
    """A checkpoint that is there.

    Attributes:
        path: its folder.
        saved: when, in seconds since the epoch; None: not known.
        bytes: of its files.
        ranks: that wrote it; None: not known.
        verdict: of the monitor; None: it was not measured, or not like the others.
        fault: what is wrong with it; None: nothing that was looked for.
        marks: what else there is to say.
    """

    path: Path
    saved: float | None
    bytes: int
    ranks: int | None
    verdict: Verdict | None
    fault: str | None
    marks: list[str] = field(default_factory=list)

    @property
    def spoilt(self) -> bool:
        """Whether it is of no use to anybody any more."""
        return self.fault is not None and any(word in self.fault for word in SPOILT)


@dataclass
class Inventory:
    """All that is in a run's folder of checkpoints.

    Attributes:
        folder: the run's.
        kept: newest first.
        left_over: folders of saves and deletions that a kill interrupted.
        verified: whether every file was read.
    """

    folder: Path
    kept: list[Kept]
    left_over: list[Path]
    verified: bool


def take_stock(run_folder: Path, verify: bool = False) -> Inventory:
    """What is there.

    Args:
        run_folder: the run's folder.
        verify: read every file and compare it with its checksum; else the values of each checkpoint only.

    Raises:
        CheckpointError: there is no run, or it has no checkpoints.
        ConfigError: its configuration cannot be read.
    """
    run_folder = Path(run_folder)
    config, folder = _configuration(run_folder), run_folder / "checkpoints"
    by_step, winner_of = _verdicts(run_folder, config)
    kept = [_look(path, by_step, verify) for path in list_checkpoints(folder)]
    left_over = [p for mark in (WRITING, GONE, ASIDE) for p in folder.glob(f"{mark}step-*")]
    # one that was to be replaced, and its place is empty: the only one of its step, which a resume puts back
    left_over = sorted(p for p in left_over if p.name[: len(ASIDE)] != ASIDE or _place_of(p).exists())
    if not kept and not left_over:
        raise CheckpointError(f"{folder}: no checkpoint is there; has the run saved one yet (train.save_every)?")
    sound = [k for k in kept if not k.fault]
    for k in sound[:1]:
        k.marks.append("newest")
    winner = winner_of([step_of(k.path) for k in sound])
    for k in kept:
        if winner and k.path.name == f"step-{winner.step}":
            k.marks.append("best")
        if (every := config.train.keep_every) and step_of(k.path) % every == 0:
            k.marks.append("for good")
    return Inventory(run_folder, kept, left_over, verify)


def table(stock: Inventory) -> str:
    """The checkpoints as a table."""
    heading = ["checkpoint", "saved", "size", "ranks", "retention", "gain", "budget", ""]
    rows = []
    for k in stock.kept:
        v = k.verdict
        rows.append(
            [
                k.path.name,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(k.saved)) if k.saved else "-",
                size(k.bytes),
                str(k.ranks or "-"),
                f"{v.retention:.2%}" if v and v.retention is not None else "-",
                f"{v.gain:+.2%}" if v and v.gain is not None else "-",
                ("within" if v.within else "beyond") if v else "-",
                ", ".join([*k.marks, *([k.fault] if k.fault else [])]),
            ]
        )
    rows += [[p.name, "-", size(_bytes_of(p)), "-", "-", "-", "-", "left over by a kill"] for p in stock.left_over]
    # the last column is words
    width = max(len(row[-1]) for row in rows)
    return aligned(heading, [[*row[:-1], row[-1].ljust(width)] for row in rows])


def check(stock: Inventory) -> None:
    """Whether all checkpoints are whole, as far as was looked.

    Raises:
        CheckpointError: one is not; names all that are not.
    """
    if faulty := [k for k in stock.kept if k.fault]:
        others = f"; not whole either: {', '.join(k.path.name for k in faulty[1:])}" if len(faulty) > 1 else ""
        sound = next((k.path.name for k in stock.kept if not k.fault), None)
        remedy = f"a run goes on from {sound}" if sound else "none is whole: bring one back from another copy"
        raise CheckpointError(f"{faulty[0].path}: {faulty[0].fault}{others}; {remedy}")


def prunable(stock: Inventory, keep_last: int | None = None, keep_every: int | None = None) -> list[Path]:
    """What rotation would delete, by the run's configuration or other numbers; and what is of no use: checkpoints that
    are damaged, and what a kill left. The newest whole one and the best stay; where none is whole, all do.

    Args:
        stock: verified.
        keep_last, keep_every: as in `train`; None: the run's.
    """
    train = load_config(stock.folder / "config.yaml").train
    sound = [k.path for k in stock.kept if not k.fault]
    winner = next((step_of(k.path) for k in stock.kept if "best" in k.marks), None)
    if not sound:
        return []
    last = train.keep_last if keep_last is None else keep_last
    old = superseded(sound, last, winner, train.keep_every if keep_every is None else keep_every)
    return [*old, *(k.path for k in stock.kept if k.spoilt), *stock.left_over]


def show(run_folder: Path, verify: bool) -> None:
    """Print what is there.

    Raises:
        CheckpointError: as `take_stock` and, where all files are read, `check`.
    """
    stock = take_stock(run_folder, verify)
    print(table(stock))
    if verify:
        check(stock)
        print("\nevery file is what its checksum says")


def show_prunable(run_folder: Path, keep_last: int | None, keep_every: int | None, really: bool) -> None:
    """Print what is there and what `prunable` gives of it; delete that, if `really`.

    Raises:
        TrainingError: a training is at work there.
        CheckpointError: as `take_stock`; or something cannot be deleted.
    """
    _configuration(Path(run_folder))
    try:
        lock = take_lock(run_folder) if really else None
    except Held as holder:
        raise TrainingError(
            f"{run_folder}: a training is at work there ({holder}), which deletes by itself what train.keep_last lets "
            "go; prune when it has ended"
        ) from None
    try:
        stock = take_stock(run_folder, verify=True)
        paths = prunable(stock, keep_last, keep_every)
        words = f"{', '.join(path.name for path in paths)}: {size(sum(map(_bytes_of, paths)))}"
        print(f"{table(stock)}\n")
        for path in paths if really else ():
            _delete(path)
    finally:
        if lock:
            lock.close()
    if not paths:
        print("nothing to delete")
    else:
        print(f"deleted {words}" if really else f"would delete {words}; --yes does it")


def _configuration(run_folder: Path) -> RunConfig:
    if not (run_folder / "config.yaml").is_file():
        raise CheckpointError(f"{run_folder}: no run there (no config.yaml); give the folder of a run")
    return load_config(run_folder / "config.yaml")


def _verdicts(run_folder: Path, config: RunConfig):
    """The verdicts by step, and what chooses the best among steps."""
    try:
        rows = read_rows(run_folder / "monitor")
    except DataError as error:
        log.warning("%s; measurements are left out", error)
        rows = []
    return {v.step: v for v in verdicts(rows, config)}, lambda steps: best(rows, config, steps)


def _look(path: Path, by_step: dict[int, Verdict], verify: bool) -> Kept:
    fault, info = None, {}
    try:
        info = read_info(path)
        gone = [name for name in info["files"] if not (path / name).exists()]
        fault = f"{gone[0]} is missing" if gone else None
    except CheckpointError as error:
        fault = str(error).removeprefix(f"{path}: ")
    if verify and fault is None:
        fault = damage(path)
    if fault and _is_of_another_version(path):
        fault = "of another version of moect"
    saved = (path / INFO).stat().st_mtime if (path / INFO).exists() else None
    return Kept(path, saved, _bytes_of(path), info.get("world_size"), by_step.get(step_of(path)), fault)


def _is_of_another_version(path: Path) -> bool:
    """Whether a newer moect wrote it; this one cannot judge it."""
    try:
        values = json.loads((path / INFO).read_text(encoding="utf-8"))
        return isinstance(values["format"], int) and values["format"] > max(READS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _delete(path: Path) -> None:
    try:
        if path.name.startswith("step-"):
            remove(path)
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be deleted: {error.strerror or error}; check permissions") from error


def _place_of(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix(ASIDE))
