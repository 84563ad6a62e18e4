"""A report as Markdown."""

from __future__ import annotations

import os
import re
from functools import singledispatch
from pathlib import Path

from moect.monitor.reporting.page.content import Block, Code, Figures, Picture, Report, Sample, Table, Terms, Text


def to_markdown(report: Report, folder: Path) -> str:
    """The report as Markdown, pictures as links relative to `folder`."""
    parts = [f"# {escape(report.title)}", _paragraph(report.subtitle), f"**{escape(report.verdict)}**"]
    parts += [_render(block, folder) for block in report.opening]
    for section in report.sections:
        parts += [f"## {escape(section.title)}", *(_render(block, folder) for block in section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, where it does not begin a paragraph."""
    return re.sub(r"([\\`*_\[\]<>|$~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def _paragraph(text: str) -> str:
    """The same at the beginning of a line, where it could be taken for a heading or a list."""
    return re.sub(r"^(\d*)([#+.)-])", r"\1\\\2", escape(text))


@singledispatch
def _render(block: Block, folder: Path) -> str:
    raise TypeError(type(block))


@_render.register
def _(block: Text, folder: Path) -> str:
    return _paragraph(block.text)


@_render.register
def _(block: Figures, folder: Path) -> str:
    return "\n".join(f"- {escape(f.label)}: **{escape(f.value)}** {escape(f.note)}".rstrip() for f in block.items)


@_render.register
def _(block: Table, folder: Path) -> str:
    rule = [":--" if i < block.left else "--:" for i in range(len(block.heads))]
    cells = [[escape(cell) for cell in row] for row in (block.heads, *block.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


@_render.register
def _(block: Picture, folder: Path) -> str:
    picture = f"![{escape(block.alt)}]({Path(os.path.relpath(block.path, folder)).as_posix()})"
    return f"{picture}\n\n{_paragraph(block.caption)}" if block.caption else picture


@_render.register
def _(block: Code, folder: Path) -> str:
    return "\n".join(f"    {line}" for line in block.text.splitlines())


@_render.register
def _(block: Terms, folder: Path) -> str:
    return "\n".join(f"- **{escape(term)}**: {escape(meaning)}" for term, meaning in block.items)


@_render.register
def _(block: Sample, folder: Path) -> str:
    told = [("begins", block.prompt), ("goes on", block.reference), ("base", block.base), ("model", block.model)]
    lines = [f"- {name}: {escape(text)}" for name, text in told if text or name in ("base", "model")]
    return "\n".join([f"**{escape(block.heading)}**", "", *lines])
