"""Heat maps of what the modules did: experts and blocks, languages and blocks, languages and experts.

L blocks with a module, E experts
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moect.monitor.reporting.experts import blocks_of, even_share, load_entropy, load_of, mean_load, odd_experts
from moect.monitor.reporting.pictures.drawing import WIDTH, by_step, drawing, name_ends, name_heights, save
from moect.monitor.reporting.pictures.labels import Labels
from moect.monitor.rows import Row

MOST_RATIO = 3.0  # times an even share at which the colours of loads end: more is overloaded
LOADS = "PuOr_r"  # purple: little, white: an even share, orange: much; safe for the colour-blind
SHARES = "Blues"


def plot_load(rows: list[Row], path: Path) -> Path:
    """Load of every expert over all texts, blocks by experts, by its even share; dead and overloaded ones marked.

    Args:
        rows: of one step, with expert load.
        path: the PNG to write.
    """
    load_LE, blocks = mean_load(rows), blocks_of(rows)
    dead, overloaded = odd_experts(rows)
    L, E = load_LE.shape
    ratio_LE = np.where(np.nansum(load_LE, 1, keepdims=True) > 0, load_LE / even_share(load_LE)[:, None], np.nan)
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.16 * L), layout="constrained")
        image = _loads(axes, ratio_LE)
        size = 44 if E <= 24 else 14
        for experts, marker, colour, name in ((dead, "x", "white", "dead"), (overloaded, "o", "white", "overloaded")):
            places = [e.expert for e in experts], [blocks.index(e.block) for e in experts]
            drawn = {"facecolor": "none", "edgecolor": colour} if marker == "o" else {"color": colour}
            if experts:
                axes.scatter(*places, s=size, marker=marker, linewidth=1.4, label=name, **drawn)
        _ticks(axes, "x", [str(e) for e in range(E)])
        _ticks(axes, "y", [str(b) for b in blocks])
        axes.set(title="Expert load over all texts", xlabel="expert", ylabel="block")
        _load_bar(figure, image, axes)
        return save(plt, figure, path)


def plot_specialists(rows: list[Row], labels: Labels, path: Path) -> Path:
    """Load of each expert by text, in the first, the middle and the last block with a module.

    Args:
        rows: of one step, with expert load.
        labels, path: as in the other plots.
    """
    load_TLE, blocks = np.array([load_of(row) for row in rows]), blocks_of(rows)
    _, L, E = load_TLE.shape
    chosen = sorted({0, L // 2, L - 1})
    side_by_side = E <= 10
    columns, lines = (len(chosen), 1) if side_by_side else (1, len(chosen))
    with drawing() as plt:
        size = (WIDTH, lines * (1.0 + 0.15 * len(rows)))
        figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axes, layer in zip(grid.flat, chosen, strict=True):
            here_TE = load_TLE[:, layer]
            ratio_TE = here_TE / even_share(here_TE)[:, None]
            ratio_TE = np.where(np.nansum(here_TE, 1, keepdims=True) > 0, ratio_TE, np.nan)
            image = _loads(axes, ratio_TE)
            axes.set(title=f"Block {blocks[layer]}", xlabel="expert")
            _ticks(axes, "x", [str(e) for e in range(E)])
            _ticks(axes, "y", [labels.of(row) for row in rows], every=1)
        _load_bar(figure, image, grid)
        return save(plt, figure, path)


def plot_by_block(rows: list[Row], panels: list[tuple[str, str]], labels: Labels, path: Path) -> Path:
    """Heat maps of texts by blocks, from 0 to 1, one below the other.

    Args:
        rows: of one step; those without a panel's values are left out of it.
        panels: (what, title) with `what` one of `gate_by_block`, `load_entropy`, `router_entropy`.
        labels, path: as in the other plots.
    """
    with drawing() as plt:
        T = len(rows)
        size = (WIDTH, len(panels) * (0.95 + 0.15 * T))
        figure, grid = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
        for (what, title), axes in zip(panels, grid[:, 0], strict=True):
            here = [row for row in rows if what == "load_entropy" or row.get(what)]
            image = _image(axes, np.array([_by_block(row, what) for row in here]), SHARES, vmin=0, vmax=1)
            axes.set(title=title, xlabel="block")
            _ticks(axes, "x", [str(b) for b in blocks_of(rows)])
            _ticks(axes, "y", [labels.of(row) for row in here], every=1)
            figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        return save(plt, figure, path)


def plot_open(rows: list[Row], labels: Labels, path: Path) -> Path:
    """Share of each text's tokens that the language gate lets through to the experts, by step."""
    texts: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("open_share") is not None:
            texts.setdefault((row["lang"], row["domain"]), []).append(row)
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(WIDTH, name_heights(len(texts), 2.3)), layout="constrained")
        ends = []
        for points in texts.values():
            style = labels.style(points[0])
            steps, shares = [p["step"] for p in points], [100 * p["open_share"] for p in points]
            axes.plot(steps, shares, style.line, marker=style.marker, markersize=3.5, color=style.colour, linewidth=1.4)
            ends.append((steps[-1], shares[-1], labels.of(points[0]), style.colour))
        axes.set_ylim(-3, 103)
        axes.set(title="Tokens that pass the language gate", ylabel="tokens, %")
        by_step(plt, axes)
        name_ends(axes, ends)
        return save(plt, figure, path)


def _by_block(row: Row, what: str) -> np.ndarray:
    """Values by block; nan where no token of the text reached the block."""
    values_L = load_entropy(row) if what == "load_entropy" else np.array(row[what], dtype=float)
    return np.where(np.nansum(load_of(row), 1) > 0, values_L, np.nan)


def _image(axes, values, colours: str, **scale):
    """Cells; where there is no value, grey."""
    from matplotlib import colormaps

    colour_map = colormaps[colours].with_extremes(bad="#c4c4c4")
    axes.grid(False)
    return axes.imshow(values, aspect="auto", cmap=colour_map, interpolation="nearest", **scale)


def _loads(axes, ratio):
    """Loads by their even share, which is white."""
    from matplotlib.colors import TwoSlopeNorm

    return _image(axes, ratio, LOADS, norm=TwoSlopeNorm(1.0, 0.0, MOST_RATIO))


def _load_bar(figure, image, axes) -> None:
    bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.06, pad=0.02, ticks=[0, 0.5, 1, 2, 3])
    bar.set_label("times an even share")


def _ticks(axes, side: str, names: list[str], every: int | None = None) -> None:
    every = every or max(1, -(-len(names) // (12 if side == "x" else 20)))
    places = range(0, len(names), every)
    set_ticks = axes.set_xticks if side == "x" else axes.set_yticks
    set_ticks(places, [names[i] for i in places], fontsize=7.5)
    axes.tick_params(axis=side, length=0)
