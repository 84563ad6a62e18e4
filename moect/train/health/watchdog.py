"""A rank that does nothing new for long tells where it stands: every thread's stack, on stderr and in RUN/hangs.

It ends nothing: a rank that waits for a lost one is ended by the process group's timeout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

FOLDER = "hangs"


class Watchdog:
    """Watches one rank, from the first beat on, until `close`.

    Two watch: a timer of the interpreter, which writes the stacks into the file even while other code holds the
    interpreter and no thread can run, and a thread, which says on stderr what it sees.

    Args:
        folder: the run's; RUN/hangs/rank-N.txt stays only if something was written to it.
        rank: of this process.
        minutes: without a beat; 0: never.
    """

    def __init__(self, folder: Path, rank: int, minutes: float):
        self.path = folder / FOLDER / f"rank-{rank}.txt"
        self.who, self.seconds = f"rank {rank} on {socket.gethostname()}", 60 * minutes
        self._phase, self._since, self._told = "", 0.0, False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._file = None

    def beat(self, phase: str) -> None:
        """This rank begins something: a step, a measurement, a checkpoint."""
        if not self.seconds:
            return
        with self._changed:
            if self._told:
                _say(f"{self.who} goes on after {self._minutes():.1f} min: it was at {self._phase}")
            self._phase, self._since, self._told = phase, time.monotonic(), False
            self._changed.notify()
        if self._thread is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        faulthandler.dump_traceback_later(self.seconds, file=self._file)

    def close(self) -> None:
        """Watch no more."""
        if self._thread is None:
            return
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self.seconds = 0.0
            self._changed.notify()
        self._thread.join()
        self._thread = None
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
            with contextlib.suppress(OSError):  # there are other ranks' files
                self.path.parent.rmdir()

    def _watch(self) -> None:
        with self._changed:
            while self.seconds:
                left = self._since + self.seconds - time.monotonic()
                if not self._told and left <= 0:
                    self._tell()
                    self._told = True
                self._changed.wait(None if self._told else left)

    def _tell(self) -> None:
        what = f"{self.who}: nothing new for {self._minutes():.1f} min (health.hang_minutes), at {self._phase}"
        print(f"the stacks above: {what}", file=self._file, flush=True)
        _say(f"{what}. The run is not ended; this is also in {self.path}:\n{stacks()}")

    def _minutes(self) -> float:
        return (time.monotonic() - self._since) / 60


def stacks() -> str:
    """The stack of every other Python thread of this process, the main thread's last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {i: f for i, f in sys._current_frames().items() if i != threading.get_ident()}
    main = threading.main_thread().ident
    return "\n".join(
        f"Thread {names.get(i, i)} (most recent call last):\n{''.join(traceback.format_stack(frames[i]))}"
        for i in sorted(frames, key=lambda i: i == main)
    )


def _say(text: str) -> None:
    """In one piece: other ranks may talk at the same time."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
