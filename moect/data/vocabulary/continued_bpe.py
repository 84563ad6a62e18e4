"""Continued BPE training: learn further merges on top of those that a tokenizer has.

Text is first cut as the tokenizer cuts it today; merges of neighbours inside a word are then learned as BPE always does
(Sennrich et al., arXiv 1508.07909). They rank after every old merge, so each old merge still comes first, and text to
which no new one applies is cut as before (Purason et al., "Teaching Old Tokenizers New Words", arXiv 2512.03989).
Tokens that are merely added to a tokenizer would instead be looked for in all text before anything else, old
languages' included. Neighbours that old text has are never joined (`kept_pairs.py`).

The counting is done by the library's own trainer, in Rust. It merges characters, so it is shown a text in which every
old token is one character.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moect.data.vocabulary.kept_pairs import KeptPairs
from moect.errors import DataError

log = logging.getLogger("moect.data")

SPACE = "▁"  # how SentencePiece writes a space
BREAK = 0  # the code point between two words
SURROGATES = 0xD800, 0x800  # the first code point that is no character, and how many there are
GREATEST_WEIGHT = 10  # how often the text of a small language counts at most
LEAST_COUNT = 2  # a pair that occurs but once is not merged
COVERAGE = 0.9995  # share of the characters unknown to a byte-fallback tokenizer that become tokens
DOCUMENTS_AT_ONCE = 256


@dataclass
class NewTokens:
    """What continued training learned.

    Attributes:
        pieces: by new token, in the order of their ids: ids of the old tokens that it joins.
        merges: pairs of tokens, to follow the old merges in this order.
    """

    pieces: dict[str, list[int]] = field(default_factory=dict)
    merges: list[tuple[str, str]] = field(default_factory=list)


def check_bpe(spec: dict, name: str) -> None:
    """Whether merges can be added to a tokenizer.

    Args:
        spec: the tokenizer, as in its tokenizer.json.
        name: of the tokenizer, for the message.

    Raises:
        DataError: it is no BPE, or one that neither works on bytes nor falls back to them.
    """
    model = spec["model"]
    remedy = "remove `model.extend_tokenizer`, or take a base whose tokenizer is a BPE on bytes or with byte fallback"
    if model.get("type") != "BPE":
        raise DataError(
            f"tokenizer {name}: is a {model.get('type')} model, which has no merges that could be continued; {remedy}"
        )
    if not (_on_bytes(spec) or model.get("byte_fallback")):
        raise DataError(f"tokenizer {name}: is a BPE that cannot write every byte; {remedy}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise DataError(f"tokenizer {name}: is a BPE that marks parts of words; {remedy}")


def continue_bpe(spec: dict, texts: dict[str, list[str]], new_tokens: int, old_texts: list[str] = ()) -> NewTokens:
    """Learn at most `new_tokens` tokens that join the old ones.

    Every language weighs as many bytes as the one with most text, but none is counted more than ten times over. Words
    are what the tokenizer's pre-tokenizer separates. A tokenizer with byte fallback, whose pre-tokenizer may separate
    nothing, gets tokens inside a run of letters, digits or other characters with the space before it; and the
    characters that it lacks become tokens first, the frequent ones.

    Args:
        spec: a tokenizer that `check_bpe` accepts, as in its tokenizer.json.
        texts: by language.
        new_tokens: how many; there are fewer when no pair is left that occurs twice.
        old_texts: text that is to stay cut as it is, but for what is rarer in it than one in ten million tokens.
    """
    found = NewTokens()
    first_id = next_id(spec)
    weights = _weights(texts)
    if spec["model"].get("byte_fallback"):
        found.pieces = _missing_characters(spec, texts, weights, new_tokens // 2, old_texts)
        spec = extended_spec(spec, found)
    kept = _kept_pairs(spec, old_texts)
    learn, surplus = new_tokens - len(found.pieces), new_tokens // 8 + 64  # some merges cannot be used
    while True:
        merges = _learn_merges(spec, texts, weights, learn + surplus, kept)
        result = _name_merges(spec, merges, found, first_id, new_tokens)
        if len(result.pieces) == new_tokens or len(merges) < learn + surplus:
            return result
        surplus *= 4


def extended_spec(spec: dict, new: NewTokens) -> dict:
    """A tokenizer with new tokens and merges, as in its tokenizer.json."""
    first_id = next_id(spec)
    # the library gives an added token an id that depends on the vocabulary's size, unless the vocabulary holds it
    vocab = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    vocab |= {token: first_id + number for number, token in enumerate(new.pieces)}
    merges = spec["model"]["merges"] + [list(pair) for pair in new.merges]
    return {**spec, "model": {**spec["model"], "vocab": vocab, "merges": merges}}


def next_id(spec: dict) -> int:
    """The first id after all of a tokenizer's, those of added tokens included."""
    added = (token["id"] for token in spec["added_tokens"])
    return max(itertools.chain(spec["model"]["vocab"].values(), added)) + 1


