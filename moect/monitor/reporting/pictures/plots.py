"""Plots of training, tasks, answers and exactness, as PNG files."""

from __future__ import annotations

from pathlib import Path

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


def plot_loss(records: list[dict], marks: list[tuple[int, str]], path: Path) -> Path:
    """Training loss by step.

    Args:
        records: lines of log.jsonl that have `step` and `loss`.
        marks: (step, word) of actions to point out.
        path: the PNG to write.
    """
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(WIDTH, 2.5), layout="constrained")
        steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
        axes.plot(steps, losses, linewidth=0.9, color=ACCENT, alpha=0.45, marker="o" if len(steps) == 1 else None)
        width = max(1, len(losses) // 30)
        if width > 1:
            axes.plot(steps, _smooth(losses, width), linewidth=1.8, color=ACCENT)
        for step, word in marks:
            axes.axvline(step, color=BAD, linewidth=1, linestyle=(0, (5, 4)))
            axes.annotate(
                word,
                (step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                color=BAD,
                fontsize=8,
            )
        axes.set(title="Training loss", ylabel="cross-entropy, nats per token")
        by_step(plt, axes)
        return save(plt, figure, path)


def plot_answers(rows: list[Row], labels: Labels, path: Path) -> Path:
    """Exact match of base and model at one checkpoint, a pair of points a text."""
    pairs = [(labels.of(r), 100 * r["base_exact_match"], 100 * r["exact_match"], None) for r in rows]
    return _plot_pairs(pairs, "Exact answers", "prompts answered exactly, %", path)


def plot_tasks(tasks: list[dict], labels: Labels, path: Path) -> Path:
    """Base and model on each task at one checkpoint, with two standard errors of the model's value."""
    names, langs = (list(dict.fromkeys(t[key] for t in tasks)) for key in ("task", "lang"))
    name_of = dict(zip(names, labels.shown(names, "task"), strict=True))
    langs = [lang for lang in langs if any(t["lang"] == lang and lang not in t["task"] for t in tasks)]
    lang_of = dict(zip(langs, labels.shown(langs, "language"), strict=True))
    pairs = []
    for t in tasks:
        several = sum(other["task"] == t["task"] for other in tasks) > 1
        parts = [] if t["lang"] in t["task"] else [lang_of[t["lang"]]]
        parts += [name_of[t["task"]], *([t["metric"]] if several else [])]
        error = 100 * t["stderr"] if t.get("stderr") is not None else None
        pairs.append((" ".join(parts), 100 * t["base_value"], 100 * t["value"], error))
    return _plot_pairs(pairs, "Tasks", "value of the task's measure, %", path)


def plot_exactness(rows: list[Row], last: int, labels: Labels, path: Path) -> Path:
    """Share of documents whose logits are the base's bit for bit: by step, and at the last by length of document."""
    compared = [row for row in rows if row.get("exact")]
    texts: dict[tuple, list[Row]] = {}
    for row in compared:
        texts.setdefault((row["lang"], row["domain"]), []).append(row)
    steps = {row["step"] for row in compared}
    lengths = sorted({(c["from"], c["to"]) for r in compared if r["step"] == last for c in _classes(r)}, key=_first)
    kinds = [kind for kind, there in (("step", len(steps) > 1), ("length", len(lengths) > 1)) if there]
    with drawing() as plt:
        height = name_heights(len(texts), 2.2)
        figure, panels = plt.subplots(
            len(kinds) or 1, 1, figsize=(WIDTH, height * (len(kinds) or 1)), layout="constrained", squeeze=False
        )
        for kind, axes in zip(kinds or ["step"], panels[:, 0], strict=True):
            ends = []
            for points in texts.values():
                style = labels.style(points[0])
                drawn = {"marker": style.marker, "markersize": 4, "color": style.colour, "linewidth": 1.4}
                if kind == "step":
                    xs = [p["step"] for p in points]
                    ys = [100 * p["exact"]["identical_documents"] / p["exact"]["documents"] for p in points]
                else:
                    here = [c for p in points if p["step"] == last for c in _classes(p)]
                    xs = [lengths.index((c["from"], c["to"])) for c in here]
                    ys = [100 * c["identical_documents"] / c["documents"] for c in here]
                    low, high = (
                        [max(0.0, side * (100 * c[key] - y)) for c, y in zip(here, ys, strict=True)]
                        for key, side in (("low", -1), ("high", 1))
                    )
                    axes.errorbar(xs, ys, yerr=[low, high], fmt="none", ecolor=style.colour, alpha=0.35, linewidth=1.2)
                if xs:
                    axes.plot(xs, ys, style.line, **drawn)
                    ends.append((xs[-1], ys[-1], labels.of(points[0]), style.colour))
            low = axes.get_ylim()[0]
            axes.set_ylim(low if low > 0 else -3, 100 + 0.03 * (100 - max(low, 0)))
            axes.set_ylabel("documents, %")
            if kind == "step":
                axes.set_title("Bit-identical documents, by step")
                by_step(plt, axes)
            else:
                axes.set_title(f"Bit-identical documents at step {last:,}, by length")
                axes.set_xticks(range(len(lengths)), [_length(c) for c in lengths], fontsize=7)
                axes.set_xlabel("tokens of the document")
            name_ends(axes, ends)
        return save(plt, figure, path)


def _plot_pairs(pairs: list[tuple[str, float, float, float | None]], title: str, measure: str, path: Path) -> Path:
    """A line a label from the base's value to the model's, with two standard errors where there are some."""
    with drawing() as plt:
        figure, axes = plt.subplots(figsize=(WIDTH, 0.24 * len(pairs) + 1.1), layout="constrained")
        for place, (_, base, model, error) in enumerate(pairs):
            axes.plot([base, model], [place, place], color="#bbbbbb", linewidth=2.5, zorder=1)
            if error:
                axes.plot([model - 2 * error, model + 2 * error], [place, place], color=ACCENT, linewidth=1.1, zorder=2)
        places = range(len(pairs))
        axes.scatter([p[1] for p in pairs], places, s=34, facecolor="white", edgecolor=GREY, zorder=3, label="base")
        axes.scatter([p[2] for p in pairs], places, s=34, color=ACCENT, zorder=4, label="model")
        axes.set_yticks(places, [p[0] for p in pairs])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.set(xlabel=measure)
        axes.set_title(title)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
        return save(plt, figure, path)


def _classes(row: Row) -> list[dict]:
    return row["exact"].get("by_length") or []


def _first(length: tuple[int, int | None]) -> int:
    return length[0]


def _length(length: tuple[int, int | None]) -> str:
    first, last = length
    return f"{first:,}\non" if last is None else f"{first:,}\nto {last:,}"


def _smooth(values: list[float], width: int) -> list[float]:
    """The mean over so many values before and after each."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - width) : i + width + 1])]
