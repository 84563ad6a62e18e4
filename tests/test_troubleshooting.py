"""docs/troubleshooting.md and docs/operations.md quote what the code says: each message is looked for in the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
FOREIGN = "## Messages of PyTorch and DeepSpeed"


def quoted(page: str) -> list[str]:
    """The messages of the tables that precede the section about libraries."""
    return re.findall(r"(?m)^\| `([^`]+)` \|", page.partition(FOREIGN)[0])


def shown(page: str) -> list[str]:
    """What a page shows of a screen: the lines of its blocks of text."""
    blocks = re.findall(r"(?ms)^```text\n(.*?)^```", page)
    return [line for block in blocks for line in block.splitlines()]


def fixed_texts() -> list[str]:
    """Every string of the package, without docstrings: adjacent ones joined, `…` for what an f-string fills in."""
    texts = []
    for path in sorted((ROOT / "moect").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[a-z]", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(parts))
    return [text.replace("`", "") for text in texts]


TEXTS = fixed_texts()


def is_said(message: str) -> bool:
    """Whether one string of the source has all fixed parts of a message, in their order."""
    parts = [part.strip() for part in message.replace("`", "").split("…")]
    pattern = re.compile(".*".join(re.escape(part) for part in parts if part), re.S)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", quoted(PAGE))
def test_the_code_says_what_the_page_quotes(message):
    assert is_said(message), f"no string in moect/ reads {message!r}"


@pytest.mark.parametrize("message", quoted(OPERATIONS))
def test_the_code_says_what_the_runbook_quotes(message):
    assert is_said(message), f"no string in moect/ reads {message!r}"


def could_say(line: str) -> bool:
    """Whether some string of the source, filled in, is part of a line; one with sixteen letters of its own."""
    line = line.replace("`", "").removesuffix("…").strip()
    for text in TEXTS:
        parts = [part for part in text.split("…") if part]
        if sum(map(len, parts)) >= 16:
            whole = ".*".join(map(re.escape, parts))
            if re.search(whole, line) or (line.endswith(";") and _begins(parts, line)):
                return True
    return False


def _begins(parts: list[str], line: str) -> bool:
    """Whether the parts up to somewhere are in a line that was cut off after a semicolon."""
    said = "".join(parts).split(";")[0] + ";"
    return len(said) >= 40 and re.search(re.escape(parts[0].strip()), line) is not None


@pytest.mark.parametrize("line", shown(OPERATIONS))
def test_the_code_could_say_what_the_runbook_shows(line):
    assert could_say(line), f"no string in moect/ gives {line!r}"


def test_lines_that_nobody_says_are_found_out():
    assert len(shown(OPERATIONS)) >= 8 and not could_say(
        "runs/extend: the frozen base is as it was, in memory and on disk"
    )


def test_the_page_quotes_enough_to_be_worth_a_check():
    assert len(quoted(PAGE)) >= 25 and len(set(quoted(PAGE))) == len(quoted(PAGE))
    assert all(max(map(len, message.split("…"))) >= 12 for message in quoted(PAGE)), "a quote says nothing"


@pytest.mark.parametrize(
    "message",
    [
        "train.batch_size … is no multiple of train.micro_batch x rank = …",
        "gives token …, a model has",
        "no such words",
    ],
)
def test_a_message_that_nobody_says_is_found_out(message):
    assert not is_said(message)
