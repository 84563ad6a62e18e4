"""What a measurement is doing just now, for somebody who watches it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Progress:
    """One line on stderr that is written over again and again, for somebody who watches it."""

    def __init__(self, case: str):
        self.case = case
        self.write: Callable[[str], object] = sys.stderr.write if sys.stderr.isatty() else lambda text: None

    def __call__(self, what: str) -> None:
        """What is done now; nothing clears the line."""
        self.write(f"\r\033[K{self.case}: {what}" if what else "\r\033[K")
        sys.stderr.flush()

    def round(self, number: int, rounds: int, seconds: float) -> None:
        self(f"round {number} of {rounds}, {seconds:.0f} s left")