def _on_bytes(spec: dict) -> bool:
    pre = spec.get("pre_tokenizer") or {}
    return any(part.get("type") == "ByteLevel" for part in (pre, *pre.get("pretokenizers", ())))


def _weights(texts: dict[str, list[str]]) -> dict[str, float]:
    """How often each language's text counts."""
    sizes = {language: sum(len(text.encode("utf-8")) for text in own) for language, own in texts.items()}
    wished = {language: max(sizes.values()) / size for language, size in sizes.items()}
    if small := [language for language, weight in wished.items() if weight > GREATEST_WEIGHT]:
        log.info(
            "%s: so little text that it counts %d times and still less than the others'",
            ", ".join(small),
            GREATEST_WEIGHT,
        )
    return {language: min(weight, GREATEST_WEIGHT) for language, weight in wished.items()}


def _kept_pairs(spec: dict, old_texts: list[str]) -> KeptPairs:
    from tokenizers import Tokenizer

    kept = KeptPairs(next_id(spec))
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    for start in range(0, len(old_texts), DOCUMENTS_AT_ONCE):
        kept.add(backend.encode_batch(old_texts[start : start + DOCUMENTS_AT_ONCE], add_special_tokens=False))
    kept.finish()
    return kept


def _missing_characters(
    spec: dict, texts: dict[str, list[str]], weights: dict[str, float], most: int, old_texts: list[str]
) -> dict[str, list[int]]:
    """Characters that only bytes can write, and which; the frequent ones, most frequent first; none of old text."""
    from tokenizers import Tokenizer

    normalizer = Tokenizer.from_str(json.dumps(spec)).normalizer
    vocab = spec["model"]["vocab"]
    of_old = set().union(*(normalizer.normalize_str(text) if normalizer else text for text in old_texts))
    counts = Counter()
    for language, own in texts.items():
        known = Counter()
        for text in own:
            known.update(normalizer.normalize_str(text) if normalizer else text)
        counts.update({character: weights[language] * n for character, n in known.items() if n >= LEAST_COUNT})
    missing = [
        (character, n)
        for character, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if character not in vocab and character not in of_old and unicodedata.category(character)[0] in "LMNPS"
    ]
    wanted, covered, chosen = COVERAGE * sum(n for _, n in missing), 0.0, []
    for character, n in missing[:most]:
        if covered >= wanted:
            break
        chosen.append(character)
        covered += n
    return {c: [vocab[f"<0x{byte:02X}>"] for byte in c.encode("utf-8")] for c in chosen}


def _learn_merges(
    spec: dict, texts: dict[str, list[str]], weights: dict[str, float], most: int, kept: KeptPairs
) -> list[tuple[str, str]]:
    """Pairs in the order learned, each side as the characters that stand for its old tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    alphabet = [chr(code) for code in _codes(np.arange(next_id(spec)))]
    shadow = Tokenizer(models.BPE())
    shadow.pre_tokenizer = pre_tokenizers.Split(chr(BREAK), "removed")
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + most,
        min_frequency=LEAST_COUNT,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    shadow.train_from_iterator(_shadows(spec, texts, weights, kept), trainer)
    return [tuple(pair) for pair in json.loads(shadow.to_str())["model"]["merges"]]


def _shadows(spec: dict, texts: dict[str, list[str]], weights: dict[str, float], kept: KeptPairs) -> Iterator[str]:
    """Every document as one character a token, with a break between words and between neighbours that must not be
    joined, as often as its language's weight says."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    borders = _Borders(spec) if spec["model"].get("byte_fallback") else None
    for language, own in texts.items():
        number, weight = 0, weights[language]
        for start in range(0, len(own), DOCUMENTS_AT_ONCE):
            for encoding in backend.encode_batch(own[start : start + DOCUMENTS_AT_ONCE], add_special_tokens=False):
                times = math.floor(weight * (number + 1)) - math.floor(weight * number)
                number += 1
                yield times * (_shadow(encoding, borders, kept) + chr(BREAK))


