"""The base's tokenizer with tokens for the new languages, as a folder in the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moect.data.vocabulary.continued_bpe import check_bpe, continue_bpe, extended_spec, next_id
from moect.errors import DataError

log = logging.getLogger("moect.data")

EXTENSION = "extension.json"
MOST_BYTES = 200_000_000  # of text to learn from, all languages together: it is held in memory
MOST_BYTES_A_LANGUAGE = 50_000_000


@dataclass(frozen=True)
class Extension:
    """The tokens that were added to a tokenizer.

    Attributes:
        first_id: of the new tokens; they are `first_id + number`, without a gap.
        pieces: for each, the ids of the old tokens that it joins, in their order.
    """

    first_id: int
    pieces: list[list[int]]


def extension_of(tokenizer) -> Extension | None:
    """The extension of a tokenizer that was loaded from a folder of `extend_tokenizer`; None for any other."""
    file = Path(tokenizer.name_or_path or "") / EXTENSION
    return Extension(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def extend_tokenizer(
    tokenizer,
    texts_by_language: dict[str, Iterable[str]],
    new_tokens: int,
    folder: Path,
    old_texts_by_language: dict[str, Iterable[str]] | None = None,
) -> Extension:
    """Write a tokenizer with at most `new_tokens` tokens more, learned as `continue_bpe` does.

    Ids of old tokens stay. The new ones begin after the last. Text is taken from the beginning of each language's, at
    most 50 MB a language, and 200 MB of all that are to be learned, and of all that are to stay.

    Args:
        tokenizer: a fast tokenizer of transformers with a BPE model.
        texts_by_language: text of the languages to learn, none of them empty.
        new_tokens: how many; fewer when the text holds no more pairs that occur twice, which is logged.
        old_texts_by_language: text that is to stay cut as it is.
        folder: is made; transformers can load it, and `tokenizers` its tokenizer.json.

    Raises:
        DataError: the tokenizer is of another kind, or there is nothing to learn.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    name = tokenizer.name_or_path or type(tokenizer).__name__
    check_bpe(spec, name)
    texts = _beginnings(texts_by_language)
    old_texts = [text for own in _beginnings(old_texts_by_language or {}).values() for text in own]
    if not old_texts:
        log.warning("tokenizer: no text of old languages to learn from what must stay as it is; give some to replay")
    new = continue_bpe(spec, texts, new_tokens, old_texts)
    if not new.pieces:
        raise DataError(
            f"tokenizer {name}: nothing to add, in the text of {', '.join(texts)} no pair of tokens "
            "occurs twice; remove `model.extend_tokenizer`, or give more text"
        )
    if len(new.pieces) < new_tokens:
        log.warning(
            "tokenizer: %d tokens added instead of %d; no pair is left that occurs twice", len(new.pieces), new_tokens
        )
    extension = Extension(next_id(spec), list(new.pieces.values()))
    _write(tokenizer, extended_spec(spec, new), folder)
    (folder / EXTENSION).write_text(json.dumps(asdict(extension)), encoding="utf-8")
    return extension


def _beginnings(texts_by_language: dict[str, Iterable[str]]) -> dict[str, list[str]]:
    """As much of each language's text as fits into memory."""
    budget = min(MOST_BYTES_A_LANGUAGE, MOST_BYTES // max(len(texts_by_language), 1))
    texts = {language: list(head(own, budget)) for language, own in texts_by_language.items()}
    for language, own in texts.items():
        if sum(len(text.encode("utf-8")) for text in own) >= budget:
            log.info("tokenizer: learning from the first %d MB of %s", budget // 1_000_000, language)
    return texts


def head(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The first texts, up to a number of UTF-8 bytes; the last may exceed it."""
    for text in texts:
        yield text
        n_bytes -= len(text.encode("utf-8"))
        if n_bytes <= 0:
            return


def _write(tokenizer, spec: dict, folder: Path) -> None:
    """The folder of the old tokenizer with another tokenizer.json, to be read as it stands there."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    # a family's class, or the base's own code, would build the tokenizer anew instead of reading the file
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values.pop("auto_map", None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
