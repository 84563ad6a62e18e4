"""The sections of a report about what base and model answer and write: tasks, samples."""

from __future__ import annotations

from moect.monitor.reporting.figures import MINUS
from moect.monitor.reporting.names import isolated
from moect.monitor.reporting.page.content import Block, Picture, Sample, Section, Table, Text, compact
from moect.monitor.reporting.page.measured import Measured
from moect.monitor.reporting.pictures.plots import plot_tasks

SHARES = ("acc", "exact_match", "em", "f1", "mc1", "mc2")  # measures between 0 and 1, `acc_norm` and the like too
LONGEST_SAMPLE = 600  # characters


def tasks(m: Measured) -> Section | None:
    """lm-eval's tasks at the last checkpoint that has them."""
    if not m.run.tasks:
        return None
    step = m.run.tasks[-1]["step"]
    here = [t for t in m.run.tasks if t["step"] == step]
    lines = []
    for t in here:
        form = _task_form(t)
        lines.append(
            [
                isolated(t["task"]),
                isolated(t["lang"]),
                _with_error(t.get("difference"), t.get("difference_stderr"), form, sign=True),
                _with_error(t.get("base_value"), t.get("base_stderr"), form),
                _with_error(t.get("value"), t.get("stderr"), form),
                f"{t['questions']:,}" if t.get("questions") is not None else "",
                t.get("metric") or "",
                t.get("role") or "",
            ]
        )
    heads = ["task", "language", "difference", "base", "model", "questions", "measure", "role"]
    blocks: list[Block] = [compact(Table(heads, lines, 2))]
    shares = [t for t in here if _is_share(t) and None not in (t.get("value"), t.get("base_value"))]
    if shares:
        path = plot_tasks(shares, m.labels, m.plots / "tasks.png")
        alt = f"Value of each task under base and model at step {step:,}."
        blocks.append(Picture(path, alt, "Lines through the model's points are two standard errors to each side."))
    said = "± is one standard error. A difference within two of them says little."
    return Section("tasks", f"Tasks at step {step:,}", [Text(said), *blocks])


def samples(m: Measured) -> Section | None:
    """How base and model go on from the beginnings of documents; new languages first."""
    if not m.run.samples:
        return None
    step = m.run.samples[-1]["step"]
    here = sorted((s for s in m.run.samples if s["step"] == step), key=lambda s: s.get("role") != "new")
    blocks = [
        Sample(
            " · ".join(isolated(str(s[key])) for key in ("lang", "role", "domain") if s.get(key)),
            s["lang"],
            *(_short(s.get(key) or "", end=key == "prompt") for key in ("prompt", "reference", "base", "model")),
        )
        for s in here
    ]
    said = Text("Beginnings of held-out documents, how they really go on, and what base and model write, greedily.")
    return Section("samples", f"Samples at step {step:,}", [said, *blocks])


def _is_share(task: dict) -> bool:
    name = str(task.get("metric", "")).split(",")[0]  # without the filter
    return name in SHARES or name.startswith(tuple(f"{share}_" for share in SHARES))


def _task_form(task: dict) -> tuple[float, str]:
    return (100.0, "%") if _is_share(task) else (1.0, "")


def _with_error(value: float | None, error: float | None, form: tuple[float, str], sign: bool = False) -> str:
    if value is None:
        return ""
    scale, unit = form
    digits = 1 if unit else 3
    text = f"{scale * value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)
    text = text if float(text.replace(MINUS, "-")) else f"{0:.{digits}f}"
    return text + unit if error is None else f"{text} ± {scale * error:.{digits}f}{unit}"


def _short(text: str, end: bool) -> str:
    """The last characters of a prompt, the first of what follows it."""
    if len(text) <= LONGEST_SAMPLE:
        return text
    return f"… {text[-LONGEST_SAMPLE:]}" if end else f"{text[:LONGEST_SAMPLE]} …"
