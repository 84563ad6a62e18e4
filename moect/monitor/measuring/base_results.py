"""What the base makes of the held-out texts and tasks: measured once, kept with the run and beside all runs.

RUN/monitor/base.json and OUTPUT/.cache/base-results/KEY.json hold the same. The key is a digest of all that the numbers
depend on, so that several runs on one base measure it once, and a resumed run, whose model is not the base any more,
compares with the same numbers.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from moect.monitor.measuring.measures import bits_per_byte
from moect.monitor.measuring.score import Score
from moect.monitor.rows import write_atomically
from moect.monitor.tasks.tasks import TaskResult

log = logging.getLogger("moect.monitor")


@dataclass
class Measurement:
    """A text under one model, document by document.

    Attributes:
        nll: nats.
        n_bytes: UTF-8 bytes that were scored.
        exact: whether greedy decoding gives the answer; None for a document without one.
    """

    nll: list[float]
    n_bytes: list[int]
    exact: list[bool | None]

    @classmethod
    def of(cls, scores: list[Score]) -> Measurement:
        """From the scores of the text's documents."""
        return cls([s.nll for s in scores], [s.n_bytes for s in scores], [s.exact for s in scores])

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy of the whole text in bits per UTF-8 byte."""
        return bits_per_byte(float(np.sum(self.nll)), sum(self.n_bytes))

    @property
    def exact_match(self) -> float | None:
        """Share of answers that greedy decoding gives; None where there are none."""
        answered = [e for e in self.exact if e is not None]
        return sum(answered) / len(answered) if answered else None


@dataclass
class BaseResults:
    """All of it.

    Attributes:
        texts: in the order of the configuration.
        tasks: likewise.
        samples: continuations of the prompts.
    """

    texts: list[Measurement]
    tasks: list[TaskResult] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


def read_base(key: str, paths: tuple[Path, ...], tell: bool = True) -> BaseResults | None:
    """The results kept under this key in the first of the files that has them; None: they must be measured."""
    faults = []
    for path in filter(Path.exists, paths):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["key"] == key:
                return BaseResults(
                    [Measurement(**m) for m in values["texts"]],
                    [TaskResult(**t) for t in values["tasks"]],
                    values["samples"],
                )
            why = "of another base, tokenizer, text or setting"
        except (OSError, ValueError, TypeError, KeyError):
            why = "damaged"
        faults.append((path, why))
    for fault in faults if tell else ():
        log.warning("%s: is %s; the base is measured again", *fault)
    return None


def write_base(key: str, results: BaseResults, paths: tuple[Path, ...]) -> None:
    """Keep results under a key in each of the files."""
    text = json.dumps({"key": key, **asdict(results)}) + "\n"
    for path in paths:
        write_atomically(path, text)
