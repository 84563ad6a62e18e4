"""A run in figures, read from its folder alone: what it learned, what it lost, what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from moect.config import RunConfig
from moect.errors import DataError
from moect.monitor.reporting.figures import change, identical, mean, role
from moect.monitor.reporting.run_files import read_run
from moect.monitor.rows import FILE_NAME, Row
from moect.monitor.verdict import best, judge

Key = tuple[str, str]  # language and domain of a text


@dataclass
class RunSummary:
    """One checkpoint of a run, and the run's cost.

    Attributes:
        name: of its folder.
        folder: of the run.
        config: of the run.
        step: of the checkpoint that is shown.
        choice: why that one: `best` of those within the budget, `last`, or `none within`, and so the last.
        rows: of that step, by text.
        within: whether no old language lost more than it may; None: there is no limit.
        tokens: that it had trained on by then.
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
    tokens: int
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
        step, choice = (chosen.step, "best") if chosen else (step, "none within")
    shown = [row for row in rows if row["step"] == step]
    speeds = [line["tokens_per_second"] for line in run.log.figures if line.get("tokens_per_second")]
    peaks = [event["peak_memory"] for event in run.log.events("checkpoint") if event.get("peak_memory")]
    limited = config.monitor.max_forgetting is not None and config.model.base is not None
    return RunSummary(
        name=folder.absolute().name,
        folder=folder,
        config=config,
        step=step,
        choice=choice,
        rows={(row["lang"], row["domain"]): row for row in shown},
        within=judge(shown, config).within if limited else None,
        tokens=step * config.train.batch_size * config.data.sequence_length,
        trainable=plan.get("parameters", {}).get("trainable"),
        tokens_per_second=median(speeds) if speeds else None,
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
    made = Figures(gain=mean([change(row) for row in new]), loss=mean([change(row) for row in old]))
    made.exact_match_old, made.exact_match_new = (
        mean([row["exact_match"] for row in members if row.get("exact_match") is not None]) for members in (old, new)
    )
    for lang in dict.fromkeys(row["lang"] for row in rows):
        made.changes[lang] = mean([change(row) for row in rows if row["lang"] == lang])
    if not old:
        return made
    furthest = max(old, key=change)
    made.worst, made.worst_text = change(furthest), f"{furthest['lang']} {furthest['domain']}"
    made.retention = mean([row["retention"] for row in old])
    if compared := identical(old):
        made.identical, made.identical_low, made.identical_high = compared.share, compared.low, compared.high
    return made
