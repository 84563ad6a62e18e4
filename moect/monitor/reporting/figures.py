"""Numbers that a report derives from the monitor's rows, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moect.monitor.measuring.exactness import wilson
from moect.monitor.rows import Row

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Identical:
    """How many documents and tokens have the base's logits, bit for bit.

    Attributes:
        documents, identical_documents, tokens, identical_tokens: counts.
        low, high: 95% interval of the share of documents.
    """

    documents: int
    identical_documents: int
    tokens: int
    identical_tokens: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Of documents."""
        return self.identical_documents / self.documents

    @property
    def token_share(self) -> float:
        """Of tokens."""
        return self.identical_tokens / self.tokens if self.tokens else 0.0


def identical(rows: list[Row]) -> Identical | None:
    """Over several texts of one step together; None: nothing was compared."""
    compared = [row["exact"] for row in rows if row.get("exact")]
    counts = ("documents", "identical_documents", "tokens", "identical_tokens")
    documents, same, tokens, same_tokens = (sum(e.get(key, 0) for e in compared) for key in counts)
    if not documents:
        return None
    interval = wilson(same, documents)
    if len(compared) == 1 and "low" in compared[0]:
        interval = compared[0]["low"], compared[0]["high"]
    return Identical(documents, same, tokens, same_tokens, *interval)


def change(row: Row) -> float | None:
    """What became of a text, as a share of the base's bits per byte: of an old one what was lost (below 0: it got
    better), of a new one what was gained. None where the base needs no bits at all and the model does."""
    base, lost = row["base_bits_per_byte"], row["delta"]
    if not base:
        return None if lost else 0.0
    if row["role"] == "new":
        return row["gain"] if row.get("gain") is not None else -lost / base
    return lost / base


def changes(rows: list[Row]) -> list[float]:
    """`change` of each row that has one."""
    return [share for row in rows if (share := change(row)) is not None]


def worst(rows: list[Row]) -> Row | None:
    """The old text that lost most; before all others one of which the base knew every byte and the model does not."""
    return max(role(rows, "old"), key=lambda row: math.inf if (share := change(row)) is None else share, default=None)


def change_interval(row: Row) -> tuple[float, float] | None:
    """The 95% interval of `change`; None: there is none."""
    if row["role"] == "new":
        low, high = row.get("gain_low"), row.get("gain_high")
        return None if low is None or high is None else (low, high)
    low, high = row.get("retention_low"), row.get("retention_high")
    # what is lost is model / base - 1, and retention base / model
    return (1 / high - 1, 1 / low - 1) if low and high else None


def mean(values: list[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def at_step(rows: list[Row], step: int) -> list[Row]:
    """The rows of a step."""
    return [row for row in rows if row["step"] == step]


def aim(row: Row) -> str:
    """What is wanted of a text: `new` to learn it, `old` to keep it, also where an earlier run learned it."""
    return "new" if row["role"] == "new" else "old"


def role(rows: list[Row], name: str) -> list[Row]:
    """The rows of which this is wanted."""
    return [row for row in rows if aim(row) == name]


def signed(share: float | None, digits: int = 2) -> str:
    """A share in percent with its sign, a true minus; empty for None, no sign where it rounds to nothing."""
    if share is None:
        return ""
    text = f"{abs(100 * share):.{digits}f}"
    if not float(text):
        return f"{text}%"
    return f"{'+' if share > 0 else MINUS}{text}%"


def change_text(row: Row) -> str:
    """`change` of a row in percent, in words where there is none."""
    return signed(change(row)) or "not known"


def share_text(share: float | None, digits: int = 1) -> str:
    """A share in percent; never rounded to all or nothing when it is not."""
    if share is None:
        return ""
    text = f"{100 * share:.{digits}f}"
    least = 10.0**-digits
    if share < 1 and float(text) == 100:
        return f">{100 - least:.{digits}f}%"
    if share > 0 and float(text) == 0:
        return f"<{least:.{digits}f}%"
    return f"{text}%"


def bound_text(share: float, digits: int = 2) -> str:
    """A share in percent that nothing it bounds is above: rounded up."""
    scale = 10**digits
    return f"{math.ceil(100 * share * scale - 1e-9) / scale:.{digits}f}%"  # 0.29% stays 0.29%, whatever its last bit


def between(interval: tuple[float, float] | None, digits: int = 2, sign: bool = True) -> str:
    """An interval as text; empty for None."""
    if interval is None:
        return ""
    low, high = (signed(x, digits) if sign else f"{100 * x:.{digits}f}%" for x in interval)
    return f"{low.removesuffix('%')} to {high}"
