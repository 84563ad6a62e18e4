"""What the trainer does when the monitor finds that an old language lost more than it may.

Each action follows from a checkpoint's measurements and the configuration alone, and is taken right after the
measurement. A resumed run judges the measurements of its checkpoint once more and so takes the same action again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from moect import distributed
from moect.config import RunConfig
from moect.data.batches.loader import Loader
from moect.errors import ForgettingError
from moect.monitor.rows import Row
from moect.monitor.verdict import Verdict, judge
from moect.train.checkpoints.best import best_checkpoint
from moect.train.undo import Returned, keep_course

log = logging.getLogger("moect.train")


class Course(Returned, Protocol):
    """What can be done to a run that forgets, and what it is told about itself.

    Attributes:
        config: the run's.
        main: whether this is the rank that speaks.
        loader: has the share of replay.
        rollbacks: times that it was sent back.
    """

    config: RunConfig
    main: bool
    loader: Loader
    rollbacks: int

    def go_back(self, path: Path) -> None:
        """Take weights, optimizer and step from a checkpoint; the text goes on from where it is."""


def act(run: Course, rows: list[Row]) -> None:
    """Judge a checkpoint and do what `monitor.action` says. Every rank calls it with the same rows.

    Raises:
        ForgettingError: the run is to end.
    """
    verdict = judge(rows, run.config)
    there = distributed.on_main(lambda: best_checkpoint(run.folder, run.config))
    run.log.write(
        event="verdict",
        step=verdict.step,
        within=verdict.within,
        excess=[str(e) for e in verdict.excess],
        gain=verdict.gain,
        retention=verdict.retention,
        best=there.step if there else None,
    )
    if verdict.within or verdict.step == 0:  # nothing was trained yet
        return
    why = "; ".join(str(e) for e in verdict.excess)
    action = run.config.monitor.action
    if action == "replay" and run.step < run.config.train.steps:
        _raise_replay(run, why)
    elif action == "rollback":
        _roll_back(run, why)
    elif action == "stop":
        raise _end(run, there, why)
    elif run.main:
        log.warning("step %d: beyond monitor.max_forgetting: %s", verdict.step, why)


def _raise_replay(run: Course, why: str) -> None:
    share = _more_replay(run)
    if run.main:
        now = f"replay {run.loader.replay:.1%} -> {share:.1%}" if share else "replay is at monitor.max_replay already"
        log.warning("step %d: beyond monitor.max_forgetting: %s; %s", run.step, why, now)
    if share:
        run.loader.set_replay(share, run.config.train.steps - run.step)
        run.log.write(event="action", step=run.step, action="replay", why=why, replay=share, to=None)


def _roll_back(run: Course, why: str) -> None:
    """Weights and optimizer as in the best checkpoint; the text goes on, with more replay, to another end."""
    monitor = run.config.monitor
    there = distributed.on_main(lambda: best_checkpoint(run.folder, run.config, sound=True))
    if there is None:
        raise _end(run, there, why)
    if run.rollbacks >= monitor.max_rollbacks:
        raise _end(run, there, f"{why}; it was sent back as often as monitor.max_rollbacks allows ({run.rollbacks})")
    came_from, share = run.step, _more_replay(run)
    path = run.folder / "checkpoints" / f"step-{there.step}"
    run.go_back(path)
    if share:
        run.loader.set_replay(share, run.config.train.steps - run.step)
    run.rollbacks += 1
    if run.main:
        log.warning(
            "step %d: beyond monitor.max_forgetting: %s; back to %s, replay %.1f%%, the text goes on",
            came_from,
            why,
            path,
            100 * run.loader.replay,
        )
    run.log.write(
        **{"event": "action", "step": there.step, "from": came_from, "action": "rollback", "why": why},
        replay=share,
        to=there.step,
    )
    keep_course(run)  # killed in it, a run resumes from the checkpoint beyond the limit, and judges it again


def _end(run: Course, there: Verdict | None, why: str) -> ForgettingError:
    run.log.write(event="action", step=run.step, action="stop", why=why, replay=None, to=None)
    exported = (
        f"the best within it is step-{there.step}, which `moect export` takes"
        if there
        else "no checkpoint is within it"
    )
    error = ForgettingError(
        f"{run.folder}: ends at step {run.step}, beyond monitor.max_forgetting: {why}; {exported}; "
        "to go on, raise data.replay, monitor.max_forgetting or change monitor.action, with resume=auto"
    )
    error.told_by_main_rank = not run.main
    return error


def _more_replay(run: Course) -> float | None:
    """The next share of replay; None where it is as high as it may be."""
    monitor, now = run.config.monitor, run.loader.replay
    share = min(monitor.max_replay, now * monitor.replay_factor)
    return share if share > now else None
