"""The checkpoints of a run, written by all its ranks: at once, or while training goes on.

save     takes copies; every rank writes its own, here or in a thread (train.async_save)
settle   once all have written: the main rank makes a checkpoint of it and deletes what is superseded
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from moect import distributed
from moect.config import RunConfig
from moect.model.partition import full_shape
from moect.train import state
from moect.train.checkpoints.best import best_checkpoint
from moect.train.checkpoints.writing import begin, check_space, commit, rotate, write_part

WRITTEN = "written"  # the note of a rank whose part is on the disk


class Saver:
    """Writes the checkpoints of one run, on one rank.

    Args:
        config: the run's.
        engine: DeepSpeed's.
        rank, world_size: this process, and how many write together.
        saved: called on the main rank with each checkpoint that is complete, its path and its plain values.
    """

    def __init__(self, config: RunConfig, engine, rank: int, world_size: int, saved: Callable[[Path, dict], None]):
        self.config, self.engine, self.rank, self.world_size = config, engine, rank, world_size
        self.folder = config.folder / "checkpoints"
        self.saved = saved
        self._owner = state.owners(engine, world_size)
        self._pending: _Part | None = None

    def save(self, step: int, extra: dict, info: dict) -> None:
        """Write a checkpoint; every rank calls it. It is there on return, unless `train.async_save`.

        Args:
            step: optimizer steps by now.
            extra: tensors beside what DeepSpeed has, by kind of file; of the main rank.
            info: plain values; of the main rank.

        Raises:
            CheckpointError: the disk refuses, on this rank or at the checkpoint before, or has no space.
            TrainingError: the same of another rank.
        """
        self.settle()  # at most one is in flight
        distributed.on_main(lambda: begin(self.folder, step, self.size()))
        masters, moments = state.gather(self.engine, keep=lambda name: self._owner[name] == self.rank)
        files = {"module": masters, "optimizer": moments}
        for kind, tensors in extra.items() if self.rank == 0 else ():
            files[kind] = files.get(kind, {}) | tensors
        self._pending = _Part(step, info, lambda: write_part(self.folder, step, files, self.rank, self.world_size))
        if self.config.train.async_save:
            self._pending.start()
        else:
            self._pending.run()
            self.settle()

    def size(self) -> int:
        """Bytes of a checkpoint: a master and two moments in fp32."""
        return 12 * sum(full_shape(p).numel() for _, p in state.trainable_parameters(self.engine))

    def check_space(self) -> None:
        """Whether a first checkpoint has its place; found out before the first step.

        Raises:
            CheckpointError: it has not.
        """
        check_space(self.config.folder, self.size())

    def notes(self) -> dict[str, float]:
        """What the other ranks are to know of this one, with the next step."""
        return {WRITTEN: float(self._pending is not None and self._pending.done.is_set())}

    def settle_if_written(self, notes: dict[str, float]) -> None:
        """`settle`, once the notes of all ranks, added up, say that nobody needs to wait."""
        if self._pending is not None and notes[WRITTEN] == self.world_size:
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint in flight, if there is one, is complete; every rank calls it.

        Raises:
            CheckpointError, TrainingError: as `save`.
        """
        if self._pending is None:
            return
        part, self._pending = self._pending, None
        mine = distributed.together(part.result)
        written = [None] * self.world_size
        dist.all_gather_object(written, mine)
        distributed.on_main(lambda: self._complete(part.step, written, part.info))

    def _complete(self, step: int, written: list[dict], info: dict) -> None:
        path = commit(self.folder, step, written, info)
        best = best_checkpoint(self.config.folder, self.config)
        train = self.config.train
        rotate(self.folder, train.keep_last, step, keep=best and best.step, keep_every=train.keep_every)
        self.saved(path, info)


class _Part(threading.Thread):
    """One rank's part of a checkpoint, being written."""

    def __init__(self, step: int, info: dict, write: Callable[[], dict]):
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self.step, self.info, self._write = step, info, write
        self.done = threading.Event()
        self._written, self._failure = {}, None

    def run(self) -> None:
        try:
            self._written = self._write()
        except Exception as error:  # the main thread raises it
            self._failure = error
        self._write = None  # and with it the copies
        self.done.set()

    def result(self) -> dict:
        """What `write_part` returned or raised, when it has."""
        self.done.wait()
        if self._failure:
            raise self._failure
        return self._written
