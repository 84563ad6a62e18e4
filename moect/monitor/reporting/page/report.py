"""report.md and report.html: what a run was and what it did to its languages, from what lies in its folder."""

from __future__ import annotations

import re
from pathlib import Path

from moect.errors import ConfigError
from moect.monitor.reporting.names import isolated
from moect.monitor.reporting.page import answers, course, measured
from moect.monitor.reporting.page.content import Report
from moect.monitor.reporting.page.html import to_html
from moect.monitor.reporting.page.markdown import to_markdown
from moect.monitor.reporting.page.opening import opening
from moect.monitor.reporting.page.routing import routing
from moect.monitor.reporting.run_files import RunFiles, read_log, read_run
from moect.monitor.rows import write_atomically

__all__ = ["make_report", "read_log", "write_report"]


def write_report(run_folder: Path) -> list[Path]:
    """Write report.html, report.md and plots/*.png of a run, from its config.yaml, plan.json, log.jsonl and monitor/.

    Args:
        run_folder: the run's folder; the run need not be finished.

    Returns:
        The paths of report.html and report.md, which say the same. The first is one file, to be sent.

    Raises:
        ConfigError: it is no run's folder, or cannot be written.
        DataError: a file of its monitor is damaged.
    """
    run = read_run(Path(run_folder))
    page, text = run.folder / "report.html", run.folder / "report.md"
    try:
        report = make_report(run, run.folder / "plots")
        write_atomically(page, _writable(to_html(report)))
        write_atomically(text, _writable(to_markdown(report, run.folder)))
    except OSError as error:
        raise ConfigError(f"{run.folder}: cannot be written ({error.strerror or error}); check permissions") from error
    return [page, text]


def _writable(text: str) -> str:
    """Halves of a pair of surrogates, which a model may write and JSON can hold, are no text."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def make_report(run: RunFiles, plots: Path) -> Report:
    """The report, its pictures drawn into the folder `plots`. Sections that would have nothing to say are left out."""
    m = measured.measured(run, plots)
    verdict, tone, first = opening(run, m)
    parts = [measured.apart(run)]
    if m:
        makers = (measured.checkpoints, measured.exactness, answers.tasks, routing, answers.samples)
        below = [make(m) for make in makers]
        parts = [measured.languages(m), *parts, measured.names(m), *below]  # the names when all plots are made
    parts += [course.actions(run), course.training(run, plots), course.mixture(run), course.facts(run)]
    parts += [course.commands(run), course.definitions()]
    step = course.steps_done(run)
    subtitle = f"{run.config.method} on {run.config.model.base or 'a base made from scratch'}, step {step:,}"
    return Report(f"Run {isolated(run.config.name)}", subtitle, verdict, tone, first, [part for part in parts if part])
