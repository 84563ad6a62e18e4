"""Runs side by side as text: a line a run, and a line a held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moect.data_config import KEPT
from moect.monitor.comparing.comparison import Comparison, Entry
from moect.monitor.comparing.run_summary import Figures, Key, RunSummary
from moect.monitor.reporting.figures import share_text
from moect.monitor.rows import Row
from moect.tables import aligned

WIDTH = 120  # of the screen; wider tables go on below, with their first columns again
MEASURES = {
    "exact_match": "exact match, % (more is better)",
    "bits_per_byte": "bits per byte, and its change against the base (less is better)",
}
DEFINITIONS = {
    "tokens": "behind the weights that are shown",
    "gain %": "new texts, 1 - bits per byte of the model / of the base; mean",
    "loss %": "old texts, bits per byte of the model / of the base - 1; mean, and `worst %` the greatest",
    "retention %": "old texts, bits per byte of the base / of the model; mean",
    "identical %": "old documents whose logits are all the base's bit for bit, with a 95% interval",
    "exact old %": "old texts, exactly right greedy answers; and of new ones",
    "memory": "the most that a rank took (on a CPU its process); `planned` the estimate of plan.json",
}


@dataclass(frozen=True)
class Column:
    """A figure of a run.

    Attributes:
        heading: of the column.
        value: of a run and its figures; None: not known.
        form: of one value, or of the mean over the runs of a line.
        spread: of their standard deviation; None: none is shown.
    """

    heading: str
    value: Callable[[RunSummary, Figures], float | None]
    form: Callable[[float], str]
    spread: Callable[[float], str] | None = None


def _percent(heading: str, name: str, sign: str = "") -> Column:
    return Column(
        heading, lambda run, f: getattr(f, name), lambda x: f"{100 * x:{sign}.2f}", lambda x: f"{100 * x:.2f}"
    )


COLUMNS = [
    Column("step", lambda run, f: run.step, "{:,.0f}".format),
    Column("tokens", lambda run, f: run.tokens, lambda x: si(x)),
    _percent("gain %", "gain", "+"),
    _percent("loss %", "loss", "+"),
    _percent("worst %", "worst", "+"),
    _percent("retention %", "retention"),
    Column("identical %", lambda run, f: f.identical, lambda x: _share(x, 2), lambda x: f"{100 * x:.2f}"),
    _percent("exact old %", "exact_match_old"),
    _percent("exact new %", "exact_match_new"),
    Column("trains", lambda run, f: run.trainable, lambda x: si(x)),
    Column("tokens/s", lambda run, f: run.tokens_per_second, "{:,.0f}".format, "{:,.0f}".format),
    Column("memory", lambda run, f: run.peak_memory, lambda x: size(x)),
    Column("planned", lambda run, f: run.planned_memory, lambda x: size(x)),
]


def render(comparison: Comparison, markdown: bool = False) -> str:
    """The overview, what its columns mean, and the tables by text."""
    heading = "### " if markdown else ""
    parts = [overview(comparison, markdown), definitions(comparison, markdown)]
    for measure in MEASURES:
        if any(_measured(comparison, text, measure) for text in comparison.texts):
            parts += [f"{heading}{MEASURES[measure][0].upper()}{MEASURES[measure][1:]}"]
            parts += [by_text(comparison, measure, markdown)]
    return "\n\n".join(parts)


def overview(comparison: Comparison, markdown: bool = False) -> str:
    """A line a run, or group of runs; columns that nobody fills are left out."""
    lines = _lines(comparison)
    return _table(list(lines[0]), [list(line.values()) for line in lines], 2, markdown)


def definitions(comparison: Comparison, markdown: bool = False) -> str:
    """Which checkpoints are shown, what the columns say, and what was left out."""
    shown = {run.choice for run in comparison.runs}
    limited = any(run.within is not None for run in comparison.runs)
    by = {True: "gain", False: "retention"}
    words = " or ".join(dict.fromkeys(by[run.has_new] for run in comparison.runs))
    best = "each run's best checkpoint" + (", within its budget," if limited else "") + f" by {words}"
    lines = ["Shown: " + ("each run's last checkpoint." if comparison.last else f"{best}.")]
    if "none whole" in shown:
        lines.append("*: no step of this run was measured on all of its texts, so its last one is shown.")
    if "none within" in shown:
        lines.append("*: no checkpoint of this run is within its budget, so its last one is shown.")
    lines += [
        f"†: {run.name} is measured up to step {run.measured_until:,}, and trained to step {run.trained_until:,}."
        for run in comparison.runs
        if run.measured_until < run.trained_until
    ]
    lines += [
        f"{run.name}: the text of {si(run.tokens_undone)} tokens was undone by rollbacks, and is not counted."
        for run in comparison.runs
        if run.tokens_undone
    ]
    if any(len(entry.runs) > 1 for entry in comparison.entries):
        lines.append("±: standard deviation over the runs of a line, mean before it.")
    used = _lines(comparison)[0]
    lines += [f"{name}: {text}." for name, text in DEFINITIONS.items() if name in used]
    lines += [f"Left out: {text}, {why}." for text, why in comparison.left_out.items()]
    return "\n".join(f"- {line}" if markdown else line for line in lines)


def by_text(comparison: Comparison, measure: str | None = None, markdown: bool = False) -> str:
    """A line a text, old languages first, and each role's mean where a mean has a meaning.

    Bits per byte compare within a text only, so their mean is that of the changes.

    Args:
        comparison: of which texts and runs.
        measure: key of MEASURES; a text without answers is left out of exact match. None: the comparison's.
    """
    measure = measure or comparison.measure
    heading = ["language", "role", "domain", "documents", "base", *(entry.name for entry in comparison.entries)]
    cells = _exact_match if measure == "exact_match" else _bits
    lines = []
    for role in (*KEPT, "new"):
        members = [t for t in comparison.texts if t["role"] == role and _measured(comparison, t, measure)]
        for text in members:
            facts = [text["lang"], role, text["domain"], f"{text['documents']:,}"]
            lines.append(facts + cells(comparison.entries, [(text["lang"], text["domain"])], mean=False))
        if len(members) > 1:
            keys = [(text["lang"], text["domain"]) for text in members]
            lines.append(["mean", role, "", "", *cells(comparison.entries, keys, mean=True)])
    return _table(heading, lines, 3, markdown, fixed=5)


def _measured(comparison: Comparison, text: Row, measure: str) -> bool:
    """Whether every run has that measure of a text."""
    key = text["lang"], text["domain"]
    return all(run.rows[key].get(measure) is not None for run in comparison.runs)


def _lines(comparison: Comparison) -> list[dict[str, str]]:
    """The cells of the overview's lines, by heading; those that nobody fills are left out."""
    lines = [_line(entry) for entry in comparison.entries]
    used = [name for name in lines[0] if any(line[name] for line in lines)]
    return [{name: line[name] for name in used} for line in lines]


