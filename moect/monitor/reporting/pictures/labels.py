"""How a text is called and coloured in every plot of a report.

Plots are drawn with the one font that comes with matplotlib, so that they look alike on every machine. A label with a
character which that font lacks would turn into boxes; it gives way to a name that it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from moect.monitor.reporting.names import isolated, plain
from moect.monitor.rows import Row

# Okabe and Ito's palette for the colour-blind, without its yellow, which vanishes on white; wine and black added
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#882255", "#E69F00", "#333333")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
LINES = ("-", "--", ":", "-.")
LONGEST = 18  # characters of a label


@dataclass(frozen=True)
class Style:
    """Of a line: colour and marker of its language, dashes of its domain."""

    colour: str
    marker: str
    line: str


class Labels:
    """Labels and styles of texts, from all rows of a run, so that they are the same in each plot.

    Attributes:
        replaced: by the label that plots show, the one for which it stands.
    """

    def __init__(self, rows: list[Row]):
        texts = list(dict.fromkeys((r["role"] == "new", r["lang"], r["domain"]) for r in rows))
        texts.sort(key=lambda text: text[0])  # old first, each role in the order of the configuration
        self._langs = list(dict.fromkeys(lang for _, lang, _ in texts))
        self._domains = list(dict.fromkeys(domain for *_, domain in texts))
        several = {lang for lang in self._langs if len({t[2] for t in texts if t[1] == lang}) > 1}
        parts = {(lang, domain): (lang, domain) if lang in several else (lang,) for _, lang, domain in texts}
        self._written = {text: " ".join(map(isolated, names)) for text, names in parts.items()}
        self.replaced: dict[str, str] = {}
        shown = self.shown([plain(" ".join(names)) for names in parts.values()], "text")
        self._shown = dict(zip(parts, shown, strict=True))

    def of(self, row: Row) -> str:
        """A text's label in a plot."""
        return self._shown[row["lang"], row["domain"]]

    def written(self, row: Row) -> str:
        """A text's label on the page, in sentences too: its language, and its domain where the language has several."""
        return self._written[row["lang"], row["domain"]]

    def shown(self, names: list[str], kind: str) -> list[str]:
        """Labels for names; see `labels_for`. Which stands for which is kept."""
        labels = labels_for(names, kind)
        pairs = zip(labels, names, strict=True)
        self.replaced |= {label: name for label, name in pairs if label != shortened(plain(name))}
        return labels

    def style(self, row: Row) -> Style:
        """A text's line: 64 languages differ in colour or marker."""
        number, domain = self._langs.index(row["lang"]), self._domains.index(row["domain"])
        n_colours, n_markers = len(COLOURS), len(MARKERS)
        marker = MARKERS[(number + number // n_colours) % n_markers]
        return Style(COLOURS[number % n_colours], marker, LINES[domain % len(LINES)])


def labels_for(names: list[str], kind: str) -> list[str]:
    """Names as plots can show them, shortened where they are long; `kind` and a number in place of one that their font
    cannot write, or that would look like another.

    Args:
        names: one of each, in an order that stays: it gives the numbers.
        kind: what they are names of.
    """
    short = [shortened(name) if drawable(name) else "" for name in map(plain, names)]
    return [label if label and short.count(label) == 1 else f"{kind} {number}" for number, label in enumerate(short, 1)]


def drawable(label: str) -> bool:
    """Whether the plots' font has all the characters of a label."""
    return bool(label.strip()) and all(ord(character) in _characters() for character in label)


def shortened(label: str) -> str:
    """The label, its middle left out where it is long."""
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[:half]}…{label[-half + 1 :]}"


@cache
def _characters() -> frozenset[int]:
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf").get_charmap())
