"""Token stores: a corpus tokenized once, written to the cache, and memory-mapped from then on."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import uuid
from pathlib import Path

import numpy as np

from moect.data.hub import identity
from moect.data.progress import Progress
from moect.data.sources import EXTENSIONS, read_documents, resolve_files, source_key
from moect.data_config import DataConfig, SourceConfig
from moect.errors import DataError

log = logging.getLogger("moect.data")

FORMAT_VERSION = 1
DOCUMENTS_AT_ONCE = 1024


class TokenStore:
    """The tokens of one corpus, read from its folder in the cache.

    Attributes:
        tokens: (n_tokens,) uint32, memory-mapped: all documents, one after another.
        offsets: (n_documents + 1,) int64: document d is tokens[offsets[d] : offsets[d + 1]].
        document_bytes: (n_documents,) int64: UTF-8 bytes of each document's text.
        n_documents, n_tokens, n_bytes: their sums.
        max_token: the greatest token id.
        fingerprint: of everything that the tokens depend on.
    """

    def __init__(self, folder: Path):
        """Open a store; ValueError or OSError when a file is missing, short or of another shape than recorded."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.offsets = np.load(folder / "offsets.npy")
        self.document_bytes = np.load(folder / "bytes.npy")
        try:
            self.n_documents, self.n_tokens, self.n_bytes = meta["documents"], meta["tokens"], meta["bytes"]
            self.max_token, self.fingerprint = meta["max_token"], meta["fingerprint"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"meta.json is incomplete ({error})") from error
        found = (self.tokens.shape, self.offsets.shape, self.document_bytes.shape, int(self.offsets[-1]))
        if found != ((self.n_tokens,), (self.n_documents + 1,), (self.n_documents,), self.n_tokens):
            raise ValueError("the arrays have other lengths than meta.json says")


def build_store(source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path) -> TokenStore:
    """The token store of a corpus, from the cache if it is there, else tokenized and written first.

    A document becomes [BOS] + ids + [EOS], as far as the tokenizer has these tokens; it is never truncated. The entry
    is written to a temporary folder and renamed, so several processes may build the same one at once. What was
    interrupted begins again at the first document of this source.

    Raises:
        DataError: see `read_documents`; no document has two tokens; or the cache cannot be written.
    """
    cache_folder = Path(cache_folder)
    fingerprint = _fingerprint(source, config, tokenizer, cache_folder)
    folder = cache_folder / fingerprint
    if store := _open(folder):
        return store
    temporary = folder.with_name(f".{fingerprint}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, fingerprint, source, config, tokenizer, cache_folder)
        return _publish(temporary, folder)
    except OSError as error:
        raise DataError(
            f"{folder}: the token cache cannot be written ({error.strerror or error}); free or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_store(source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path) -> TokenStore | None:
    """The token store of a corpus if it is in the cache; nothing is tokenized and no network is needed."""
    fingerprint = _fingerprint(source, config, tokenizer, Path(cache_folder), online=False)
    return fingerprint and _open(Path(cache_folder) / fingerprint)


def _fingerprint(
    source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path, online: bool = True
) -> str | None:
    """sha256 over all that decides about the tokens: contents and kinds of the files, or the dataset's commit; options,
    tokenizer, format. None: the commit is not known, and `online` does not allow to ask."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # settings of earlier calls, which do not matter here
    backend.no_padding()
    options = [FORMAT_VERSION, source.text_field, source.limit, config.max_bad_fraction]
    parts = [json.dumps(options), json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id]), backend.to_str()]
    if source.dataset:
        made_of = identity(source, config.root, cache_folder, online)
        if made_of is None:
            return None
        parts += made_of
    for file in resolve_files(source.path, config.root) if source.path else ():
        try:
            with file.open("rb") as stream:
                kind = next(e for e in EXTENSIONS if file.name.endswith(e))
                parts += [kind, hashlib.file_digest(stream, "sha256").hexdigest()]
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode("utf-8")).digest())
    return whole.hexdigest()


def _open(folder: Path) -> TokenStore | None:
    """The store in `folder`; None when there is none, or a damaged one."""
    if not folder.exists():
        return None
    try:
        return TokenStore(folder)
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s: damaged cache entry (%s); tokenizing again", folder, error)
        return None


def _write(
    folder: Path, fingerprint: str, source: SourceConfig, config: DataConfig, tokenizer, cache_folder: Path
) -> None:
    """Tokenize a source into the files of a store, holding the text of only one batch of documents in memory."""
    documents = read_documents(source, config.root, config.max_bad_fraction, cache_folder)
    progress = Progress(source_key(source), source.limit)
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    lengths, sizes, max_token = [], [], 0
    with (folder / "tokens.npy").open("w+b") as file:
        _write_header(file, 0)
        while batch := [d.text for d in itertools.islice(documents, DOCUMENTS_AT_ONCE)]:
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids = [before + row + after for row in encoded["input_ids"]]
            flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.uint32)
            file.write(flat)
            lengths += map(len, ids)
            sizes += (len(text.encode("utf-8")) for text in batch)
            progress.add(len(batch), sum(sizes[-len(batch) :]))
            max_token = max(max_token, int(flat.max(initial=0)))
        progress.end()
        if max(lengths) < 2:
            raise DataError(
                f"{source_key(source)}: no document has two tokens, there is nothing to predict; give longer text"
            )
        file.seek(0)
        _write_header(file, sum(lengths))
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "bytes.npy", np.array(sizes, dtype=np.int64))
    meta = {"documents": len(lengths), "tokens": sum(lengths), "bytes": sum(sizes), "max_token": max_token}
    (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": fingerprint}), encoding="utf-8")


def _write_header(file, n_tokens: int) -> None:
    """A .npy header; numpy pads it so that a greater length fits the same place."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint32)), "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _publish(temporary: Path, folder: Path) -> TokenStore:
    """Rename a finished entry into place, unless another process was first with a good one."""
    while True:
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
            if store := _open(folder):
                return store
            aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            try:
                os.rename(folder, aside)
            except FileNotFoundError:  # another process has just moved it
                continue
            shutil.rmtree(aside, ignore_errors=True)
        else:
            return TokenStore(folder)
