"""Several runs side by side: what each knew of every language in the end, and what their base knew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moect.errors import DataError
from moect.monitor.reporting.plots import plot_comparison
from moect.monitor.rows import Row, read_rows

MEASURES = {
    "exact_match": "exact match, % (more is better)",
    "bits_per_byte": "bits per byte (less is better)",
}


@dataclass
class Comparison:
    """The last measured checkpoint of each run, text by text.

    Attributes:
        measure: key of MEASURES.
        names: of the runs.
        texts: (lang, role, domain, documents, base value, value of each run), old languages first. Exact match in %.
    """

    measure: str
    names: list[str]
    texts: list[tuple[str, str, str, int, float, list[float]]]

    def table(self, markdown: bool = False) -> str:
        """An aligned table, or a Markdown one, with each role's mean where a mean has a meaning."""
        form = "{:.1f}" if self.measure == "exact_match" else "{:.4f}"
        lines = [["language", "role", "domain", "documents", "base", *self.names]]
        for role in ("old", "new"):
            members = [t for t in self.texts if t[1] == role]
            for lang, _, domain, documents, base, values in members:
                lines.append([lang, role, domain, str(documents), *(form.format(v) for v in (base, *values))])
            if self.measure == "exact_match" and len(members) > 1:  # bits per byte do not compare across languages
                columns = zip(*([base, *values] for *_, base, values in members), strict=True)
                lines.append(["mean", role, "", "", *(form.format(sum(c) / len(c)) for c in columns)])
        if markdown:
            rule = ["---"] * 3 + ["---:"] * (len(lines[0]) - 3)
            return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        sides = ["<"] * 3 + [">"] * (len(widths) - 3)
        aligned = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))
            for line in lines
        ]
        return "\n".join([aligned[0].rstrip(), "-" * len(aligned[0]), *(line.rstrip() for line in aligned[1:])])

    def plot(self, path: Path) -> None:
        """Bars by language, a colour a run, as a PNG."""
        labels = [f"{lang} ({role})" for lang, role, *_ in self.texts]
        series = {"base": [t[4] for t in self.texts]}
        series |= {name: [t[5][i] for t in self.texts] for i, name in enumerate(self.names)}
        plot_comparison(labels, series, MEASURES[self.measure], path)


def compare(runs: list[Path]) -> Comparison:
    """Compare the last measured checkpoints of runs that share their held-out texts and base.

    Exact match is compared where every text has answers, else bits per byte.

    Raises:
        DataError: a run that was never measured, texts that differ, or a base that differs.
    """
    last = {}
    for run in map(Path, runs):
        rows = read_rows(run / "monitor")
        if not rows:
            raise DataError(f"{run}: has no measurements (monitor/forgetting.jsonl); give the folders of finished runs")
        last[run] = {(r["lang"], r["domain"]): r for r in rows if r["step"] == rows[-1]["step"]}
    first_run, first = next(iter(last.items()))
    for run, rows in last.items():
        if rows.keys() != first.keys():
            odd = sorted(rows.keys() ^ first.keys())[0]
            raise DataError(
                f"{run} and {first_run}: measured on different texts, first {odd[0]!r} {odd[1]!r}; compare like runs"
            )
        for key, row in rows.items():
            if abs(row["base_bits_per_byte"] - first[key]["base_bits_per_byte"]) > 1e-4:
                raise DataError(f"{run} and {first_run}: their bases differ on {key[0]!r}; compare runs of one base")
    measure = "exact_match" if all("exact_match" in row for row in first.values()) else "bits_per_byte"
    scale = 100 if measure == "exact_match" else 1
    ordered = sorted(first.items(), key=lambda item: item[1]["role"] == "new")
    texts = [
        (*_facts(row), scale * row[f"base_{measure}"], [scale * rows[key][measure] for rows in last.values()])
        for key, row in ordered
    ]
    return Comparison(measure, [run.name for run in last], texts)


def _facts(row: Row) -> tuple[str, str, str, int]:
    return row["lang"], row["role"], row["domain"], row["documents"]
