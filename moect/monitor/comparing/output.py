"""A comparison as a file: a plot, tables, or figures."""

from __future__ import annotations

import json
import os
from pathlib import Path

from moect.errors import ConfigError
from moect.monitor.comparing.comparison import Comparison
from moect.monitor.comparing.plot import plot
from moect.monitor.comparing.table import render

OUTPUTS = (".png", ".md", ".json")


def write(comparison: Comparison, path: Path) -> Path:
    """Write the plot (.png), the tables (.md) or all figures (.json); never over a file.

    Raises:
        ConfigError: another ending, a file that exists, or a place that cannot be written.
    """
    path = check_output(path)
    part = path.with_name(f".{path.name}.part{path.suffix}")  # matplotlib goes by the ending
    try:
        if path.suffix == ".png":
            plot(comparison, part)
        else:
            as_json = path.suffix == ".json"
            figures = comparison.as_dict() if as_json else None
            text = json.dumps(figures, indent=1, ensure_ascii=False) if as_json else render(comparison, markdown=True)
            part.write_text(text + "\n", encoding="utf-8")
        path.open("x").close()  # it may have come to be meanwhile
        os.replace(part, path)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise ConfigError(
            f"--output {path}: cannot be written: {error.strerror or error}; give another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def check_output(path: Path) -> Path:
    """Refuse, before anything is read, a file that `write` could not write.

    Raises:
        ConfigError: another ending, a file that exists, or no folder for it.
    """
    path = Path(path)
    if path.suffix not in OUTPUTS:
        raise ConfigError(f"--output {path}: give a name that ends in {', '.join(OUTPUTS)}")
    if path.exists():
        raise _exists(path)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.absolute().parent}; make it first")
    return path


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"--output {path}: the file exists and is not overwritten; give another name")
