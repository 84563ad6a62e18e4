"""The plots of a report, as PNG files."""

from __future__ import annotations

from pathlib import Path

from moect.monitor.rows import Row

DPI = 130
GREY = "0.55"


def plot_loss(records: list[dict], path: Path) -> None:
    """Training loss by step.

    Args:
        records: lines of log.jsonl that have `step` and `loss`.
        path: the PNG to write.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1.2, color="C0")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title="Training loss")
    _finish(figure, axes, path)


def plot_forgetting(rows: list[Row], path: Path) -> None:
    """Bits per byte minus the base's by step: a panel for old languages and one for new, a line a text."""
    plt = _pyplot()
    roles = [role for role in ("old", "new") if any(r["role"] == role for r in rows)]
    figure, panels = plt.subplots(1, len(roles), figsize=(5.2 * len(roles), 3.6), layout="constrained", squeeze=False)
    for role, axes in zip(roles, panels[0], strict=True):
        texts = _texts([r for r in rows if r["role"] == role])
        for number, (label, points) in enumerate(texts.items()):
            colour, style = f"C{number % 10}", ("-", "--", ":", "-.")[number // 10 % 4]
            steps, deltas = [p["step"] for p in points], [p["delta"] for p in points]
            axes.plot(steps, deltas, style, marker="o", markersize=3, color=colour, linewidth=1.2, label=label)
        axes.axhline(0, color=GREY, linewidth=0.8)
        meaning = "above 0: forgotten" if role == "old" else "below 0: learned"
        axes.set(
            xlabel="step", ylabel="bits per byte, model - base", title=f"{role.capitalize()} languages ({meaning})"
        )
        # outside the axes: lines of languages lie close together and leave no corner free for certain
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8, ncols=1 + len(texts) // 16)
    _finish(figure, panels[0], path)


def plot_last(rows: list[Row], path: Path) -> None:
    """Base and model side by side at one checkpoint: bits per byte, and exact match where texts have answers."""
    plt = _pyplot()
    ordered = sorted(rows, key=lambda r: r["role"] == "new")  # old first, each role in the order of the configuration
    labelled = {f"{label} ({r['role']})": r for label, (r,) in _texts(ordered).items()}
    panels = [
        ("bits_per_byte", "bits per byte (less is better)", 1),
        ("exact_match", "exact match, % (more is better)", 100),
    ]
    panels = [p for p in panels if any(r.get(p[0]) is not None for r in rows)]
    height = max(2.4, 0.42 * len(rows) + 1.4)
    figure, grid = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), height), layout="constrained", squeeze=False
    )
    for (key, title, scale), axes in zip(panels, grid[0], strict=True):
        shown = {label: r for label, r in labelled.items() if r.get(key) is not None}
        for shift, source, name, colour in ((-0.19, f"base_{key}", "base", GREY), (0.19, key, "model", "C0")):
            places = [place + shift for place in range(len(shown))]
            values = [scale * r[source] for r in shown.values()]
            axes.barh(places, values, height=0.36, color=colour, label=name)
        axes.set_yticks(range(len(shown)), list(shown))
        axes.margins(y=0.02)
        axes.invert_yaxis()
        axes.set(xlabel=title)
    figure.suptitle(f"Base and model at step {rows[0]['step']}", fontsize=11)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _finish(figure, grid[0], path)


def plot_comparison(labels: list[str], series: dict[str, list[float]], title: str, path: Path) -> None:
    """Groups of bars, a group a label and a colour a series; the series `base` in grey.

    Args:
        labels: of the groups, left to right.
        series: values in the order of the labels, by name.
        title: of the value axis.
        path: the PNG to write.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(max(7, 1.1 * len(labels) + 1), 3.6), layout="constrained")
    width = 0.84 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place - 0.42 + (number + 0.5) * width for place in range(len(labels))]
        colour = GREY if name == "base" else f"C{number - 1}"
        axes.bar(places, values, width=width, color=colour, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel=title)
    figure.legend(loc="outside upper center", ncols=len(series), frameon=False, fontsize=9)
    _finish(figure, axes, path)


def _texts(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by text, labelled by language, and by domain too where a language has several."""
    domains: dict[str, set] = {}
    for row in rows:
        domains.setdefault(row["lang"], set()).add(row["domain"])
    texts: dict[str, list[Row]] = {}
    for row in rows:
        label = row["lang"] if len(domains[row["lang"]]) == 1 else f"{row['lang']} {row['domain']}"
        texts.setdefault(label, []).append(row)
    return texts


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _finish(figure, panels, path: Path) -> None:
    for axes in panels if hasattr(panels, "__iter__") else [panels]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    _pyplot().close(figure)
