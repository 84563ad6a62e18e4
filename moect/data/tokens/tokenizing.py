"""Text to tokens, block by block, on as many cores as there are; the result does not depend on how many.

Worker processes import this file: nothing heavy here.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from moect.data.reading.files import Block
from moect.data.reading.records import RecordReader, Tally
from moect.data.reading.words import count_words
from moect.processes import map_in_order

ALONE = 2  # blocks that are tokenized before other processes are started, which takes a second
KILLED = (
    "a tokenizing process was killed, perhaps for want of memory; the same command goes on from what is done; with "
    "`moect prepare --workers N` fewer run at once"
)
SAMPLED = 16  # words are counted in every 16th document


@dataclass
class TokenBlock:
    """The documents of a block, tokenized.

    Attributes:
        tokens: uint16 or uint32, of all documents, one after another.
        lengths: int64, tokens of each document.
        sizes: int64, UTF-8 bytes of each document's text.
        ids: the documents' names.
        tally: what was used and what was not.
        counts: `unknown` and `fallback` tokens; of the sample, `words` and the `word_tokens` they became.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    ids: list[str]
    tally: Tally
    counts: Counter = field(default_factory=Counter)


class BlockTokenizer:
    """What tokenizes the blocks of one source; travels to other processes.

    A document becomes [BOS] + ids + [EOS], as far as the tokenizer has these tokens; it is never truncated.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        reader: finds the documents.
    """

    def __init__(self, tokenizer, reader: RecordReader):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # settings of earlier calls, which do not matter here
        backend.no_padding()
        self._backend, self._json = backend, backend.to_str()
        self.reader = reader
        self.before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._kinds_V = _token_kinds(backend, json.loads(self._json)["model"])
        self.dtype = np.dtype(np.uint16 if len(self._kinds_V) <= 2**16 else np.uint32)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_backend": None}  # made of its JSON again, where it is needed

    def __call__(self, block: Block, limit: int | None = None) -> TokenBlock:
        """Tokenize a block's documents, at most `limit` of them."""
        if self._backend is None:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(self._json)
        tally = Tally()
        documents = list(self.reader.documents(block, tally, limit))
        encoded = self._backend.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        tokens = self._with_ends(
            np.fromiter(itertools.chain.from_iterable(e.ids for e in encoded), self.dtype), lengths
        )
        unknown, fallback = np.bincount(self._kinds_V[tokens], minlength=3)[1:]
        counts = Counter(unknown=int(unknown), fallback=int(fallback))
        for document, row in zip(documents[::SAMPLED], encoded[::SAMPLED], strict=True):
            counts["words"] += count_words(document.text)
            counts["word_tokens"] += len(row)
        return TokenBlock(
            tokens=tokens,
            lengths=lengths + len(self.before) + len(self.after),
            sizes=np.fromiter((d.n_bytes for d in documents), dtype=np.int64, count=len(documents)),
            ids=[d.id for d in documents],
            tally=tally,
            counts=counts,
        )

    def _with_ends(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """All documents' tokens with BOS and EOS around each document."""
        ends = np.cumsum(lengths)
        around = [(ends - lengths, token) for token in self.before] + [(ends, token) for token in self.after]
        if not around or not len(lengths):
            return tokens
        # in the order of the documents, so that an empty one keeps its BOS before its EOS
        places = np.stack([place for place, _ in around], axis=1).reshape(-1)
        return np.insert(tokens, places, np.tile([token for _, token in around], len(lengths)).astype(self.dtype))


def tokenize_blocks(
    blocks: Iterable[Block], tokenizer: BlockTokenizer, workers: int
) -> Iterator[tuple[Block, TokenBlock]]:
    """Blocks in their order, each with its tokens.

    Few blocks are held at once, whatever their number. The first ones are tokenized here; only a corpus of more than a
    few megabytes is worth the second that other processes need to start.

    Args:
        blocks: read as they are needed.
        tokenizer: what to do with each.
        workers: processes; 1: all is done here.

    Raises:
        DataError: a worker process was killed.
    """
    blocks = iter(blocks)
    for block in itertools.islice(blocks, ALONE if workers > 1 else None):
        yield block, tokenizer(block)
    following = next(blocks, None)
    if following is None:
        return
    yield from map_in_order(tokenizer, itertools.chain([following], blocks), workers, KILLED)


def _token_kinds(backend, model: dict) -> np.ndarray:
    """For each token id 0, or 1 if it stands for the unknown, or 2 if it is no whole character: a byte of one that the
    vocabulary lacks, `<0xE0>`, or in a byte-level vocabulary a piece of one."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    kinds_V = np.zeros(max(vocabulary.values(), default=0) + 1, dtype=np.int8)
    unknown, unknown_id = model.get("unk_token"), model.get("unk_id")  # each kind of model has one of them
    characters = _byte_level_characters()
    byte_level = "ByteLevel" in type(backend.decoder).__name__ or "ByteLevel" in str(backend.pre_tokenizer)
    for token, number in vocabulary.items():
        if token == unknown or number == unknown_id:
            kinds_V[number] = 1
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            kinds_V[number] = 2 * (int(byte[1], 16) > 127)  # below, a byte is a whole character
        elif byte_level and all(c in characters for c in token):
            try:
                bytes(characters[c] for c in token).decode("utf-8")
            except UnicodeDecodeError:
                kinds_V[number] = 2
    return kinds_V


def _byte_level_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
