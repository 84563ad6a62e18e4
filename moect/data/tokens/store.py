"""Token stores: a corpus tokenized once, written to the cache, and memory-mapped from then on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from moect.data.reading.files import Place, resolve_files, size_of
from moect.data.reading.fingerprint import source_fingerprint
from moect.data.reading.progress import Progress
from moect.data.reading.records import RecordReader, Tally
from moect.data.reading.sources import check_bad, read_blocks, tell_bad
from moect.data.tokens.store_writer import StoreWriter
from moect.data.tokens.tokenizing import BlockTokenizer, tokenize_blocks
from moect.data_config import DataConfig, SourceConfig, source_key
from moect.errors import DataError
from moect.locks import locked
from moect.processes import available_cores

log = logging.getLogger("moect.data")


class TokenStore:
    """The tokens of one corpus, read from its folder in the cache.

    Attributes:
        tokens: (n_tokens,) uint16 or uint32, memory-mapped: all documents, one after another.
        offsets: (n_documents + 1,) int64, memory-mapped: document d is tokens[offsets[d] : offsets[d + 1]].
        document_bytes: (n_documents,) int64, memory-mapped: UTF-8 bytes of each document's text.
        n_documents, n_tokens, n_bytes: their sums.
        max_token: the greatest token id.
        lang: of all documents.
        tally: documents that were used, bad and left out by filters.
        counts: `unknown` and `fallback` tokens; of a sample of the documents, `words` and their `word_tokens`.
        fingerprint: of everything that the tokens depend on.
    """

    def __init__(self, folder: Path):
        """Open a store; ValueError or OSError when a file is missing, short or of another shape than recorded."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.offsets, self.document_bytes, self._id_offsets = (
            np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)
            for name in ("offsets", "bytes", "id_offsets")
        )
        try:
            self.n_documents, self.n_tokens, self.n_bytes = meta["documents"], meta["tokens"], meta["bytes"]
            self.max_token, self.fingerprint, self.lang = meta["max_token"], meta["fingerprint"], meta["lang"]
            self.tally, self.counts = Tally.from_dict(meta["tally"]), meta["counts"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"meta.json is incomplete ({error})") from error
        shapes = (self.tokens.shape, self.offsets.shape, self.document_bytes.shape, self._id_offsets.shape)
        n = self.n_documents
        if shapes != ((self.n_tokens,), (n + 1,), (n,), (n + 1,)) or int(self.offsets[-1]) != self.n_tokens:
            raise ValueError("the arrays have other lengths than meta.json says")

    def document_id(self, document: int) -> str:
        """A document's name: its own, or the file, as it was called when it was tokenized, and the line."""
        start, end = self._id_offsets[document : document + 2]
        with (self.folder / "ids.txt").open("rb") as file:
            file.seek(start)
            return file.read(end - start).decode("utf-8").removesuffix("\n")


def build_store(
    source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path, workers: int | None = None
) -> TokenStore:
    """The token store of a corpus, from the cache if it is there, else tokenized and written first.

    What was interrupted goes on where it stood: at most the last few megabytes are tokenized again. Of several
    processes that want the same entry one makes it, and the others wait.

    Args:
        source: the corpus.
        config: reads `root` and `max_bad_fraction`.
        tokenizer: a fast Hugging Face tokenizer.
        cache_folder: where stores are kept.
        workers: processes that tokenize; None: as many as there are cores.

    Raises:
        DataError: see `read_documents`; no document has two tokens; or the cache cannot be written.
    """
    cache_folder = Path(cache_folder)
    key = source_key(source)
    fingerprint = source_fingerprint(source, config, tokenizer, cache_folder)
    folder = cache_folder / fingerprint
    try:
        store = _open(folder)
        if store:
            StoreWriter.tidy(folder)  # whoever made it may have been killed at the very end
        else:
            locks = cache_folder / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            with locked(locks / fingerprint, lambda: log.info("%s: another process tokenizes it; waiting", key)):
                store = _open(folder, tell=True)
                store = store or _write(source, config, tokenizer, cache_folder, fingerprint, workers)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: the token cache cannot be read or written ({error.strerror or error}); free "
            "or choose another place"
        ) from error
    check_bad(source, store.tally, config.max_bad_fraction, at_end=True)
    return store


def find_store(source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path) -> TokenStore | None:
    """The token store of a corpus if it is in the cache; nothing is tokenized and no network is needed."""
    fingerprint = source_fingerprint(source, config, tokenizer, Path(cache_folder), online=False)
    return fingerprint and _open(Path(cache_folder) / fingerprint)


def _open(folder: Path, tell: bool = False) -> TokenStore | None:
    """The store in `folder`; None when there is none, or a damaged one, which is told of and moved away."""
    if not folder.exists():
        return None
    try:
        return TokenStore(folder)
    except (OSError, ValueError, EOFError) as error:
        if tell:
            log.warning("%s: damaged cache entry (%s); tokenizing again", folder, error)
            aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
        return None


def _write(
    source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path, fingerprint: str, workers: int | None
) -> TokenStore:
    """Tokenize a source, or the rest of it, into a store; only the lock's holder may."""
    key = source_key(source)
    reader = RecordReader(source, config.root)
    tokenize = BlockTokenizer(tokenizer, reader)
    unfinished = cache_folder / f"{fingerprint}.unfinished"
    total = _total(source, config)
    with StoreWriter(unfinished, tokenize.dtype) as writer:
        tally = writer.tally
        done = writer.bytes_read if source.limit is None else tally.good
        if writer.place != Place():
            log.info("%s: %d documents are tokenized already; going on from there", key, tally.good)
        progress = Progress(key, total, done=done)
        blocks = iter(())
        if source.limit is None or tally.good < source.limit:
            blocks = read_blocks(source, config.root, reader, cache_folder, writer.place)
        try:
            for block, made in tokenize_blocks(blocks, tokenize, workers or available_cores()):
                if source.limit is not None and tally.good + made.tally.good >= source.limit:
                    made = tokenize(block, source.limit - tally.good)  # no document after the last one counts
                writer.add(made, block.after, block.bytes_read)
                done = block.bytes_read if source.limit is None else tally.good
                progress.add(made.tally.good, int(made.sizes.sum()), done)
                check_bad(source, tally, config.max_bad_fraction)
                if tally.good == source.limit:
                    break
        finally:
            progress.end()
        if not tally.good:
            check_bad(source, tally, config.max_bad_fraction, at_end=True)
        if writer.longest < 2:
            raise DataError(f"{key}: no document has two tokens, there is nothing to predict; give longer text")
        writer.finish({"fingerprint": fingerprint, "lang": source.lang})
    os.rename(unfinished, cache_folder / fingerprint)
    writer.tidy(cache_folder / fingerprint)
    tell_bad(source, tally)
    return TokenStore(cache_folder / fingerprint)


def _total(source: SourceConfig, config: DataConfig) -> int | None:
    """What there is to do, for the progress: documents, or bytes of files."""
    if source.limit is not None:
        return source.limit
    if not source.path:
        return None
    return sum(map(size_of, resolve_files(source.path, config.root)))
