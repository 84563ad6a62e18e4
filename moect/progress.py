"""How far a long piece of work is: a bar for somebody who watches, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
from time import monotonic

from moect import tables

log = logging.getLogger("moect")
INTERVAL = 30.0  # seconds between two lines


class Progress:
    """Counts bytes, or things; says nothing where half a minute is enough for all and nobody watches.

    Args:
        verb: what is done.
        total: of all.
        done: of these, what was done before.
        count: what they are, in the plural; None: bytes.
    """

    def __init__(self, verb: str, total: int, done: int = 0, count: str | None = None):
        self.count = count
        self.verb, self.total, self.before, self.done = verb, total, done, done
        self.began = self.last = monotonic()
        self._bar = self._task = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            amount = MofNCompleteColumn() if count else DownloadColumn()
            columns = TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn(compact=True)
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(verb, total=total, completed=done)
            self._bar.start()

    def add(self, amount: int) -> None:
        """So many more."""
        self.done += amount
        if self._bar:
            self._bar.update(self._task, completed=self.done)
            return
        now = monotonic()
        if now - self.last >= INTERVAL and self.done < self.total:
            self.last = now
            seconds = (now - self.began) * (self.total - self.done) / max(1, self.done - self.before)
            done, total = (f"{n:,} {self.count}" if self.count else tables.size(n) for n in (self.done, self.total))
            share = f"{done} of {total}"
            log.info("%s: %s, ETA %dm", self.verb, share, round(seconds / 60))

    def end(self) -> None:
        """All is done, or it cannot go on."""
        if self._bar:
            self._bar.stop()
