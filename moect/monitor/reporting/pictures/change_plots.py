"""Plots of what training did to each text: bars of one checkpoint, curves over all, gain against forgetting."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from moect.monitor.reporting.figures import change, change_interval, role
from moect.monitor.reporting.pictures.drawing import (
    ACCENT,
    BAD,
    GREY,
    WIDTH,
    by_step,
    drawing,
    name_ends,
    name_heights,
    save,
)
from moect.monitor.reporting.pictures.labels import Labels
from moect.monitor.rows import Row

TITLES = {"old": "Old languages: forgotten", "new": "New languages: gained"}
AXES = {"old": "more bits per byte than the base, %", "new": "fewer bits per byte than the base, %"}
Limits = dict[tuple[str, str], float]
MOST_BANDS = 6  # lines of a panel whose intervals are drawn as bands


def plot_changes(rows: list[Row], limits: Limits, labels: Labels, path: Path) -> Path:
    """Bars with 95% intervals: what each old text lost and what each new one gained, at one checkpoint.

    Args:
        rows: of one step.
        limits: what an old text may lose, a share of the base's bits per byte, by language and domain.
        labels: of the run.
        path: the PNG to write.
    """
    roles = [name for name in ("old", "new") if role(rows, name)]
    with drawing() as plt:
        heights = [len(role(rows, name)) for name in roles]
        figure, panels = plt.subplots(
            len(roles),
            1,
            figsize=(WIDTH, 0.23 * sum(heights) + 0.9 * len(roles)),
            height_ratios=[h + 0.8 for h in heights],
            layout="constrained",
            squeeze=False,
        )
        for name, axes in zip(roles, panels[:, 0], strict=True):
            _bars(axes, role(rows, name), limits if name == "old" else {}, labels)
            axes.set(title=TITLES[name], xlabel=AXES[name])
        return save(plt, figure, path)


def plot_curves(rows: list[Row], limits: Limits, labels: Labels, path: Path) -> Path:
    """What each text lost or gained, by step: a panel a role, a line a text, limits dashed.

    Args:
        rows: of several steps.
        limits, labels, path: as in `plot_changes`.
    """
    roles = [name for name in ("old", "new") if role(rows, name)]
    with drawing() as plt:
        lines = {name: _lines(role(rows, name)) for name in roles}
        heights = [name_heights(len(lines[name]), 2.3) for name in roles]
        figure, panels = plt.subplots(
            len(roles), 1, figsize=(WIDTH, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
        )
        for name, axes in zip(roles, panels[:, 0], strict=True):
            ends = []
            for points in lines[name].values():
                style, label = labels.style(points[0]), labels.of(points[0])
                steps, values = [p["step"] for p in points], [100 * change(p) for p in points]
                axes.plot(
                    steps, values, style.line, marker=style.marker, markersize=3.5, color=style.colour, linewidth=1.4
                )
                bands = [change_interval(p) for p in points]
                if len(lines[name]) <= MOST_BANDS and all(bands):
                    low, high = ([100 * band[side] for band in bands] for side in (0, 1))
                    axes.fill_between(steps, low, high, color=style.colour, alpha=0.13, linewidth=0)
                ends.append((steps[-1], values[-1], label, style.colour))
            axes.axhline(0, color=GREY, linewidth=0.9)
            if name == "old":
                _limit_lines(axes, limits, ends)
            axes.set(title=TITLES[name], ylabel="% of the base's bits")
            by_step(plt, axes)
            name_ends(axes, ends)
        return save(plt, figure, path)


def plot_pareto(
    points: list[tuple[int, float, float, float]], limits: list[float], best: int | None, path: Path
) -> Path:
    """Gain against forgetting, a point a checkpoint: the mean over old texts, joined, and the worst old text.

    Args:
        points: (step, mean forgotten, worst forgotten, mean gained), shares, by ascending step.
        limits: distinct shares that old texts may lose.
        best: step of the best checkpoint.
        path: the PNG to write.
    """
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(WIDTH, 3.9), layout="constrained")
        gains = [100 * p[3] for p in points]
        for column, name, colour, marker in (
            (1, "mean of the old texts", ACCENT, "o"),
            (2, "worst old text", BAD, "s"),
        ):
            lost = [100 * p[column] for p in points]
            axes.plot(lost, gains, "-", marker=marker, markersize=5, color=colour, linewidth=1.2, label=name, alpha=0.9)
        shown = {0, len(points) - 1, *range(0, len(points), max(1, -(-len(points) // 8)))}
        for i in shown:
            axes.annotate(
                f"{points[i][0]:,}",
                (100 * points[i][1], gains[i]),
                xytext=(-6, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="#444444",
            )
        chosen = next((p for p in points if p[0] == best), None)
        if chosen:
            axes.plot(
                *([100 * chosen[1]], [100 * chosen[3]]),
                *("*",),
                markersize=15,
                color="#E69F00",
                markeredgecolor="#333333",
                markeredgewidth=0.7,
                linestyle="none",
                label=f"best: step {best:,}",
                zorder=5,
            )
        for limit in limits:
            axes.axvline(100 * limit, color=BAD, linewidth=1, linestyle=(0, (5, 4)))
        if limits:
            axes.plot([], [], color=BAD, linewidth=1, linestyle=(0, (5, 4)), label="limit of an old text")
        axes.axvline(0, color=GREY, linewidth=0.9)
        axes.margins(x=0.12, y=0.1)
        axes.set(
            title="Gain against forgetting, by checkpoint",
            xlabel="forgotten by old languages, % (left is better)",
            ylabel="gained by new languages, mean, %",
        )
        figure.legend(loc="outside lower center", ncols=2)
        return save(plt, figure, path)


def _bars(axes, rows: list[Row], limits: Limits, labels: Labels) -> None:
    for place, row in enumerate(rows):
        value, interval = change(row), change_interval(row)
        if value is not None:
            axes.barh(place, 100 * value, height=0.68, color=labels.style(row).colour, alpha=0.85)
        if interval:
            low, high = (100 * x for x in interval)
            axes.plot([low, high], [place, place], color="#222222", linewidth=1.3, solid_capstyle="butt")
        if (row["lang"], row["domain"]) in limits:
            limit = 100 * limits[row["lang"], row["domain"]]
            axes.plot([limit, limit], [place - 0.42, place + 0.42], color=BAD, linewidth=2)
    axes.axvline(0, color=GREY, linewidth=0.9)
    axes.set_yticks(range(len(rows)), [labels.of(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _lines(rows: list[Row]) -> dict[tuple, list[Row]]:
    lines: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if change(row) is not None:
            lines[row["lang"], row["domain"]].append(row)
    return lines


def _limit_lines(axes, limits: Limits, ends: list) -> None:
    """Limits within reach of the curves; one far above them would press the curves flat."""
    distinct = sorted({round(100 * share, 3) for share in limits.values()})
    low, high = axes.get_ylim()
    reached = [limit for limit in distinct if limit <= high + 1.5 * (high - low)]
    last = max((end[0] for end in ends), default=axes.get_xlim()[1])
    for limit in reached[:4]:
        axes.axhline(limit, color=BAD, linewidth=1, linestyle=(0, (5, 4)))
        ends.append((last, limit, f"limit {limit:g}%", BAD))
    if reached:
        axes.set_ylim(low, max(high, reached[:4][-1] + 0.06 * (high - low)))
