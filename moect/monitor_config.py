"""What the forgetting monitor measures, and what it may do about it. Part of the run's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moect.data_config import KEPT, DataConfig
from moect.moe_config import option

STRICT = {"extra": "forbid"}
ANY = "*"  # in `max_forgetting`: every old language that is not named


@dataclass
class TaskConfig:
    """A task of lm-eval, measured on base and model at every checkpoint."""

    __pydantic_config__ = STRICT
    task: str = option("", "name of an lm-eval task, one of moect's own (docs/monitor.md), or a task's YAML file")
    lang: str = option("", "language that it is about")
    files: dict[str, str] = option(
        {},
        "by split, a JSON lines file (.gz too) in place of the task's dataset: `{test: eval/xcopa/sw.test.jsonl.gz}`",
    )
    shots: int | None = option(None, "examples before each question; null: as the task says")
    limit: int | None = option(None, "take the first so many questions")


@dataclass
class MonitorConfig:
    """The forgetting monitor, which runs before the first step and at every checkpoint."""

    __pydantic_config__ = STRICT
    enabled: bool = option(True, "measure at all")
    window: int | None = option(None, "tokens of context and target at once; null: data.sequence_length")
    stride: int | None = option(None, "tokens scored per window of a longer document; null: half a window")
    batch_size: int = option(16, "windows a rank scores at once")
    compare: int | None = option(
        200, "documents of each text on which the logits are held against the base's, the first so many; null: all"
    )
    resamples: int = option(1000, "bootstrap resamples of the documents behind each interval; 0: no intervals")
    samples: int = option(1, "documents of each text that base and model write on from their beginnings; 0: none")
    sample_tokens: int = option(48, "greatest number of tokens written on")
    tasks: list[TaskConfig] = option([], "tasks of lm-eval")
    max_forgetting: float | str | dict[str, float | str] | None = option(
        None,
        "what an old language may lose: a number is bits per byte, text like `1%` a share of the base's; one for all, "
        'or by language, `"*"` for those not named; null: no limit',
    )
    action: Literal["warn", "replay", "rollback", "stop"] = option(
        "warn",
        "what the trainer does when one loses more: say so; raise `data.replay`; go back to the best checkpoint within "
        "the limits, with more replay; or end the run",
    )
    replay_factor: float = option(2.0, "by which `replay` and `rollback` multiply the share of replay")
    max_replay: float = option(0.5, "the greatest share that they set")
    max_rollbacks: int = option(3, "after so many the run ends")


@dataclass(frozen=True)
class Limit:
    """What an old language may lose: bits per byte, or a share of the base's."""

    value: float
    relative: bool

    def bits(self, base_bits: float) -> float:
        """The limit in bits per byte, of a text for which the base needs `base_bits`."""
        return self.value * base_bits if self.relative else self.value

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.relative else f"{self.value:g} bits per byte"


def limit_of(config: MonitorConfig, lang: str) -> Limit | None:
    """The limit of an old language; None: there is none."""
    limits = config.max_forgetting
    if isinstance(limits, dict):
        limits = limits.get(lang, limits.get(ANY))
    return None if limits is None else _limit(limits)


def check_monitor(monitor: MonitorConfig, data: DataConfig) -> None:
    """What no single field can know.

    Raises:
        ValueError: something that cannot be meant, by its key.
    """
    for name in ("window", "stride", "batch_size", "compare", "sample_tokens"):
        value = getattr(monitor, name)
        least = 0 if name == "compare" else 1
        if value is not None and value < least:
            raise ValueError(f"`monitor.{name}` is {value}: it must be at least {least}")
    for name in ("resamples", "samples", "max_rollbacks"):
        if getattr(monitor, name) < 0:
            raise ValueError(f"`monitor.{name}` is {getattr(monitor, name)}: it cannot be negative")
    if not 1 < monitor.replay_factor < math.inf:
        raise ValueError(f"`monitor.replay_factor` is {monitor.replay_factor}: it must be above 1")
    if not 0 < monitor.max_replay < 1:
        raise ValueError(f"`monitor.max_replay` is {monitor.max_replay}: it must lie between 0 and 1")
    if monitor.tasks and not data.evaluation:
        raise ValueError("`monitor.tasks` are measured beside held-out text: add some to `data.evaluation`")
    for i, task in enumerate(monitor.tasks):
        _check_task(task, f"`monitor.tasks[{i}]`", data)
    _check_budget(monitor, data)


def _check_task(task: TaskConfig, where: str, data: DataConfig) -> None:
    if not task.task:
        raise ValueError(f"{where} needs `task`")
    if not task.lang:
        raise ValueError(f"{where} needs `lang`")
    if task.lang not in data.languages:
        raise ValueError(f"{where}: language `{task.lang}` has no role; add it to `data.languages`")
    for name, least in (("shots", 0), ("limit", 1)):
        value = getattr(task, name)
        if value is not None and value < least:
            raise ValueError(f"{where}: `{name}` is {value}, it must be at least {least}")


def _check_budget(monitor: MonitorConfig, data: DataConfig) -> None:
    limits = monitor.max_forgetting
    if limits is None or limits == {}:
        if monitor.action != "warn":
            raise ValueError(f"`monitor.action: {monitor.action}` has no limit to act on: set `monitor.max_forgetting`")
        return
    old = {lang for lang, role in data.languages.items() if role in KEPT}
    measured = {text.lang for text in data.evaluation}
    for lang, value in (limits if isinstance(limits, dict) else {ANY: limits}).items():
        _limit(value)
        if lang == ANY:
            continue
        if lang not in old:
            raise ValueError(f"`monitor.max_forgetting`: `{lang}` is no old or learnt language of `data.languages`")
        if lang not in measured:
            raise ValueError(f"`monitor.max_forgetting`: `{lang}` has no text in `data.evaluation` to measure it on")
    if not old & measured:
        raise ValueError("`monitor.max_forgetting` needs texts of old languages in `data.evaluation`")
    if monitor.action in ("replay", "rollback") and not data.replay:
        raise ValueError(f"`monitor.action: {monitor.action}` raises `data.replay`: set it above 0")


def _limit(value: float | str) -> Limit:
    try:
        relative = isinstance(value, str) and value.rstrip().endswith("%")
        number = float(value.rstrip().removesuffix("%")) / 100 if relative else float(value)
        if not 0 <= number < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"`monitor.max_forgetting` is {value!r}: give bits per byte, as 0.02, or a share of the base's, as 1%"
        ) from None
    return Limit(number, relative)
