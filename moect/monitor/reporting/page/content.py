"""What a report says, without how it looks: sections of blocks, which Markdown and HTML both render.

All strings are plain text as measured or configured; a renderer escapes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Figure:
    """One big number: what it is of, and what to hold it against."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Figures:
    """Big numbers, side by side."""

    items: list[Figure]


@dataclass(frozen=True)
class Table:
    """Cells of text; the first `left` columns are words, the others figures.

    Attributes:
        heads: names of the columns.
        rows: as many cells each.
        left: columns that are words.
        marked: index of rows that stand out, by what they are.
    """

    heads: list[str]
    rows: list[list[str]]
    left: int = 1
    marked: dict[int, Tone] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A PNG file; `alt` says in a sentence what it shows, `caption` how to read it."""

    path: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Lines for a shell."""

    text: str


@dataclass(frozen=True)
class Terms:
    """Terms and what they mean."""

    items: list[tuple[str, str]]


@dataclass(frozen=True)
class Sample:
    """How a document begins, and how it goes on: as written, by the base, by the model."""

    heading: str
    lang: str
    prompt: str
    reference: str
    base: str
    model: str


Block = Text | Figures | Table | Picture | Code | Terms | Sample


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; `id` is its anchor."""

    id: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    """A report: the title, the verdict in a few words and its tone, the opening, and the sections."""

    title: str
    subtitle: str
    verdict: str
    tone: Tone
    opening: list[Block]
    sections: list[Section]


def compact(table: Table) -> Table:
    """The table without columns in which no row has anything."""
    kept = [i for i in range(len(table.heads)) if i < table.left or any(row[i] for row in table.rows)]
    left = sum(i < table.left for i in kept)
    return Table([table.heads[i] for i in kept], [[r[i] for i in kept] for r in table.rows], left, table.marked)
