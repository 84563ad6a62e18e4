"""What the head of a configuration for a real model says about its cost, made anew: `python tests/plan_comments.py`
prints it, with `--write` it is put into the files."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path

from moect.cli import _parser
from moect.config import RunConfig
from moect.plan import render
from moect.stages import load_stages, plan_stages

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "tests" / "model_configs"  # the bases' config.json: their shapes, without weights and tokenizer
MARK = "# What it costs"
FIRST, LATER = ("parameters", "run", "memory a rank", "", "time"), ("run", "time")


def with_shapes(stages: list[RunConfig]) -> list[RunConfig]:
    """The same runs on the folders of SHAPES in place of hub names, and of bases that another run is to make."""
    earlier = {str(stage.folder / "export") for stage in stages}
    changed = []
    for stage in stages:
        if stage.model.base and stage.model.base not in earlier:
            known = SHAPES / stage.model.base.rpartition("/")[2].removesuffix("-Base")
            folder = known if known.exists() else SHAPES / "Qwen3-0.6B"
            stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, base=str(folder)))
        changed.append(stage)
    return changed


def expected(path: Path) -> list[str] | None:
    """The comment's lines: the rows of each stage's plan that tell its cost. None for a file that says nothing."""
    text = path.read_text(encoding="utf-8")
    if MARK not in text:
        return None
    arguments = _parser().parse_args(shlex.split(re.search(r"(?m)^# +moect (plan .*)$", text)[1]))
    stages = with_shapes(load_stages(path))
    lines = []
    for stage, plan in zip(stages, plan_stages(stages, arguments.ranks, arguments.gpu, arguments.mfu), strict=True):
        wanted = LATER if lines else FIRST
        rows = [
            row
            for row in render({**plan, "export": []}).partition("\n\n")[0].splitlines()
            if row[:14].strip() in wanted
        ]
        lines += [f"#     stage {stage.name}", *(f"#     {row}" for row in rows)]
    return lines


def found(path: Path) -> list[str]:
    """The comment's lines as the file has them."""
    below = path.read_text(encoding="utf-8").partition(MARK)[2].splitlines()[1:]
    return [line for line in below[: next(i for i, line in enumerate(below) if not line.startswith("#     "))]]


if __name__ == "__main__":
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if (lines := expected(path)) is None:
            continue
        print(path.relative_to(ROOT), *lines, sep="\n")
        if "--write" in sys.argv:
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("\n".join(found(path)), "\n".join(lines)), encoding="utf-8")
