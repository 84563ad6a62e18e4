"""A run in figures, read from its folder alone: what it learned, what it lost, what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moect.config import RunConfig
from moect.errors import DataError
from moect.monitor.reporting.figures import change, changes, identical, mean, role, worst
from moect.monitor.reporting.run_files import read_run
from moect.monitor.rows import FILE_NAME, Row
from moect.monitor.verdict import best, judge, verdicts

Key = tuple[str, str]  # language and domain of a text


@dataclass
class RunSummary:
    """One checkpoint of a run, and the run's cost.

    Attributes:
        name: of its folder.
        folder: of the run.
        config: of the run.
        step: of the checkpoint that is shown.
        choice: why that one: `best` of those within the budget, `last`, or `none within` or `none whole` (no step was
            measured on all texts), and so the last.
        rows: of that step, by text.
        within: whether no old language lost more than it may; None: there is no limit.
        measured_until, trained_until: the last step that was measured, and the last that was trained.
        tokens: that its weights are made of; text that a rollback undid does not count.
        tokens_undone: by rollbacks.
        has_new: whether new languages were measured, so that the best checkpoint is the one with the greatest gain.
        trainable: parameters; None: there is no plan.json.
        tokens_per_second: median over the lines of the log; None: none says it.
        peak_memory: bytes, the greatest of any rank and any moment that was measured; None: it was not.
        planned_memory: bytes a rank, as estimated; None: there is no plan.json.
    """

    name: str
    folder: Path
    config: RunConfig
    step: int
    choice: str
    rows: dict[Key, Row]
    within: bool | None
    measured_until: int
    trained_until: int
    tokens: int
    tokens_undone: int
    has_new: bool
    trainable: int | None
    tokens_per_second: float | None
    peak_memory: int | None
    planned_memory: int | None


def summarise(folder: Path, last: bool = False) -> RunSummary:
    """Read a run's config.yaml, plan.json, log.jsonl and monitor/.

    Args:
        folder: the run's; it need not be finished.
        last: show the last checkpoint that was measured; else the best within the budget, and the last if there is
            none.

    Raises:
        ConfigError: it is no run's folder, or cannot be read.
        DataError: nothing was measured, or the measurements are damaged.
    """
    folder = Path(folder)
    run = read_run(folder)
    config, rows, plan = run.config, run.rows, run.plan
    if not rows:
        raise DataError(f"{folder}: has no measurements (monitor/{FILE_NAME}); give runs that the monitor has measured")
    step, choice = rows[-1]["step"], "last"
    if not last and step:  # a run that has measured nothing but its beginning has no checkpoint to choose
        chosen = best(rows, config)
        none = "none within" if any(verdict.step for verdict in verdicts(rows, config)) else "none whole"
        step, choice = (chosen.step, "best") if chosen else (step, none)
    shown = [row for row in rows if row["step"] == step]
    peaks = [event["peak_memory"] for event in run.log.events("checkpoint") if event.get("peak_memory")]
    trained = max((e["step"] for e in (*run.log.figures, *run.log.events("checkpoint"))), default=0)
    tokens_per_step = config.train.batch_size * config.data.sequence_length
    limited = config.monitor.max_forgetting is not None and config.model.base is not None
    return RunSummary(
        name=folder.absolute().name,
        folder=folder,
        config=config,
        step=step,
        choice=choice,
        rows={(row["lang"], row["domain"]): row for row in shown},
        within=judge(shown, config).within if limited else None,
        measured_until=rows[-1]["step"],
        trained_until=max(trained, rows[-1]["step"]),
        tokens=step * tokens_per_step,
        tokens_undone=run.log.steps_undone * tokens_per_step,
        has_new=bool(role(rows, "new")),
        trainable=plan.get("parameters", {}).get("trainable"),
        tokens_per_second=run.log.median_speed,
        peak_memory=max(peaks, default=None),
        planned_memory=sum(plan["memory_per_rank"].values()) if "memory_per_rank" in plan else None,
    )


@dataclass
class Figures:
    """What a run did to the texts that are compared. Shares, 1 being all; None where there are no such texts.

    Attributes:
        gain: of new texts, 1 - bits per byte of the model / of the base; mean.
        loss: of old texts, bits per byte of the model / of the base - 1; mean.
        worst: the greatest loss of an old text.
        worst_text: which text that is.
        retention: of old texts, bits per byte of the base / of the model; mean.
        identical: share of the old documents whose logits are all the base's, bit for bit; None: not compared.
        identical_low, identical_high: its 95% interval.
        exact_match_old, exact_match_new: share of exactly right greedy answers, mean over texts that have answers.
        changes: by language, the mean loss of an old one's texts, the mean gain of a new one's.
    """

    gain: float | None = None
    loss: float | None = None
    worst: float | None = None
    worst_text: str = ""
    retention: float | None = None
    identical: float | None = None
    identical_low: float | None = None
    identical_high: float | None = None
    exact_match_old: float | None = None
    exact_match_new: float | None = None
    changes: dict[str, float] = field(default_factory=dict)


def figures(rows: list[Row]) -> Figures:
    """The figures of some texts of one checkpoint."""
    old, new = role(rows, "old"), role(rows, "new")
    made = Figures(gain=mean(changes(new)), loss=mean(changes(old)))
    made.exact_match_old, made.exact_match_new = (
        mean([row["exact_match"] for row in members if row.get("exact_match") is not None]) for members in (old, new)
    )
    for lang in dict.fromkeys(row["lang"] for row in rows):
        made.changes[lang] = mean([change(row) for row in rows if row["lang"] == lang])
    if not old:
        return made
    furthest = worst(old)
    made.worst, made.worst_text = change(furthest), f"{furthest['lang']} {furthest['domain']}"
    made.retention = mean([row["retention"] for row in old if row.get("retention") is not None])
    if compared := identical(old):
        made.identical, made.identical_low, made.identical_high = compared.share, compared.low, compared.high
    return made
