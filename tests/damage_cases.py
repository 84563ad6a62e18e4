"""How files are damaged in tests: by hypothesis, which finds the smallest damage that does harm.

MOECT_DAMAGE gives the number of examples a test; without it there are a few, the same at every run.
"""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

COUNT = os.environ.get("MOECT_DAMAGE")


def examples(few: int):
    """Settings for a test: so many examples, or as many as MOECT_DAMAGE says. Nothing depends on time."""
    return settings(
        max_examples=int(COUNT) if COUNT else few,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Damage:
    """Something done to one file."""

    how: str
    where: float  # in the file, as a share of its length
    much: float  # of what is left of it, as a share
    bit: int

    def do(self, path: Path) -> None:
        """Change the file. What is there afterwards differs from what was."""
        before = path.read_bytes()
        at = min(int(self.where * len(before)), len(before) - 1)
        length = max(1, int(self.much * (len(before) - at)))
        if self.how == "flip":
            content = before[:at] + bytes([before[at] ^ (1 << self.bit)]) + before[at + 1 :]
        elif self.how == "truncate":
            content = before[:at]
        elif self.how == "zero":
            content = before[:at] + bytes(length) + before[at + length :]
        elif self.how == "insert":
            content = before[:at] + b"\0" * (1 + self.bit) + before[at:]
        elif self.how == "append":
            content = before + before[at : at + length]
        elif self.how == "repeat":
            content = before[:at] + before[at : at + length] + before[at:]
        elif self.how == "empty":
            content = b""
        else:
            path.unlink()
            if self.how == "folder":
                path.mkdir()
            elif self.how == "dangling":
                path.symlink_to(path.with_name("nothing"))
            return
        if content == before:  # zeros that were zeros
            content = before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :]
        path.write_bytes(content)


def damages(*hows: str) -> st.SearchStrategy[Damage]:
    """Damage of these kinds; all kinds, where none is named."""
    kinds = hows or ("flip", "truncate", "zero", "insert", "append", "repeat", "empty", "missing", "folder", "dangling")
    share = st.floats(0, 1, exclude_max=True)
    return st.builds(Damage, st.sampled_from(kinds), share, share, st.integers(0, 7))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30, 1e308, -1e-320, float("nan"), float("inf"), -float("inf")]),
    st.floats(),
    st.sampled_from(["", "auto", "7", "../..", "a\0b", "\ud800", "1e3", "null", "step-1", "/etc", "~", "é" * 300]),
    st.text(max_size=8),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(-3, 3), max_size=2),
    st.just([[[[[[[[]]]]]]]]),
)


@st.composite
def mutated(draw, values: Any, most: int = 2):
    """Plain values with one or a few of them replaced, dropped, doubled or added, anywhere in the tree."""
    values = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, most))):
        spots = list(_spots(values))
        if not spots:
            break
        parent, key = draw(st.sampled_from(spots))
        how = draw(st.sampled_from(("replace", "replace", "replace", "drop", "rename", "swap", "text")))
        if how == "drop":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = parent.pop(key)
        elif how == "swap":
            other, place = draw(st.sampled_from(spots))
            if _has(other, place):
                parent[key] = copy.deepcopy(other[place])
        elif how == "text":
            parent[key] = str(parent[key])[:60]
        else:
            parent[key] = draw(ODD)
    return values


def _spots(values: Any):
    """(mapping or list, key or index) of everything in the tree."""
    keys = values.keys() if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in list(keys):
        yield values, key
        yield from _spots(values[key])


def _has(parent, key) -> bool:
    return key in parent if isinstance(parent, dict) else isinstance(key, int) and key < len(parent)


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy in place of whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))