def _shadow(encoding, borders: _Borders | None, kept: KeptPairs) -> str:
    ids, words = np.array(encoding.ids, dtype=np.int64), np.array(encoding.word_ids, dtype=np.int64)
    cuts, codes = (words[1:] != words[:-1]) | kept.between(ids), _codes(ids)
    if borders is not None:
        cuts |= borders.between(ids)
        codes[borders.is_byte[ids]] = BREAK
    codes = np.insert(codes, np.flatnonzero(cuts) + 1, BREAK)
    return codes.astype("<u4").tobytes().decode("utf-32-le")


def _codes(ids: np.ndarray) -> np.ndarray:
    """Code points that stand for ids, one each."""
    first, number = SURROGATES
    return np.where(ids + 1 < first, ids + 1, ids + 1 + number)


def _id(character: str) -> int:
    first, number = SURROGATES
    code = ord(character)
    return code - 1 if code < first else code - 1 - number


class _Borders:
    """Where words end for a tokenizer that writes spaces into its tokens: before a space, and where letters, digits,
    white space and other characters meet. A byte is a word of its own, since several in one token could not be decoded.

    Attributes:
        is_byte: (ids,) whether the token is a byte.
    """

    def __init__(self, spec: dict):
        n = next_id(spec)
        self.is_byte, self.spaced, self.blank = np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, bool)
        self.first, self.last = np.zeros(n, np.int8), np.zeros(n, np.int8)
        for token, i in spec["model"]["vocab"].items():
            self.is_byte[i] = len(token) == 6 and token.startswith("<0x")
            self.spaced[i], self.blank[i] = token.startswith(SPACE), not token.strip(SPACE)
            self.first[i], self.last[i] = (_kind(token[0]), _kind(token[-1])) if token else (0, 0)

    def between(self, ids: np.ndarray) -> np.ndarray:
        """(n - 1,) bool: whether a word ends between each two of n tokens."""
        before, after = ids[:-1], ids[1:]
        return self.spaced[after] | ((self.last[before] != self.first[after]) & ~self.blank[before])


def _kind(character: str) -> int:
    """Letters and marks, digits, white space, the rest."""
    return {"L": 1, "M": 1, "N": 2, "Z": 3, "C": 3}.get(unicodedata.category(character)[0], 0)


def _name_merges(
    spec: dict, merges: list[tuple[str, str]], found: NewTokens, first_id: int, new_tokens: int
) -> NewTokens:
    """The merges between tokens instead of their stand-ins, up to the one that makes the last new token.

    A merge that leads to a token which is there already, another way than that token's own merges, is left out with all
    that builds on it: old merges could then apply to its result. It is rare. So a new token always joins the same old
    ones, and the new cut of a text is the old one with neighbours joined.
    """
    token_of = {i: token for token, i in spec["model"]["vocab"].items()}
    bytes_of = {first_id + number: pieces for number, pieces in enumerate(found.pieces.values())}
    result = NewTokens(dict(found.pieces), [])
    taken = {*spec["model"]["vocab"], *(token["content"] for token in spec["added_tokens"])}
    unusable = set()
    for left, right in merges:
        if len(result.pieces) == new_tokens:
            break
        pair = tuple("".join(token_of[_id(c)] for c in side) for side in (left, right))
        token = "".join(pair)
        if token in taken or left in unusable or right in unusable:
            unusable.add(left + right)
            continue
        taken.add(token)
        result.merges.append(pair)
        result.pieces[token] = [piece for c in left + right for piece in bytes_of.get(_id(c), [_id(c)])]
    return result
