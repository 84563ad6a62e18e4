"""A study's page: Markdown that somebody writes, with tables and pictures that are made from the results.

A table stands between `<!-- study: NAME -->` and `<!-- end -->`, NAME being `methods`, `summary DOMAIN`, `languages
DOMAIN`, `variants`, `lifelong DOMAIN`, `lengths METHOD` or `rates`; what was there is replaced. Pictures that the page
shows, `pareto` and `curves`, are written into the folder of its name, as NAME.png.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from moect.errors import DataError
from moect.monitor.reporting.pictures.drawing import GREY, by_step, drawing, name_ends, save
from moect.monitor.reporting.pictures.labels import COLOURS, MARKERS
from moect.study import tables
from moect.study.results import replace_text

REFERENCE = "full"  # what new languages are compared with
MARKED = re.compile(r"(<!-- study: (?P<name>[a-z]+)(?: (?P<of>[^ ]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
MADE: dict[str, Callable[[dict, str | None], str]] = {
    "methods": lambda results, of: tables.methods_table(results, REFERENCE),
    "summary": lambda results, of: tables.summary_table(results, REFERENCE, of),
    "languages": lambda results, of: tables.languages_table(results, of),
    "variants": lambda results, of: tables.variants_table(results),
    "lifelong": lambda results, of: tables.lifelong_table(results, of),
    "lengths": lambda results, of: tables.lengths_table(results, of),
    "rates": lambda results, of: tables.rates_table(results),
}


def fill_page(page: Path, results: dict) -> list[Path]:
    """Write the tables into a page, and its pictures beside it.

    Returns:
        What was written.

    Raises:
        DataError: the page is not there, or wants a table that there is none of.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{page}: {error.strerror}; give the page that the tables are to be written into") from error

    def made(match: re.Match) -> str:
        if match["name"] not in MADE:
            raise DataError(f"{page}: wants a table `{match['name']}`; there are {', '.join(MADE)}")
        return f"{match[1]}\n{MADE[match['name']](results, match['of'])}\n\n{match[4]}"

    filled = MARKED.sub(made, text)
    replace_text(page, filled)
    folder, pictures = page.with_suffix(""), {"pareto": plot_pareto, "curves": plot_curves}
    shown = {name: plot for name, plot in pictures.items() if f"({folder.name}/{name}.png)" in text}
    return [page, *(plot(results, folder / f"{name}.png") for name, plot in shown.items())]


def plot_pareto(results: dict, path: Path) -> Path:
    """What the old languages lost against what the new ones gained, on the text of both domains: a faint point a run,
    a full one a method. Up and to the left is better."""
    runs, styles = [run for run in results["runs"] if run["kind"] == "method"], _styles(results)
    domains = tables.domains(results)
    with drawing() as plt:
        figure, panels = plt.subplots(
            1, len(domains), figsize=(4.1 * len(domains), 4.2), layout="constrained", squeeze=False
        )
        for axes, domain in zip(panels[0], domains, strict=True):
            for name, (colour, marker) in styles.items():
                both = [
                    [tables.change(run, role, domain) for role in ("old", "new")]
                    for run in runs
                    if run["method"] == name
                ]
                points = [(100 * old, -100 * new) for old, new in both if None not in (old, new)]
                if not points:
                    continue
                axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=16, alpha=0.35, linewidths=0)
                middle = tuple(map(mean, zip(*points, strict=True)))
                axes.scatter(*middle, color=colour, marker=marker, s=42, label=name, zorder=3)
            axes.axvline(0, color=GREY, linewidth=0.7)
            axes.set_title(domain)
            axes.set_xscale("symlog", linthresh=1)
            axes.margins(0.1)
            axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xlabel("old languages: bits per byte lost, %")
            axes.set_ylabel("new languages: bits per byte gained, %")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return save(plt, figure, path)


def plot_curves(results: dict, path: Path) -> Path:
    """Bits per byte by step, of the first seed of each method: new languages, and old ones against the base."""
    runs, styles = [run for run in results["runs"] if run["kind"] == "method" and run["curve"]], _styles(results)
    domain = tables.domains(results)[0]
    with drawing() as plt:
        figure, (new, old) = plt.subplots(1, 2, figsize=(8.2, 3.6), layout="constrained")
        ends = {"new": [], "old": []}
        for run in {run["method"]: run for run in reversed(runs)}.values():
            colour, _ = styles[run["method"]]
            for axes, role in ((new, "new"), (old, "old")):
                at = [p for p in run["curve"] if (p["role"], p["domain"]) == (role, domain)]
                values = [
                    p["bits_per_byte"] if role == "new" else 100 * (p["bits_per_byte"] / p["base"] - 1) for p in at
                ]
                if not at:
                    continue
                steps = [p["step"] for p in at]
                axes.plot(steps, values, color=colour, marker="o", markersize=3, linewidth=1.2)
                ends[role].append((steps[-1], values[-1], run["method"], colour))
        for axes, role, title in ((new, "new", "new languages: bits per byte"), (old, "old", "old languages: lost, %")):
            axes.set_title(f"{title} ({domain})")
            by_step(plt, axes)
            name_ends(axes, ends[role])
        return save(plt, figure, path)


def _styles(results: dict) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, the same in all pictures."""
    names = dict.fromkeys(run["method"] for run in results["runs"] if run["kind"] == "method")
    return {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}
