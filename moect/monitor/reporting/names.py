"""Names of languages, texts and tasks as they may stand in a sentence: they may be written from right to left."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

CONTROLS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # Unicode's bidirectional formatting
RIGHT_TO_LEFT = {"R", "AL", "AN"}  # bidirectional classes of Unicode's annex 9
ISOLATE, END = "\u2068", "\u2069"


def plain(name: str) -> str:
    """The name without characters that would turn around what stands beside it."""
    return CONTROLS.sub("", name)


def isolated(name: str) -> str:
    """A name for a sentence: what stands around one from right to left keeps its order."""
    name = plain(name)
    turns = any(unicodedata.bidirectional(character) in RIGHT_TO_LEFT for character in name)
    return f"{ISOLATE}{name}{END}" if turns else name


def isolated_in(text: str, names: Iterable[str]) -> str:
    """A text that was written without isolates, such as a line of a log, with these names in them."""
    turned = {plain(name): isolated(name) for name in names if isolated(name) != plain(name)}
    text = plain(text)
    if not turned:
        return text
    longest_first = "|".join(map(re.escape, sorted(turned, key=len, reverse=True)))
    return re.sub(longest_first, lambda found: turned[found[0]], text)
