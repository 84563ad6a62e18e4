"""One process at a time, over all processes that see a file."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock that a file stands for; it ends with its process, whatever happens to that.

    Args:
        path: made if need be, and left there.
        waiting: called once if another process holds the lock.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def acquire(path: Path, seconds: float, waiting: Callable[[str], None] | None = None) -> TextIO:
    """Take the lock that a file stands for, and write into the file who has it.

    Args:
        path: made if need be, and left there.
        seconds: to wait at most for another process.
        waiting: called once, with the other's words, if there is one to wait for.

    Returns:
        The open file: the lock ends when it is closed, or with this process.

    Raises:
        Held: another process has it still.
        OSError: the file cannot be made, or its file system has no locks.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        deadline, told = time.monotonic() + seconds, False
        while not _taken(file):
            if time.monotonic() >= deadline:
                raise Held(_holder(path))
            if waiting and not told:
                waiting(_holder(path))
                told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


class Held(Exception):
    """Another process has a lock; says which."""


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock that a file stands for."""
    try:
        with path.open("r+" if os.access(path, os.W_OK) else "r") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() or "a process"
