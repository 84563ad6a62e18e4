"""What an inspection found, as tables that a person reads."""

from __future__ import annotations

import textwrap
from collections import Counter

SHOWN = 3  # languages, or sources, in a cell
SUMMED = (
    *("documents", "bytes", "exact_copies", "exact_copy_bytes", "exact_copies_of_other_sources"),
    *("near_copies", "near_copy_bytes", "near_copies_of_other_sources", "holding_evaluation_text"),
)
JUDGED = ("other_language", "unsure")


def language_totals(sources: list[dict]) -> list[dict]:
    """The rows of sources, summed by language, in the order of their first."""
    totals: dict[str, dict] = {}
    for row in sources:
        total = totals.setdefault(row["lang"], {"lang": row["lang"], "role": row["role"], **dict.fromkeys(SUMMED, 0)})
        for name in SUMMED:
            total[name] += row[name]
        if row["others"] is None:  # a language that cannot be judged
            total |= dict.fromkeys((*JUDGED, "others"))
            continue
        for name in JUDGED:
            total[name] = total.get(name, 0) + row[name]
        total["others"] = dict((Counter(total.get("others", {})) + Counter(row["others"])).most_common())
    return list(totals.values())


def render(result: dict) -> str:
    """Tables by source, by language and by evaluation text, and what to know when reading them.

    Args:
        result: what `inspect_data` returns.
    """
    heading = ["documents", "MB", "exact copies", "near copies", "of others", "evaluation text", "other language"]
    parts = [
        _aligned(
            ["source", "language", *heading, ""], [[r["source"], r["lang"], *_cells(r)] for r in result["sources"]], 2
        )
    ]
    parts.append(
        _aligned(
            ["language", "role", *heading, ""], [[r["lang"], r["role"], *_cells(r)] for r in result["languages"]], 2
        )
    )
    if result["between"]:
        rows = [[r["source"], r["of"], f"{r['exact']:,}", f"{r['near']:,}"] for r in result["between"]]
        parts.append(_aligned(["copies in", "of", "exact", "near"], rows, 2))
    if result["evaluation"]:
        heading = ["evaluation text", "", "documents", "in training text", "mostly", ""]
        parts.append(_aligned(heading, [_evaluation_cells(r) for r in result["evaluation"]], 2))
    notes = (textwrap.fill(note, 118, subsequent_indent="    ") for note in _notes(result))
    return "\n\n".join([*parts, "\n".join(notes)])


def _cells(row: dict) -> list[str]:
    documents = row["documents"]
    elsewhere = row["exact_copies_of_other_sources"] + row["near_copies_of_other_sources"]
    numbers = [row["exact_copies"], row["near_copies"], elsewhere, row["holding_evaluation_text"]]
    cells = [f"{documents:,}", f"{row['bytes'] / 1e6:,.1f}", *(_share(number, documents) for number in numbers)]
    if row["others"] is None:
        return [*cells, "not judged", ""]
    return [*cells, _share(row["other_language"], documents), _commonest(row["others"])]


def _evaluation_cells(row: dict) -> list[str]:
    by_source = {r["source"]: r["documents"] for r in row["by_source"]}
    by_source = dict(sorted(by_source.items(), key=lambda item: -item[1]))
    shares = [_share(row[name], row["documents"]) for name in ("contaminated", "mostly")]
    return [row["lang"], row["domain"], f"{row['documents']:,}", *shares, _commonest(by_source)]


def _share(number: int, documents: int) -> str:
    if not number:
        return "0"
    percent = 100 * number / documents
    return f"{number:,} ({percent:.1f}%)" if percent >= 0.1 else f"{number:,} (<0.1%)"


def _commonest(counts: dict[str, int]) -> str:
    text = ", ".join(f"{name} {number:,}" for name, number in list(counts.items())[:SHOWN])
    return text + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")


def _notes(result: dict) -> list[str]:
    from moect.data.inspection.contamination import LETTERS, WORDS
    from moect.data.inspection.duplicates import NEAR

    notes = [
        "exact copies: the text of an earlier document, white space apart; near copies: of the others, those of "
        f"similarity {NEAR:g} or more; of others: both kinds, where that document is in another source",
        f"in training text: {WORDS} words in a row, or {LETTERS} letters in scripts without spaces between words, or "
        "the whole where it is shorter; mostly: half of all such runs",
    ]
    if result["sample"] < 1:
        notes.append(
            f"a sample of {result['sample']:.3g} of the documents: copies of a document are in it together, near ones "
            "not always; more evaluation text than this may be in the rest"
        )
    unknown = [row["lang"] for row in result["languages"] if row["others"] is None]
    if unknown:
        notes.append(f"not judged: {', '.join(unknown)}; the identification does not know the language")
    unsure = sum(row["unsure"] or 0 for row in result["languages"])
    if unsure:
        number = "1 document more looks" if unsure == 1 else f"{unsure:,} documents more look"
        notes.append(f"other language: {number} like another, but not surely")
    without = sum(row["without_words"] for row in result["evaluation"])
    if without:
        notes.append(f"{without:,} evaluation documents hold no word, and were not looked for")
    return notes


def _aligned(heading: list[str], rows: list[list[str]], left: int) -> str:
    """Columns as wide as what they hold; the first `left` and the last begin, the others end at the same place."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        last = len(cells) - 1
        return "  ".join(
            cell.ljust(width) if n < left or (n == last and not heading[n]) else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join(map(line, [heading, *rows]))
