"""How far the reading of a long corpus is: a bar for somebody who watches, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
from time import monotonic

log = logging.getLogger("moect.data")

INTERVAL = 30.0  # seconds between two lines
NAME = 16  # characters of a corpus' name in the bar


class Progress:
    """Counts documents and bytes, and tells of them; nothing where half a minute is enough for all.

    Args:
        name: of the corpus.
        total: bytes of its files, compressed as they are, or the greatest number of documents; None: not known, and
            neither is the time that is left.
        verb: what is done to the documents.
        done: of `total`, what was done before, by an earlier process.
    """

    def __init__(self, name: str, total: int | None, verb: str = "tokenized", done: int = 0):
        self.name, self.total, self.verb = name, total, verb
        self.documents = self.n_bytes = 0
        self.before = self.done = done
        self.began = self.last = monotonic()
        self.told = False
        self._bar = self._task = None
        if sys.stderr.isatty():
            self._bar, self._task = _bar(name, total, done)

    def add(self, documents: int, n_bytes: int, done: int) -> None:
        """So many more documents, and bytes of their text in UTF-8, and so much of the total by now."""
        self.documents += documents
        self.n_bytes += n_bytes
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done, amount=self._amount())
            return
        now = monotonic()
        if now - self.last >= INTERVAL:
            self.last, self.told = now, True
            left = ""
            if self.total and done > self.before:
                seconds = (now - self.began) * (self.total - done) / (done - self.before)
                left = f", {100 * done / self.total:.0f}%, ETA {_minutes(seconds)}"
            log.info("%s: %s %s%s", self.name, self.verb, self._amount(), left)

    def end(self) -> None:
        """All is done, or it cannot go on."""
        if self._bar:
            self._bar.stop()
        if self.told or (self._bar and monotonic() - self.began >= INTERVAL):
            log.info("%s: %s %s in %s", self.name, self.verb, self._amount(), _minutes(monotonic() - self.began))

    def _amount(self) -> str:
        seconds = max(monotonic() - self.began, 1e-9)
        megabytes = self.n_bytes / 1e6
        return f"{self.documents:,} documents, {megabytes:,.1f} MB, {megabytes / seconds:.1f} MB/s"


def _bar(name: str, total: int | None, done: int):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[amount]}"),
        console=Console(stderr=True),
        transient=True,
    )
    short = name if len(name) <= NAME else f"…{name[1 - NAME :]}"  # so that all fits 80 columns
    task = bar.add_task(short, total=total, completed=done, amount="")
    bar.start()
    return bar, task


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m"
