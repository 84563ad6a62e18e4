"""Writing a token store so that it can be interrupted at any moment and gone on with.

While it is made, its folder holds

    tokens.npy      all tokens so far, behind a header that still says none
    documents.bin   for each document its tokens, its bytes of text, and the bytes of its name
    ids.txt         the documents' names, a line each
    journal.jsonl   a line at each commit: how much of the above is whole, and where reading goes on

What lies behind the last commit is cut off when a process goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from moect.data.reading.files import Place
from moect.data.reading.records import Tally
from moect.data.tokens.tokenizing import TokenBlock

TOKENS, DOCUMENTS, IDS, JOURNAL = FILES = ("tokens.npy", "documents.bin", "ids.txt", "journal.jsonl")
COMMIT_BLOCKS = 8  # blocks between two commits; what a killed process loses at most
COLUMNS = 3  # of documents.bin, int64
AT_ONCE = 2**20  # documents whose offsets are summed at once


class StoreWriter:
    """Adds blocks to a store in the making; a context, in which its files are open.

    Attributes:
        place: where reading is to go on.
        bytes_read: of the source's files before that place.
        tally: documents so far; all of them, those before an interruption too.
        counts: token and word counts so far.
        longest: tokens of the longest document.
    """

    def __init__(self, folder: Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.place, self.bytes_read = Place(), 0
        self.tally, self.counts = Tally(), Counter()
        self.longest = self.max_token = self.n_tokens = self.n_bytes = self.id_bytes = 0
        self._since_commit = 0
        self._finished = False

    def __enter__(self) -> StoreWriter:
        self.folder.mkdir(exist_ok=True)
        self._go_back()
        self._tokens, self._documents, self._ids, self._journal = ((self.folder / name).open("ab") for name in FILES)
        if not self._tokens.tell():
            _write_header(self._tokens, self.dtype, 0)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for file in (self._tokens, self._documents, self._ids, self._journal):
            file.close()
        if not self._finished and not (self.folder / JOURNAL).stat().st_size:
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing that could be gone on with

    def add(self, made: TokenBlock, after: Place, bytes_read: int) -> None:
        """Append a block's documents; reading goes on at `after`."""
        self._tokens.write(made.tokens.data)
        names = [f"{name}\n".encode() for name in made.ids]
        rows = np.stack([made.lengths, made.sizes, np.fromiter(map(len, names), np.int64, len(names))], axis=1)
        self._documents.write(np.ascontiguousarray(rows).data)
        self._ids.write(b"".join(names))
        self.tally.add(made.tally)
        self.counts += made.counts
        self.n_tokens += len(made.tokens)
        self.n_bytes += int(made.sizes.sum())
        self.id_bytes += int(rows[:, 2].sum())
        self.longest = max(self.longest, int(made.lengths.max(initial=0)))
        self.max_token = max(self.max_token, int(made.tokens.max(initial=0)))
        self.place, self.bytes_read = after, bytes_read
        self._since_commit += 1
        if self._since_commit == COMMIT_BLOCKS:
            self._commit()

    def finish(self, meta: dict) -> None:
        """Turn what was added into a store; `meta` holds what is not counted here."""
        self._commit()
        self._tokens.close()
        with (self.folder / TOKENS).open("r+b") as file:
            _write_header(file, self.dtype, self.n_tokens)
        n = self.tally.good
        table = np.memmap(self.folder / DOCUMENTS, dtype=np.int64, mode="r", shape=(n, COLUMNS)) if n else []
        for column, name, summed in ((0, "offsets", True), (1, "bytes", False), (2, "id_offsets", True)):
            with (self.folder / f"{name}.npy").open("wb") as file:  # a map would die of a full disk without a word
                _write_header(file, np.dtype(np.int64), n + summed)
                if summed:
                    np.zeros(1, dtype=np.int64).tofile(file)
                total = 0
                for start in range(0, n, AT_ONCE):
                    part = np.array(table[start : start + AT_ONCE, column])
                    if summed:
                        part = np.cumsum(part) + total
                        total = part[-1]
                    part.tofile(file)
        values = {
            **meta,
            "documents": n,
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "max_token": self.max_token,
            "tally": self.tally.to_dict(),
            "counts": dict(self.counts),
        }
        (self.folder / "meta.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        for file in self.folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        self._finished = True

    @staticmethod
    def tidy(folder: Path) -> None:
        """Remove from a store in its place what only its making needed."""
        with contextlib.suppress(OSError):  # somebody else's cache
            for name in (DOCUMENTS, JOURNAL):
                (folder / name).unlink(missing_ok=True)

    def _commit(self) -> None:
        for file in (self._tokens, self._documents, self._ids):
            file.flush()
            os.fsync(file.fileno())
        line = {
            "place": dataclasses.asdict(self.place),
            "bytes_read": self.bytes_read,
            "tally": self.tally.to_dict(),
            "counts": dict(self.counts),
            **{name: getattr(self, name) for name in ("longest", "max_token", "n_tokens", "n_bytes", "id_bytes")},
        }
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._since_commit = 0

    def _go_back(self) -> None:
        """To the last commit whose bytes are all there, if there is one."""
        journal = self.folder / JOURNAL
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        while lines:
            try:
                line = json.loads(lines[-1])
                sizes = {
                    TOKENS: _header_bytes(self.dtype) + line["n_tokens"] * self.dtype.itemsize,
                    DOCUMENTS: line["tally"]["good"] * COLUMNS * 8,
                    IDS: line["id_bytes"],
                }
                whole = all((self.folder / name).stat().st_size >= size for name, size in sizes.items())
            except (ValueError, KeyError, TypeError, OSError):
                whole = False
            if whole:
                break
            lines.pop()
        if not lines:
            for name in FILES:
                (self.folder / name).unlink(missing_ok=True)
            return
        os.truncate(journal, sum(len(text) + 1 for text in lines))
        for name, size in sizes.items():
            os.truncate(self.folder / name, size)
        self.place, self.bytes_read = Place(**line["place"]), line["bytes_read"]
        self.tally, self.counts = Tally.from_dict(line["tally"]), Counter(line["counts"])
        for name in ("longest", "max_token", "n_tokens", "n_bytes", "id_bytes"):
            setattr(self, name, line[name])


def _header_bytes(dtype: np.dtype) -> int:
    file = io.BytesIO()
    _write_header(file, dtype, 0)
    return file.tell()


def _write_header(file, dtype: np.dtype, n_tokens: int) -> None:
    """A .npy header; numpy pads it so that a greater length fits the same place."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n_tokens,)}
    np.lib.format.write_array_header_1_0(file, header)
