"""Rows of one checkpoint as text that a person reads."""

from __future__ import annotations

from moect.data_config import KEPT
from moect.monitor.reporting.figures import share_text
from moect.monitor.rows import Row
from moect.tables import aligned

# heading, is it left-aligned
COLUMNS = {
    "language": True,
    "role": True,
    "domain": True,
    "base": False,
    "model": False,
    "delta": False,
    "retention": False,
    "gain": False,
    "95%": False,
    "identical": False,
    "exact match": False,
    "gate": False,
    "open": False,
}
AVERAGED = ("delta", "retention", "gain", "exact_match", "base_exact_match", "gate", "open_share")


def render_table(rows: list[Row]) -> str:
    """An aligned table: a line a text, old languages first, and each role's mean.

    The mean leaves bits per byte out: they cannot be compared across languages. A column that nobody fills is left out.
    `95%` is the interval of retention or gain; `identical` the share of documents with the base's logits, bit for bit,
    and in brackets that of tokens.

    Args:
        rows: of one step.
    """
    lines = []
    for role in (*KEPT, "new"):
        members = [row for row in rows if row["role"] == role]
        lines += [_cells(row) for row in members]
        if len(members) > 1:
            lines.append(_cells({"lang": "mean", "role": role, **_mean(members)}))
    used = [c for c in COLUMNS if any(line[c] for line in lines)]
    widths = {c: max(len(c), *(len(line[c]) for line in lines)) for c in used}
    # as in a table of figures: the heading stands where its figures stand
    aligned = ["  ".join(_align(cells[c], widths[c], COLUMNS[c]) for c in used).rstrip() for cells in lines]
    heading = "  ".join(_align(c, widths[c], COLUMNS[c]) for c in used).rstrip()
    rule = "-" * max(map(len, [heading, *aligned]))
    title = f"step {rows[0]['step']}: bits per byte on held-out text, base and model"
    if any(row["role"] == "learnt" for row in rows):
        title += "; of a learnt language `base` is the model as the run began"
    title += "; documents (tokens) with the base's logits" if "identical" in used else ""
    return "\n".join([title, heading, rule, *aligned])


def render_tasks(rows: list[Row]) -> str:
    """An aligned table of the tasks of one step: base, model, and their difference question by question, each with its
    standard error.

    Args:
        rows: of tasks.jsonl, at least one.
    """

    def with_error(row: Row, name: str, form: str) -> str:
        error = row.get({"value": "stderr", "base_value": "base_stderr"}.get(name, f"{name}_stderr"))
        return format(row[name], form) + ("" if error is None else f" ± {error:.3f}")

    lines = [
        [row["task"], row["lang"], row["metric"], str(row["questions"])]
        + [with_error(row, "base_value", ".3f"), with_error(row, "value", ".3f"), with_error(row, "difference", "+.3f")]
        for row in rows
    ]
    return aligned(["task", "language", "metric", "questions", "base", "model", "difference"], lines, left=3)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as text; empty for None."""
    return "" if share is None else f"{100 * share:.{digits}f}%"


def _cells(row: Row) -> dict[str, str]:
    def number(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    exact = ""
    if row.get("exact_match") is not None:
        exact = f"{percent(row['base_exact_match'])} -> {percent(row['exact_match'])}"
    return {
        "language": row["lang"],
        "role": row["role"],
        "domain": row.get("domain", ""),
        "base": number("base_bits_per_byte", ".4f"),
        "model": number("bits_per_byte", ".4f"),
        "delta": number("delta", "+.4f"),
        "retention": percent(row.get("retention"), 2),
        "gain": percent(row.get("gain"), 2),
        "95%": _interval(row),
        "identical": _identical(row),
        "exact match": exact,
        "gate": number("gate", ".3f"),
        "open": percent(row.get("open_share")),
    }


def _interval(row: Row) -> str:
    """The 95% interval of retention or gain."""
    key = "retention" if row.get("role") in KEPT else "gain"
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if low is None or high is None else f"{percent(low, 2).removesuffix('%')} to {percent(high, 2)}"


def _identical(row: Row) -> str:
    """Documents whose logits are the base's, bit for bit: their share, and that of such tokens."""
    exact = row.get("exact")
    if not exact:
        return ""
    tokens = share_text(exact["identical_tokens"] / exact["tokens"]) if exact["tokens"] else ""
    return f"{share_text(exact['identical_documents'] / exact['documents'])} ({tokens})"


def _mean(rows: list[Row]) -> Row:
    """Mean of each column over the rows that have a value in it."""
    columns = {key: [row[key] for row in rows if row.get(key) is not None] for key in AVERAGED}
    return {key: sum(values) / len(values) for key, values in columns.items() if values}


def _align(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)
