"""`moect prepare`: all corpora of a run to tokens, once, and a report on them by language."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from moect.config import RunConfig
from moect.data.reading.evaluation import load_calibration, load_evaluation
from moect.data.tokens.store import TokenStore, build_store
from moect.data_config import source_key
from moect.errors import DataError
from moect.locks import is_locked
from moect.tables import aligned

SHOWN = 5  # bad documents of a source that are named on the screen; prepare.json names the first twenty
ENGLISH = ("en", "eng", "english")


def prepare(config: RunConfig, tokenizer, workers: int | None = None) -> dict:
    """Tokenize every corpus of a run into the cache, where training finds it, and fetch its held-out texts.

    What is in the cache already is not made again; what was interrupted goes on where it stood.

    Args:
        config: the run; reads `data` and `output`.
        tokenizer: its tokenizer.
        workers: processes that tokenize; None: as many as there are cores.

    Returns:
        Plain values: `languages` and `sources`, a record each, as `render` shows them.

    Raises:
        DataError: as `build_store` and `load_evaluation`.
    """
    cache = Path(config.output) / ".cache"
    stores = [build_store(source, config.data, tokenizer, cache, workers) for source in config.data.train]
    if config.monitor.enabled:
        load_evaluation(config.data, cache)
        load_calibration(config, cache)
    sources = [
        {"source": source_key(source), "lang": source.lang, "fingerprint": store.fingerprint, **_sums([store])}
        for source, store in zip(config.data.train, stores, strict=True)
    ]
    languages = []
    for lang in sorted({source.lang for source in config.data.train}, key=list(config.data.languages).index):
        mine = [store for source, store in zip(config.data.train, stores, strict=True) if source.lang == lang]
        languages.append({"lang": lang, "role": config.data.languages[lang], **_sums(mine)})
    english = next((record for record in languages if _is_english(record["lang"])), None)
    for record in languages:
        known = english and english["tokens_per_word"] and record["tokens_per_word"]
        record["against_english"] = record["tokens_per_word"] / english["tokens_per_word"] if known else None
    return {"languages": languages, "sources": sources, "leftovers": _leftovers(cache)}


def render(result: dict) -> str:
    """The report as aligned text, a line a language."""
    heading = ["language", "role", "documents", "MB", "tokens", "bytes/token", "tokens/word", "x en"]
    heading += ["unknown", "pieces", "bad", "filtered"]
    rows = [
        [
            record["lang"],
            record["role"],
            f"{record['documents']:,}",
            f"{record['bytes'] / 1e6:,.1f}",
            f"{record['tokens']:,}",
            f"{record['bytes_per_token']:.2f}",
            _number(record["tokens_per_word"]),
            _number(record["against_english"], 1),
            f"{record['unknown_share']:.2%}",
            f"{record['piece_share']:.2%}",
            f"{record['bad']:,}",
            f"{record['filtered']:,}",
        ]
        for record in result["languages"]
    ]
    lines = [
        aligned(heading, rows, left=2),
        "tokens/word: in every 16th document; where a script has no spaces a letter is a word, and `x en` says little",
        "pieces: tokens that are less than a character",
    ]
    for source in result["sources"]:
        examples = source["bad_examples"]
        lines += [f"bad: {example}" for example in examples[:SHOWN]]
        if source["bad"] > SHOWN:
            lines.append(f"bad: {source['bad'] - SHOWN:,} more in {source['source']}")
    if leftovers := result["leftovers"]:
        lines.append(
            f"{leftovers['entries']} unfinished entries of other texts or settings, {leftovers['bytes'] / 1e6:,.0f} "
            f"MB, lie in {leftovers['folder']}; remove *.unfinished there if nothing is to go on with them"
        )
    return "\n".join(lines)


def write_report(result: dict, path: Path) -> Path:
    """The result as JSON; an earlier one is replaced.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another `output`") from error
    return path


def _sums(stores: list[TokenStore]) -> dict:
    """What some corpora are together."""
    counts = sum((Counter(store.counts) for store in stores), Counter())
    tokens, n_bytes = sum(s.n_tokens for s in stores), sum(s.n_bytes for s in stores)
    return {
        "documents": sum(store.n_documents for store in stores),
        "bytes": n_bytes,
        "tokens": tokens,
        "bytes_per_token": n_bytes / tokens,
        "tokens_per_word": counts["word_tokens"] / counts["words"] if counts["words"] else None,
        "unknown_share": counts["unknown"] / tokens,
        "piece_share": counts["fallback"] / tokens,
        "bad": sum(store.tally.bad for store in stores),
        "faults": dict(sum((store.tally.faults for store in stores), Counter())),
        "bad_examples": [example for store in stores for example in store.tally.examples],
        "filtered": sum(store.tally.filtered for store in stores),
    }


def _is_english(lang: str) -> bool:
    return lang.lower().replace("-", "_").split("_")[0] in ENGLISH


def _leftovers(cache: Path) -> dict | None:
    """Unfinished entries of the cache that nobody is working on: of texts or settings that this run does not have, for
    its own are finished."""
    entries = size = 0
    for folder in cache.glob("*.unfinished"):
        if is_locked(cache / "locks" / folder.stem):
            continue
        try:
            size += sum(file.stat().st_size for file in folder.iterdir())
        except FileNotFoundError:  # it was finished meanwhile
            continue
        entries += 1
    return {"entries": entries, "bytes": size, "folder": str(cache)} if entries else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
