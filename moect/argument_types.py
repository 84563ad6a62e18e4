"""Numbers on the command line, as types of argparse: what a number must be, in its message."""

from __future__ import annotations

import argparse


def positive(text: str, least: int = 1) -> int:
    """A whole number of at least `least`."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}")
    return number


def above_zero(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def share(text: str) -> float:
    """A number above 0, at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return number
