"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C), and SIGUSR1, which schedulers send before their time is up.

The first ends the run after its step, with a checkpoint; the same once more ends the process at once. Two different
ones count as one wish, and so do two within three seconds: on Ctrl-C under a launcher the terminal sends SIGINT, and
the launcher SIGTERM after it, on several nodes twice.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

ONE_WISH = 3.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Inside `with`, notes signals in place of ending the process.

    A thread learns of them: Python's own handlers wait for the main thread, which may be inside a collective that
    never returns, and a second signal must work then above all.

    Args:
        tell: say it on stderr when one comes; one rank does.

    Attributes:
        received: the name of the first one; None so far.
    """

    def __init__(self, tell: bool):
        self.received: str | None = None
        self._tell = tell
        self._before: dict = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets no other thread do this; whoever embeds us there handles signals himself
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _nothing) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(self._reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # which ends the thread
        self._before = {}

    def notes(self) -> dict[str, float]:
        """What the other ranks are to know of this one, with the next step."""
        return {"stop": float(self.received is not None)}

    def _listen(self, reader: int) -> None:
        seen: dict[int, float] = {}
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if time.monotonic() - seen.setdefault(number, time.monotonic()) > ONE_WISH:
                    os._exit(128 + number)
                if self.received is None:
                    self.received = signal.Signals(number).name
                    if self._tell:
                        text = "stops after this step, with a checkpoint; once more, and it stops at once"
                        print(f"{self.received}: {text}", file=sys.stderr, flush=True)
        os.close(reader)


def _nothing(number, frame) -> None:
    """The signal's number has gone to the pipe already."""
