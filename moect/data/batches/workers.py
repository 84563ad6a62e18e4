"""Worker processes that make micro-batches ahead of time (`data.workers`)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from moect.data.batches.batch import MicroBatch, RowReader
from moect.errors import DataError
from moect.processes import deaf_to, without_main


class Workers:
    """Micro-batches in the order of a plan, made by other processes.

    The processes are spawned, each a fresh interpreter: at this point the rank has threads of PyTorch, gloo or NCCL,
    and a fork would copy their locks in whatever state they are, held for ever by threads that the copy does not have.
    Micro-batches come as plain arrays through a pipe, so that a small /dev/shm does no harm.

    Args:
        reader: makes the micro-batches; each process gets one.
        count: number of processes; they start with the first micro-batch.
        plan: begins, whenever it is called, an endless list of micro-batches from where the run then stands.
    """

    def __init__(self, reader: RowReader, count: int, plan: Callable[[], Iterator]):
        self._loader = DataLoader(
            reader,
            batch_size=None,
            sampler=_Plan(plan),
            num_workers=count,
            collate_fn=_unchanged,
            multiprocessing_context="spawn",
            persistent_workers=True,
            generator=torch.Generator(),  # its seed is used for nothing; without, one is drawn from the run's own
        )
        self._batches: Iterator | None = None

    def next(self) -> MicroBatch:
        """The next micro-batch of the plan.

        Raises:
            DataError: a process ended.
        """
        if self._batches is None:
            # torch would raise in the middle of whatever this process does when one of them ends; it looks after them
            # when it waits for a batch, too
            before = signal.getsignal(signal.SIGCHLD)
            with without_main(), deaf_to(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._batches = iter(self._loader)
            if threading.current_thread() is threading.main_thread():  # only there does torch set its own
                signal.signal(signal.SIGCHLD, before)
        try:
            return MicroBatch.of(next(self._batches))
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process of `data.workers` ended by itself, perhaps for lack of memory; go on from the last "
                "checkpoint with resume=auto and a smaller data.workers, or 0"
            ) from error

    def restart(self) -> None:
        """The next micro-batch is the first of a new plan; the processes stay."""
        self._batches = None

    def close(self) -> None:
        """End the processes."""
        self._batches = self._loader = None  # the iterator ends its processes when nobody holds it


class _Plan:
    def __init__(self, plan: Callable[[], Iterator]):
        self._plan = plan

    def __iter__(self) -> Iterator:
        return self._plan()


def _unchanged(arrays: dict) -> dict:
    return arrays
