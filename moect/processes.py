"""Processes beside this one: spawned, bounded in what they hold, gone when this one is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TypeVar

from moect.errors import DataError

Item, Result = TypeVar("Item"), TypeVar("Result")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    call: Callable[[Item], Result], items: Iterable[Item], workers: int, lost: str
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `call` makes of it in another process, in the order of the items.

    The items are read no further ahead than keeps the processes busy.

    Args:
        call: travels to each process once.
        items: travel to the processes, as the results travel back.
        workers: number of processes.
        lost: the message when a process ended by itself.

    Raises:
        DataError: it did.
    """
    # spawned: a fork would copy the locks of PyTorch's and the tokenizers' threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(call,))
    pending: deque = deque()
    try:
        for item in items:
            with without_main(), deaf_to(signal.SIGINT):
                pending.append((item, pool.submit(_call, item)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise DataError(lost) from error
    except BaseException:  # nobody wants what they are working on; a second Ctrl-C would find this one waiting for it
        with deaf_to(signal.SIGINT):  # all or none: one that was killed may hold the lock that another waits for
            for process in list((pool._processes or {}).values()):
                process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def without_main() -> Iterator[None]:
    """Inside, processes that are spawned do not run this program's main script again.

    What they call lies in modules of moect. So a script needs no `if __name__ == "__main__"`, and they start faster.
    """
    main = sys.modules["__main__"]
    hidden = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    vars(main).pop("__file__", None)
    try:
        yield
    finally:
        vars(main).update(hidden)


@contextmanager
def deaf_to(*signals: int) -> Iterator[None]:
    """Inside, signals wait; and processes that are started never hear them, from their first moment on.

    Ctrl-C, and a launcher that ends its ranks, reach all processes of a run. What they mean, the rank itself decides.
    """
    resource_tracker.ensure_running()  # started in here, it would let this thread hear them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_what: Callable | None = None  # of a worker process: what it does with each item


def _begin(call: Callable) -> None:
    """In the process: one thread, no answer to Ctrl-C, which the parent handles, and no life after the parent."""
    global _what
    _what = call
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(item):
    return _what(item)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
