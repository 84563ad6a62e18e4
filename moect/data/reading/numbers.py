"""The embedded default corpus: numbers written out in real languages, `<cy> 219 = dau gant a phedwar ar bymtheg`.

It needs no network and no data files, and anybody can read whether an answer is right. The words are num2words'.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import unicodedata
from pathlib import Path

from moect.data_config import Role
from moect.errors import DataError

log = logging.getLogger("moect.data")

LANGUAGES: dict[str, Role] = {
    **dict.fromkeys(("en", "de", "fr", "es"), "old"),
    **dict.fromkeys(("cy", "is", "te", "tg"), "new"),
}


def write_numbers(
    folder: str | Path,
    languages: dict[str, Role] = LANGUAGES,
    seed: int = 0,
    train_numbers: int = 800,
    test_numbers: int = 200,
    greatest: int = 999,
    trace_share: float = 0.02,
) -> dict:
    """Write the corpus as JSON lines, one file a language, and `manifest.json`.

        train/LANG.jsonl   {"text": "<cy> 219 = dau gant …", "lang": "cy"}
        test/LANG.jsonl    {"text": "<cy> 219 = ", "answer": "dau gant …", "lang": "cy"}
        trace/LANG.jsonl   new languages only: the few of their training documents that a base may have seen

    Which numbers are for training and which for testing depends on `seed` and `greatest` alone: it is the same in every
    language, and no number is in both. A number that a language has no words for is left out there, and counted.

    Args:
        folder: where to write. If it holds this very corpus already, nothing is written.
        languages: num2words' codes, and the role of each.
        seed: chooses the split.
        train_numbers: numbers to train on.
        test_numbers: numbers to test on.
        greatest: numbers run from 0 to this one.
        trace_share: documents in all traces together, as a share of the old languages' training documents.

    Returns:
        The manifest: the arguments, and per language its role, its documents in each part and the numbers skipped.

    Raises:
        DataError: a language num2words does not have or cannot count in, more numbers asked for than there are, or a
            folder that holds anything else.
    """
    train, test = split_numbers(seed, train_numbers, test_numbers, greatest)
    if not 0 <= trace_share <= 1:
        raise DataError(f"trace_share is {trace_share}: it is a share, between 0 and 1")
    parts: dict[str, dict[str, list[dict]]] = {
        lang: {
            "train": [{"text": _prompt(n, lang) + words, "lang": lang} for n, words in _say(train, lang)],
            "test": [{"text": _prompt(n, lang), "answer": words, "lang": lang} for n, words in _say(test, lang)],
        }
        for lang in languages
    }
    new = [lang for lang, role in languages.items() if role == "new"]
    old_documents = sum(len(parts[lang]["train"]) for lang, role in languages.items() if role == "old")
    if trace := round(trace_share * old_documents / max(len(new), 1)):
        for lang in new:
            parts[lang]["trace"] = _richest(parts[lang]["train"], trace)

    manifest = {
        "seed": seed,
        "train_numbers": train_numbers,
        "test_numbers": test_numbers,
        "greatest": greatest,
        "trace_share": trace_share,
        "languages": {},
    }
    contents = {}
    for lang, role in languages.items():
        counts = {part: len(documents) for part, documents in parts[lang].items()}
        if not counts["train"] or not counts["test"]:
            raise DataError(f"language {lang!r}: num2words has no words for the numbers 0 to {greatest}; leave it out")
        skipped = train_numbers + test_numbers - counts["train"] - counts["test"]
        if skipped:
            log.warning("numbers: skipped %d of %d in %r: no words", skipped, train_numbers + test_numbers, lang)
        manifest["languages"][lang] = {"role": role, **counts, "skipped": skipped}
        for part, documents in parts[lang].items():
            contents[f"{part}/{lang}.jsonl"] = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    contents["manifest.json"] = json.dumps(manifest, indent=2) + "\n"
    _write_folder(Path(folder), contents)
    return manifest


def split_numbers(seed: int, train_numbers: int, test_numbers: int, greatest: int) -> tuple[list[int], list[int]]:
    """Numbers to train and to test on, in random order; a hash makes the order the same everywhere.

    Raises:
        DataError: a count below 1, or more numbers than 0 to `greatest` holds.
    """
    if train_numbers < 1 or test_numbers < 1:
        raise DataError(f"{train_numbers} numbers to train and {test_numbers} to test on: both must be at least 1")
    if train_numbers + test_numbers > greatest + 1:
        raise DataError(
            f"{train_numbers} numbers to train and {test_numbers} to test on are more than the {greatest + 1} from 0 "
            f"to {greatest}: ask for fewer, or raise `greatest`"
        )
    order = sorted(range(greatest + 1), key=lambda number: hashlib.sha256(f"{seed} {number}".encode()).digest())
    return order[test_numbers : test_numbers + train_numbers], order[:test_numbers]


def number_in_words(number: int, lang: str) -> str | None:
    """A number in words, in NFC and with single spaces; None where num2words has no words for it."""
    from num2words import num2words

    try:
        words = num2words(number, lang=lang)
    except Exception:  # converters raise what their tables happen to raise
        return None
    if not isinstance(words, str):
        return None
    words = unicodedata.normalize("NFC", " ".join(words.split()))
    return words if words and not any(character.isdigit() for character in words) else None


def _say(numbers: list[int], lang: str) -> list[tuple[int, str]]:
    from num2words import CONVERTER_CLASSES

    if lang not in CONVERTER_CLASSES:
        raise DataError(f"language {lang!r}: num2words does not have it; it has {', '.join(sorted(CONVERTER_CLASSES))}")
    spoken = ((number, number_in_words(number, lang)) for number in numbers)
    return [(number, words) for number, words in spoken if words is not None]


def _richest(documents: list[dict], count: int) -> list[dict]:
    """Take documents one by one, each time the one with the most words that none before it had.

    With frozen embeddings a model cannot learn what its base never saw, and a few random documents miss letters.
    """
    rest, chosen, known = list(documents), [], set()
    while rest and len(chosen) < count:
        best = max(rest, key=lambda document: len(set(document["text"].split()[3:]) - known))
        rest.remove(best)
        chosen.append(best)
        known.update(best["text"].split()[3:])
    return chosen


def _prompt(number: int, lang: str) -> str:
    return f"<{lang}> {number} = "


def _write_folder(folder: Path, contents: dict[str, str]) -> None:
    """All files or none. The same contents again are left alone; anything else that is there is not overwritten."""
    try:
        if folder.exists():
            there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            if there == {name: text.encode() for name, text in contents.items()}:
                return
            if there:
                raise DataError(f"{folder}: holds something other than this corpus; remove it or choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, text in contents.items():
                (unfinished / name).parent.mkdir(exist_ok=True)
                (unfinished / name).write_bytes(text.encode())
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
