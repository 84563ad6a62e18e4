"""A report as one HTML file: pictures inside, no script, nothing fetched."""

from __future__ import annotations

import re
from base64 import b64encode
from pathlib import Path

from moect.monitor.reporting.page.content import Block, Picture, Report

TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: Report) -> str:
    """The page. jinja2 escapes every text in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"data_uri": _data_uri, "language_tag": language_tag, "size": _size, "two_lines": two_lines}
    environment.tests["block"] = _is_block
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(report=report, style=style)


def language_tag(lang: str) -> str:
    """A name of a language as an HTML `lang`: BCP 47 where it looks like that (`swh_Latn` becomes `swh-Latn`), else
    `und`, undetermined."""
    tag = lang.replace("_", "-")
    return tag if re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*", tag) else "und"


def two_lines(head: str) -> list[str]:
    """A column's head, on two lines of about the same length where it is long."""
    cuts = [i for i, character in enumerate(head) if character == " "]
    if len(head) < 12 or not cuts:
        return [head]
    cut = min(cuts, key=lambda i: abs(len(head) - 1 - 2 * i))
    return [head[:cut], head[cut + 1 :]]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + b64encode(path.read_bytes()).decode("ascii")


def _size(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels, from the PNG's header: the page does not jump while it loads."""
    header = picture.path.read_bytes()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


def _is_block(block: Block, name: str) -> bool:
    return type(block).__name__ == name
