"""How far the tokenizing of a long corpus is, now and then, in the log."""

from __future__ import annotations

import logging
from time import monotonic

log = logging.getLogger("moect.data")

INTERVAL = 30.0  # seconds between two lines


class Progress:
    """Counts documents and bytes, and logs a line each half minute; nothing where that is enough time for all.

    Args:
        name: of the corpus.
        limit: documents that it has at most; None: unknown, and so is the time that is left.
    """

    def __init__(self, name: str, limit: int | None):
        self.name, self.limit = name, limit
        self.documents = self.n_bytes = 0
        self.began = self.last = monotonic()
        self.told = False

    def add(self, documents: int, n_bytes: int) -> None:
        """So many documents, and bytes of their text in UTF-8, are done."""
        self.documents += documents
        self.n_bytes += n_bytes
        now = monotonic()
        if now - self.last >= INTERVAL:
            self.last, self.told = now, True
            left = ""
            if self.limit:
                seconds = (now - self.began) * (self.limit / self.documents - 1)
                left = f", {100 * self.documents / self.limit:.0f}%, ETA {_minutes(seconds)}"
            log.info("%s: tokenized %s%s", self.name, self._amount(), left)

    def end(self) -> None:
        """All is done."""
        if self.told:
            log.info("%s: tokenized all %s in %s", self.name, self._amount(), _minutes(monotonic() - self.began))

    def _amount(self) -> str:
        return f"{self.documents:,} documents, {self.n_bytes / 1e6:,.1f} MB"


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m"
