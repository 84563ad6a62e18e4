"""Runs side by side as a picture: what the old languages lost against what the new ones gained, and each language."""

from __future__ import annotations

import math
from pathlib import Path

from moect.monitor.comparing.comparison import Comparison, Entry
from moect.monitor.reporting.figures import aim
from moect.monitor.reporting.pictures.drawing import BAD, GREY, drawing, save
from moect.monitor.reporting.pictures.labels import COLOURS, MARKERS, labels_for
from moect.monitor_config import ANY, Limit, limit_of

MEANING = {"old": "old languages: loss", "new": "new languages: gain"}
BAR = 0.15  # inches
LINEAR = 1.0  # per cent; where losses differ by orders of magnitude, they are drawn by their logarithm beyond this
POINT = 0.07  # inches from the middle of a point to its edge
FAR = 1.3  # heights of a name: beyond these a line leads from it to its point
RINGS, ANGLES = 60, 16  # distances and directions in which room for a name is looked for

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


def plot(comparison: Comparison, path: Path) -> None:
    """Write the picture of a comparison.

    On the left a point a line of the table: mean loss, with a whisker to the worst text, against mean gain, and the
    limit on what may be lost if all runs have the same. On the right bars by language, the mean over its texts. In a
    group the runs are faint points around their mean.

    Args:
        comparison: of which runs.
        path: the PNG to write.
    """
    entries = comparison.entries
    roles = [role for role in MEANING if any(aim(text) == role for text in comparison.texts)]
    langs = {role: list(dict.fromkeys(t["lang"] for t in comparison.texts if aim(t) == role)) for role in roles}
    rows = max(map(len, langs.values())) * (BAR * len(entries) + 0.13)
    widths = [5.4] * (len(roles) == 2) + [3.3] * len(roles)
    height = max(4.0, rows + 1.2) + 0.2 * len(entries) / 4
    with drawing() as plt:
        figure, grid = plt.subplots(
            1, len(widths), figsize=(sum(widths), height), width_ratios=widths, layout="constrained", squeeze=False
        )
        panels = list(grid[0])
        styles = [_style(number) for number in range(len(entries))]
        names = labels_for([entry.name for entry in entries], "run")
        for role in reversed(roles):
            _bars(panels.pop(), role, langs[role], entries, styles)
        handles = [
            plt.Line2D([], [], color=colour, marker=marker, linestyle="", label=name, markersize=6)
            for (colour, marker), name in zip(styles, names, strict=True)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(entries), 4))
        if panels:
            _scatter(plt, panels[0], entries, styles, names, _shared_limit(comparison))
        save(plt, figure, path)


def place_labels(points: list[tuple[float, float]], sizes: list[tuple[float, float]], taken: list[Box], within: Box):
    """Where names go so that none covers another, a point, or what is taken: as near to its point as there is room.

    Args:
        points: in pixels.
        sizes: width and height of each name.
        taken: boxes that stay free of names, those of the points among them.
        within: the box that holds all names, if there is room.

    Returns:
        A box a name.
    """
    placed = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best, least = None, math.inf
        for ring, turn in ((r, t) for r in range(RINGS) for t in range(ANGLES)):
            angle = 2 * math.pi * turn / ANGLES
            away = height * (0.75 + 0.6 * ring)
            middle = x + math.cos(angle) * (away + width / 2), y + math.sin(angle) * (away + height / 2)
            box = (middle[0] - width / 2, middle[1] - height / 2, middle[0] + width / 2, middle[1] + height / 2)
            outside = width * height - _overlap(box, within)
            hidden = sum(_overlap(box, other) for other in (*taken, *placed)) + outside
            if hidden < least - 1e-6:
                best, least = box, hidden
            if hidden < 1e-6:
                break
        placed.append(best)
    return placed


