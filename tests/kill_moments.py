"""The moments of a training at which it can be killed, counted inside its process; at a chosen one it kills itself.

A moment lies before every step's part, every change that Python makes to a file or folder below the run's output, and
inside a write: then half of what is written is there. Kinds of moments, each counted by itself:

    step        data of a step, forward, backward, optimizer
    save        a file of a checkpoint that is being written: before it, half of it, before its fsync
    rename      of a checkpoint, or of one that goes
    rotation    a file of a checkpoint that is being deleted
    monitor     a batch of a measurement; a file of measurements
    log         a line of log.jsonl: before it, half of it
    rollback    the way back to an earlier checkpoint
    folder      whatever else lies in the run's folder
    cache       tokens and results that runs share
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

CHANGING = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2}  # audit events, their paths


class Moments:
    """Counts the moments of this process; kills it at one.

    Args:
        output: below which changes count.
        record: a file that gets a line `kind<TAB>what` for every moment, the deadly one included.
        kind, number: the moment to die at; None: never.
    """

    def __init__(self, output: Path, record: Path, kind: str | None, number: int | None):
        self.output, self.deadly = str(output), (kind, number)
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._counts: Counter = Counter()
        self._lock = threading.RLock()
        self._watching = threading.local()

    def __call__(self, kind: str, what: str, halfway: Callable[[], None] | None = None) -> None:
        """A moment has come; `halfway` is done before death only."""
        with self._lock:
            self._counts[kind] += 1
            os.write(self._record, f"{kind}\t{what}\n".encode())
            if (kind, self._counts[kind]) == self.deadly:
                if halfway:
                    halfway()
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Watch this process from here on."""
        self._watch_steps()
        self._watch_writes()
        sys.addaudithook(self._audit)

    def file(self, what: str, path: str, halfway: Callable[[], None] | None = None) -> None:
        """A moment in the life of a file or folder, if it counts."""
        if path.startswith(self.output):
            inside = os.path.relpath(path, self.output)
            self(_kind_of(inside, what), f"{what} {inside}", halfway)

    def _audit(self, event: str, arguments: tuple) -> None:
        if getattr(self._watching, "on", False):  # what this does itself
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, (str, bytes, os.PathLike)) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
            what, path = "open", os.fsdecode(path)
        elif event in CHANGING:
            what, path = event, os.fsdecode(arguments[0])
            folder = arguments[-1] if event != "os.mkdir" else arguments[2]
            if not os.path.isabs(path) and isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        else:
            return
        self._watching.on = True
        try:
            self.file(what, path)
        finally:
            self._watching.on = False

    def _watch_steps(self) -> None:
        from deepspeed.runtime.engine import DeepSpeedEngine

        from moect.data.batches.loader import Loader
        from moect.monitor.measuring import score
        from moect.train.loop import Run

        for owner, name, kind in (
            (Loader, "next_step", "step"),
            (DeepSpeedEngine, "forward", "step"),
            (DeepSpeedEngine, "backward", "step"),
            (DeepSpeedEngine, "step", "step"),
            (score, "_predict", "monitor"),
            (Run, "go_back", "rollback"),
        ):
            setattr(owner, name, self._before(kind, name, getattr(owner, name)))

    def _before(self, kind: str, name: str, plain: Callable) -> Callable:
        def watched(*arguments, **keywords):
            self(kind, name)
            return plain(*arguments, **keywords)

        return watched

    def _watch_writes(self) -> None:
        import safetensors.torch

        from moect.train.checkpoints import writing
        from moect.train.folder import RunLog

        sync, save, write_text, write_line = os.fsync, writing.save_file, Path.write_text, RunLog.write

        def watched_sync(handle):
            self.file("fsync", os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}"))
            return sync(handle)

        def half(path: Path, content: bytes) -> None:
            self._watching.on = True
            path.write_bytes(content[: len(content) // 2])

        def watched_save(tensors, path):
            self.file("half of", str(path), lambda: half(path, safetensors.torch.save(tensors)))
            return save(tensors, path)

        def watched_text(path, text, *arguments, **keywords):
            self.file("half of", str(path), lambda: half(path, text.encode()))
            return write_text(path, text, *arguments, **keywords)

        def watched_line(log, **values):
            if log._file:

                def half_a_line():
                    log._file.write('{"step": 1, "lo')
                    log._file.flush()

                self("log", f"before {values.get('event', 'figures')}")
                self("log", f"half of {values.get('event', 'figures')}", half_a_line)
            return write_line(log, **values)

        os.fsync, writing.save_file = watched_sync, watched_save
        Path.write_text, RunLog.write = watched_text, watched_line


def _kind_of(inside: str, what: str) -> str:
    """The kind of a moment, from the path within the output."""
    if inside.startswith(".cache"):
        return "cache"
    if "/checkpoints" in inside:
        if what == "os.rename":
            return "rename"
        return "rotation" if "/.deleted-" in inside or "/.replaced-" in inside else "save"
    return "monitor" if "/monitor" in inside else "folder"