def _line(entry: Entry) -> dict[str, str]:
    """The cells of a line of the overview, by heading."""
    pairs = list(zip(entry.runs, entry.figures, strict=True))
    methods = dict.fromkeys(run.config.method for run in entry.runs)
    cells = {"run": entry.name, "method": ", ".join(methods)}
    if len(pairs) > 1:
        cells["run"] += f" ({len(pairs)} runs)"
    verdicts = [run.within for run in entry.runs if run.within is not None]
    cells["budget"] = ""
    if verdicts:
        words = "within" if all(verdicts) else "beyond"
        cells["budget"] = words if len(verdicts) == 1 else f"{sum(verdicts)} of {len(verdicts)} within"
    for column in COLUMNS:
        cells[column.heading] = _with_spread(entry, [column.value(*pair) for pair in pairs], column)
    if len(pairs) == 1:
        ((run, values),) = pairs
        if values.worst is not None:
            cells["worst %"] += f" {values.worst_text}"
        if values.identical is not None:
            cells["identical %"] = (
                f"{_share(values.identical)} ({100 * values.identical_low:.1f} to {100 * values.identical_high:.1f})"
            )
    if any(run.choice in ("none within", "none whole") for run in entry.runs):
        cells["step"] += "*"
    if any(run.measured_until < run.trained_until for run in entry.runs):
        cells["step"] += "†"
    return cells


def _with_spread(entry: Entry, values: list[float | None], column: Column) -> str:
    average, deviation = entry.spread(values)
    if average is None:
        return ""
    text = column.form(average)
    if deviation is None:
        return text
    if column.spread:
        return f"{text} ± {column.spread(deviation)}"
    return text if not deviation else f"{column.form(min(values))} to {column.form(max(values))}"


def _bits(entries: list[Entry], keys: list[Key], mean: bool) -> list[str]:
    """The base and every entry: bits per byte and change; for several texts the mean change alone."""
    base = entries[0].runs[0].rows[keys[0]]["base_bits_per_byte"]
    cells = ["" if mean else f"{base:.4f}"]
    for entry in entries:
        changes = [
            sum(run.rows[key]["delta"] / run.rows[key]["base_bits_per_byte"] for key in keys) / len(keys)
            for run in entry.runs
        ]
        bits = "" if mean else _mean_and_spread(entry, [run.rows[keys[0]]["bits_per_byte"] for run in entry.runs], 4)
        cells.append(f"{bits} ({100 * sum(changes) / len(changes):+.2f}%)".strip())
    return cells


def _exact_match(entries: list[Entry], keys: list[Key], mean: bool) -> list[str]:
    """The base and every entry: exact match in %, the mean over the texts."""
    first = entries[0].runs[0].rows
    base = 100 * sum(first[key]["base_exact_match"] for key in keys) / len(keys)
    of_run = lambda run: 100 * sum(run.rows[key]["exact_match"] for key in keys) / len(keys)  # noqa: E731
    return [f"{base:.1f}", *(_mean_and_spread(entry, [of_run(run) for run in entry.runs], 1) for entry in entries)]


def _mean_and_spread(entry: Entry, values: list[float], digits: int) -> str:
    average, deviation = entry.spread(values)
    return f"{average:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _share(share: float, digits: int = 1) -> str:
    """In %; all and none are said only where it is all or none."""
    return share_text(share, digits).removesuffix("%")


def _table(heading: list[str], lines: list[list[str]], left: int, markdown: bool, fixed: int | None = None) -> str:
    """A table whose first `left` columns are text. On the screen one that is too wide is cut into several, below one
    another, each with the first `fixed` columns."""
    if markdown:
        rule = ["---"] * left + ["---:"] * (len(heading) - left)
        escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (heading, *lines)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (escaped[0], rule, *escaped[1:]))
    fixed = left if fixed is None else fixed
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
    blocks, room = [], -1
    for column in range(fixed, len(heading)):
        if room < widths[column] + 2:
            blocks.append(list(range(fixed)))
            room = WIDTH - sum(width + 2 for width in widths[:fixed]) + 2
        blocks[-1].append(column)
        room -= widths[column] + 2
    return "\n\n".join(
        aligned([heading[c] for c in block], [[line[c] for c in block] for line in lines], left) for block in blocks
    )


def si(number: float) -> str:
    """A count with three digits and a unit."""
    for large, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= large:
            return f"{number / large:.2f} {unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes in GiB, or in MiB where that is less than one."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