def _overlap(one: Box, other: Box) -> float:
    """Area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _scatter(plt, axes, entries: list[Entry], styles: list, names: list[str], limit: Limit | None) -> None:
    means, worst = [], []
    for entry, (colour, marker) in zip(entries, styles, strict=True):
        loss, gain, furthest = (
            100 * entry.spread([getattr(f, name) for f in entry.figures])[0] for name in ("loss", "gain", "worst")
        )
        axes.plot([loss, furthest], [gain, gain], color=colour, linewidth=1.0, alpha=0.7)
        axes.plot([furthest], [gain], marker="|", color=colour, markersize=7, linestyle="")
        if len(entry.runs) > 1:
            faint = [(100 * f.loss, 100 * f.gain) for f in entry.figures]
            axes.plot(*zip(*faint, strict=True), marker=marker, color=colour, alpha=0.35, markersize=4, linestyle="")
        axes.plot([loss], [gain], marker=marker, color=colour, markersize=7, linestyle="", zorder=3)
        means.append((loss, gain))
        worst.append(furthest)
    reach = [x for x, _ in means] + worst
    axes.axvline(0, color=GREY, linewidth=0.8)
    if limit:
        axes.axvline(100 * limit.value, color=BAD, linewidth=1.0, linestyle="--", label=f"limit {limit}")
        axes.legend(loc="lower right")
        reach.append(100 * limit.value)
    axes.margins(0.14, 0.16)
    note = _spread_out(axes, reach)
    axes.set(
        xlabel=f"bits per byte of old languages against the base, %\n(mean, and a line to the worst text{note})",
        ylabel="gain of new languages, %",
        title="Lost and learned",
    )
    lines = [0.0] + ([100 * limit.value] if limit else [])
    _name_points(plt, axes, means, worst, lines, styles, names)


def _name_points(
    plt, axes, means: list, worst: list[float], lines: list[float], styles: list, names: list[str]
) -> None:
    figure = axes.figure
    figure.canvas.draw()
    figure.set_layout_engine("none")  # it has done its work: names may not move what they were fitted to
    size = {"fontsize": 8.5, "transform": figure.transFigure, "va": "center", "ha": "center"}
    texts = [figure.text(0, 0, name, color=colour, **size) for name, (colour, _) in zip(names, styles, strict=True)]
    extents = [text.get_window_extent() for text in texts]
    points = [tuple(axes.transData.transform(mean)) for mean in means]
    ends = [tuple(axes.transData.transform((x, gain))) for x, (_, gain) in zip(worst, means, strict=True)]
    half = POINT * figure.dpi
    taken = [(x - half, y - half, x + half, y + half) for x, y in points]
    taken += [(min(p[0], e[0]), p[1] - 3, max(p[0], e[0]) + 3, p[1] + 3) for p, e in zip(points, ends, strict=True)]
    low, high = axes.get_ylim()
    for x in lines:
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        taken.append((left - 2, bottom, left + 2, top))
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent().extents)
    sizes = [(extent.width + 4, extent.height + 2) for extent in extents]
    share = figure.transFigure.inverted().transform  # places that hold at any resolution
    for text, point, box in zip(
        texts, points, place_labels(points, sizes, taken, axes.get_window_extent().extents), strict=True
    ):
        text.set_position(share(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))
        nearest = tuple(min(max(at, low), high) for at, low, high in zip(point, box[:2], box[2:], strict=True))
        if math.dist(nearest, point) > FAR * (box[3] - box[1]):
            line = plt.Line2D(*zip(share(nearest), share(point), strict=True), color=text.get_color())
            line.set(transform=figure.transFigure, linewidth=0.6, alpha=0.7)
            figure.add_artist(line)


def _bars(axes, role: str, langs: list[str], entries: list[Entry], styles: list) -> None:
    width = 0.86 / len(entries)
    reach = [0.0]
    for number, (entry, (colour, _)) in enumerate(zip(entries, styles, strict=True)):
        places = [place - 0.43 + (number + 0.5) * width for place in range(len(langs))]
        spreads = [entry.spread([100 * f.changes[lang] for f in entry.figures]) for lang in langs]
        values = [value for value, _ in spreads]
        errors = [deviation or 0.0 for _, deviation in spreads]
        hatch = "//" * (number // len(COLOURS)) or None  # where the colours begin again
        axes.barh(places, values, height=width * 0.9, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        if any(errors):
            axes.errorbar(values, places, xerr=errors, fmt="none", ecolor="#333333", elinewidth=0.8, capsize=1.5)
        reach += values
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(langs)), labels_for(langs, "language"))
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    note = _spread_out(axes, reach) if role == "old" else ""
    axes.set(title=MEANING[role].capitalize(), xlabel=f"% of the base's bits per byte{note.replace('; ', chr(10))}")


def _spread_out(axes, values: list[float]) -> str:
    """Where one value would press all others to the axis, go by the logarithm; and the words that say so."""
    sizes = sorted(abs(value) for value in values)
    if sizes[-1] < 20 * max(LINEAR, sizes[len(sizes) // 2]) and sizes[-1] < 200:
        return ""
    axes.set_xscale("symlog", linthresh=LINEAR)
    axes.xaxis.set_major_formatter("{x:g}")
    return f"; logarithmic beyond {LINEAR:g}%"


def _shared_limit(comparison: Comparison) -> Limit | None:
    """The share that any old language may lose, if it is the same in all runs."""
    limits = {limit_of(run.config.monitor, ANY) for run in comparison.runs if not _by_language(run)}
    if len(limits) != 1 or any(_by_language(run) for run in comparison.runs):
        return None
    (limit,) = limits
    return limit if limit and limit.relative else None


def _by_language(run) -> bool:
    limits = run.config.monitor.max_forgetting
    return isinstance(limits, dict) and set(limits) != {ANY}


def _style(number: int) -> tuple[str, str]:
    """Colour and marker: 64 lines differ."""
    n = len(COLOURS)
    return COLOURS[number % n], MARKERS[(number + number // n) % len(MARKERS)]
