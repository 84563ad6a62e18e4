"""Tables as text that a person reads."""

from __future__ import annotations


def aligned(heading: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Columns as wide as what they hold, a rule below the heading; all but the first `left` are figures."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        justified = (c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(justified).rstrip()

    lines = [line(heading), *map(line, rows)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def size(n_bytes: int) -> str:
    """Bytes for a person."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.1f} {name}"
    return f"{n_bytes / 2**10:,.1f} KiB"
