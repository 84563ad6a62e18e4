"""What all plots of a report share: one font, one size of text, and room for the names of many lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DPI = 200
WIDTH = 4.6  # inches: on a phone the text of a plot is then as large as a caption
GREY = "#6b6b6b"
ACCENT = "#0072B2"
BAD = "#C43C00"

SETTINGS = {
    "font.family": ["DejaVu Sans"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.parse_math": False,  # a `$` in a name is a `$`
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": DPI,
}


@contextmanager
def drawing() -> Iterator:
    """pyplot with our settings, and nothing of the machine's own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"} | SETTINGS
    with matplotlib.rc_context(ours):
        yield pyplot


def save(plt, figure, path: Path) -> Path:
    """Write a figure as PNG and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def by_step(plt, axes) -> None:
    """Steps on the x axis: whole numbers, with commas."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(plt.MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda step, _: f"{step:,.0f}"))


def name_ends(axes, ends: list[tuple[float, float, str, str]], line_height: float = 0.135) -> None:
    """Write the names of lines at their right ends, moved apart so that none covers another. Where a line ends before
    the plot does, its name stands there, and nothing leads to it that could be taken for data.

    Args:
        axes: finished but for this; its y limits are kept.
        ends: (x, y, name, colour) of each line's last point.
        line_height: of a name, in inches.
    """
    from matplotlib.patheffects import withStroke

    if not ends:
        return
    low, high = axes.get_ylim()
    axes.figure.draw_without_rendering()  # sets the layout, hence the height
    height = axes.get_window_extent().height / axes.figure.dpi
    gap = line_height / height * (high - low)
    left, right = axes.get_xlim()[0], max(end[0] for end in ends)
    axes.set_xlim(right=right + 0.02 * (right - left))
    for x_end in sorted({end[0] for end in ends}):
        ordered = sorted((end for end in ends if end[0] == x_end), key=lambda end: end[1])
        places = spread([end[1] for end in ordered], gap, low, high)
        for (x, y, name, colour), place in zip(ordered, places, strict=True):
            text = {"va": "center", "fontsize": 8, "color": colour, "annotation_clip": False}
            if x < right:
                to_left = x - left > 0.7 * (right - left)  # a name to the right would run into those beside the plot
                beside = {"xytext": (-6 if to_left else 6, 0), "ha": "right" if to_left else "left"}
                halo = [withStroke(linewidth=2, foreground="white", alpha=0.8)]
                axes.annotate(name, xy=(x, place), textcoords="offset points", path_effects=halo, **beside, **text)
                continue
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            where = {"xytext": (1.035, (place - low) / (high - low)), "textcoords": "axes fraction"}
            axes.annotate(name, xy=(x, y), **where, **text, arrowprops={**leader, "relpos": (0, 0.5)})


def name_heights(count: int, least: float = 3.2) -> float:
    """Height in inches of a plot with so many names beside it."""
    return max(least, 0.145 * count + 1.0)


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places at least a gap apart, near those wanted, within the limits if there is room."""
    clusters: list[list] = []  # [centre, members]
    for place in wanted:
        clusters.append([place, 1])
        while len(clusters) > 1 and _edge(clusters[-2], 1, gap) + gap > _edge(clusters[-1], -1, gap):
            centre, count = clusters.pop()
            before = clusters[-1]
            before[0] = (before[0] * before[1] + centre * count) / (before[1] + count)
            before[1] += count
            half = gap * (before[1] - 1) / 2
            before[0] = max(low + half, min(high - half, before[0]))
    return [centre + gap * (i - (count - 1) / 2) for centre, count in clusters for i in range(count)]


def _edge(cluster: list, side: int, gap: float) -> float:
    centre, count = cluster
    return centre + side * gap * (count - 1) / 2
