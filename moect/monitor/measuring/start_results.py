"""What learnt languages are compared with: the model as it was when the run began.

RUN/monitor/start.json, by the key of a text's rows. A resumed run, whose model is not that one any more, compares with
the same numbers; `moect evaluate` does too, on the texts that the run measures.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from moect.monitor.measuring.base_results import Measurement
from moect.monitor.rows import write_atomically

FILE = "start.json"

log = logging.getLogger("moect.monitor")


def read_start(folder: Path) -> dict[str, Measurement]:
    """What was kept, by key; nothing where there is nothing, or where it is damaged, which is said."""
    path = Path(folder) / FILE
    try:
        return {key: Measurement(**values) for key, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s: cannot be read: %s", path, error)
        return {}


def write_start(folder: Path, start: dict[str, Measurement]) -> None:
    """Keep it."""
    write_atomically(Path(folder) / FILE, json.dumps({key: asdict(of) for key, of in start.items()}) + "\n")
