"""`moect prepare --inspect`: what is wrong with corpora, told and not mended.

One pass over every training document, shared among processes, then one over what was noted of them:

- documents that are there twice, the same or nearly, in one source or in several (`duplicates.py`);
- held-out text in training text (`contamination.py`);
- documents in another language than their source's (`language_id.py`).

Memory: some 120 bytes a document, and the index of the evaluation text. Disk, in the cache folder while it works: some
220 bytes a document and 4 a word.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TextIO

import numpy as np

from moect.config import RunConfig
from moect.data.inspection.columns import Columns
from moect.data.inspection.contamination import EvaluationIndex
from moect.data.inspection.duplicates import first_alike, near_copies
from moect.data.inspection.inspector import Batch, Inspector, Noted, inspect_batches
from moect.data.inspection.language_id import SURE, labels_of
from moect.data.inspection.table import language_totals
from moect.data.reading.evaluation import EvaluationText, load_evaluation
from moect.data.reading.progress import Progress
from moect.data.reading.sources import read_documents
from moect.data_config import DataConfig, source_key
from moect.errors import DataError
from moect.processes import available_cores

log = logging.getLogger("moect.data")

BATCH_DOCUMENTS, BATCH_BYTES = 512, 1 << 20  # a batch is full when it has either
MOSTLY = 0.5  # of an evaluation document's runs


def inspect_data(
    config: RunConfig, cache_folder: Path, output: Path, sample: float = 1.0, workers: int | None = None
) -> dict:
    """Inspect all training text of a run, and write what is found.

    Args:
        config: reads `data`.
        cache_folder: of datasets' commits and evaluation text; holds temporary files too.
        output: folder for `inspection.json`, which holds what is returned, and `findings.jsonl`, a line for each
            finding: `kind` (exact, near, contamination or language), `source`, `document`, `partner_source`, `partner`
            (the document that it is a copy of, the evaluation document, or the language that it is in) and `score`
            (similarity, share of the evaluation document's runs, or probability).
        sample: share of the documents to look at.
        workers: processes; None: one for each core.

    Returns:
        plain values: `sample`; `sources` in the order of `data.train` and their sums by language, `languages`, both as
        `_row` makes them; `between`, copies by pair of sources; `evaluation`, for each text of `data.evaluation` how
        many of its documents occur in training text, in which sources, and how many mostly.

    Raises:
        DataError: text that cannot be read (see `read_documents`), no space on disk, or a process that ended.
    """
    if not 0 < sample <= 1:
        raise DataError(f"a sample of {sample:g} of the documents cannot be taken: give a share above 0, at most 1")
    evaluation = load_evaluation(config.data, cache_folder)
    index = EvaluationIndex([document.full_text for text in evaluation for document in text.documents])
    try:
        for folder in (cache_folder, output):
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="inspection-", dir=cache_folder) as scratch:
            unfinished = Path(scratch) / "findings.jsonl"
            with closing(Columns(Path(scratch))) as columns, unfinished.open("w", encoding="utf-8") as findings:
                inspection = _Inspection(config.data, evaluation, index, columns, findings)
                inspection.read(Inspector(index, sample), cache_folder, workers or available_cores())
                result = {"sample": sample, **inspection.conclude()}
            shutil.move(unfinished, output / "findings.jsonl")
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        (output / "inspection.json").write_text(text, encoding="utf-8")
    except OSError as error:
        place = error.filename or output
        raise DataError(f"{place}: cannot be written ({error.strerror or error}); free or choose another") from error
    return result


@dataclass
class _Seen:
    """What is counted of one source while it is read."""

    labels: frozenset[str]  # of its language; empty: it cannot be judged
    documents: int = 0
    n_bytes: int = 0
    holding: int = 0  # evaluation text
    unsure: int = 0
    others: Counter = field(default_factory=Counter)  # documents by the language that they are in instead
    held: np.ndarray | None = None  # (E,) bool: evaluation documents that occur in it


class _Inspection:
    """All sources of a run: what is noted of their documents, and what follows from it."""

    def __init__(
        self,
        data: DataConfig,
        evaluation: list[EvaluationText],
        index: EvaluationIndex,
        columns: Columns,
        findings: TextIO,
    ):
        self.data, self.evaluation, self.index = data, evaluation, index
        self.columns, self.findings = columns, findings
        self.seen = [_Seen(labels_of(s.lang), held=np.zeros(len(index.entries), dtype=bool)) for s in data.train]
        self.runs_found = np.zeros(index.n_runs, dtype=bool)
        self.names = [source_key(source) for source in data.train]
        documents = ((text, document) for text in evaluation for document in text.documents)
        self.places = [(f"{text.lang} {text.domain}", document.id) for text, document in documents]
        for lang in dict.fromkeys(s.lang for s, seen in zip(data.train, self.seen, strict=True) if not seen.labels):
            log.info("%s: a language that the identification does not know; its documents are not judged", lang)

    def read(self, inspector: Inspector, cache_folder: Path, workers: int) -> None:
        """Read every source, and note what is to be known of its documents."""
        batches = inspect_batches(inspector, self._batches(cache_folder), workers)
        for number, of_source in groupby(batches, key=lambda pair: pair[0].source):
            progress = Progress(self.names[number], self.data.train[number].limit, verb="inspected")
            try:
                for batch, noted in of_source:
                    self._note(batch, noted)
                    progress.add(len(batch.texts), batch.n_bytes, progress.documents + len(batch.texts))
            finally:
                progress.end()

    def _batches(self, cache_folder: Path) -> Iterator[Batch]:
        for number, source in enumerate(self.data.train):
            judge = bool(self.seen[number].labels)
            batch = Batch(number, judge)
            for document in read_documents(source, self.data.root, self.data.max_bad_fraction, cache_folder):
                batch.add(document.id, document.text)
                if len(batch.texts) == BATCH_DOCUMENTS or batch.n_bytes >= BATCH_BYTES:
                    yield batch
                    batch = Batch(number, judge)
            yield batch

    def _note(self, batch: Batch, noted: Noted) -> None:
        for name, values in noted.columns.items():
            self.columns.append(name, values)
        ids = [batch.ids[number] for number in noted.taken]
        names = [name.encode() for name in ids]
        self.columns.append("id", np.frombuffer(b"".join(names), dtype=np.uint8))
        self.columns.append("id-size", np.array([len(name) for name in names], dtype=np.int64))
        seen = self.seen[batch.source]
        seen.documents += len(ids)
        seen.n_bytes += int(noted.columns["bytes"].sum())
        for name, (label, probability) in zip(ids, noted.languages, strict=batch.judge):
            if label in seen.labels:
                continue
            if probability < SURE:
                seen.unsure += 1
                continue
            seen.others[label] += 1
            self._find("language", batch.source, name, None, label, probability)
        matches = noted.matches
        self.runs_found[matches.runs] = True
        seen.held[matches.evaluation] = True
        seen.holding += len(np.unique(matches.document))
        best: dict[tuple[int, str], tuple[float, str]] = {}  # one finding for a document and an evaluation text
        for number, other, share in zip(
            *(values.tolist() for values in (matches.document, matches.evaluation, matches.share)), strict=True
        ):
            text, place = self.places[other]
            if share > best.get((number, text), (0.0, ""))[0]:
                best[number, text] = share, place
        for (number, text), (share, place) in best.items():
            self._find("contamination", batch.source, ids[number], text, place, share)

    def conclude(self) -> dict:
        """What follows from all that was noted."""
        column = self.columns.read
        keys = column("key")
        documents = np.arange(len(keys))
        offsets = np.concatenate([[0], np.cumsum(column("size"))])
        exact = first_alike(keys)
        near = near_copies(
            np.flatnonzero(exact == documents), lambda n: column(f"band-{n}"), column("shingles"), offsets
        )
        copies = {"exact": (exact, exact, None), "near": (near.cluster, near.partner, near.similarity)}
        ends = np.cumsum([seen.documents for seen in self.seen])
        of_source = np.repeat(np.arange(len(self.seen)), np.diff(ends, prepend=0))
        self._find_copies(copies, of_source)
        firsts = {kind: first for kind, (first, _, _) in copies.items()}
        sources = [self._row(number, firsts, end - self.seen[number].documents, end) for number, end in enumerate(ends)]
        return {
            "sources": sources,
            "languages": language_totals(sources),
            "between": self._between(firsts, of_source),
            "evaluation": self._evaluation_rows(),
        }

    def _row(self, number: int, firsts: dict[str, np.ndarray], begin: int, end: int) -> dict:
        """One source, documents `begin` to `end`: how many they are, their bytes, and how many of them are what."""
        source, seen, n_bytes = self.data.train[number], self.seen[number], self.columns.read("bytes")
        row = {
            "source": self.names[number],
            "lang": source.lang,
            "role": self.data.languages[source.lang],
            "documents": seen.documents,
            "bytes": seen.n_bytes,
        }
        for kind, first in firsts.items():
            copies = begin + np.flatnonzero(first[begin:end] != np.arange(begin, end))
            row[f"{kind}_copies"] = len(copies)
            row[f"{kind}_copy_bytes"] = int(n_bytes[copies].sum())
            row[f"{kind}_copies_of_other_sources"] = int((first[copies] < begin).sum())
        row["holding_evaluation_text"] = seen.holding
        judged = {
            "other_language": seen.others.total(),
            "unsure": seen.unsure,
            "others": dict(seen.others.most_common()),
        }
        return row | (judged if seen.labels else dict.fromkeys(judged))

    def _between(self, firsts: dict[str, np.ndarray], of_source: np.ndarray) -> list[dict]:
        """How many documents of a source are copies of documents of an earlier one, for all pairs that have any."""
        n = len(self.names)
        counts = {
            kind: np.bincount(of_source * n + of_source[first], minlength=n * n).reshape(n, n)
            for kind, first in firsts.items()
        }
        return [
            {
                "source": self.names[source],
                "of": self.names[other],
                **{kind: int(count[source, other]) for kind, count in counts.items()},
            }
            for source, other in np.argwhere(sum(counts.values())).tolist()
            if source != other
        ]

    def _evaluation_rows(self) -> list[dict]:
        """For each evaluation text, what of it occurs in training text."""
        coverage = self.index.coverage(self.runs_found)
        rows, begin = [], 0
        for text in self.evaluation:
            mine = slice(begin, begin + len(text.documents))
            begin = mine.stop
            by_source = [int(seen.held[mine].sum()) for seen in self.seen]
            rows.append(
                {
                    "lang": text.lang,
                    "domain": text.domain,
                    "documents": len(text.documents),
                    "without_words": int((self.index.entries[mine] == 0).sum()),
                    "contaminated": int((coverage[mine] > 0).sum()),
                    "mostly": int((coverage[mine] >= MOSTLY).sum()),
                    "by_source": [
                        {"source": name, "documents": n} for name, n in zip(self.names, by_source, strict=True) if n
                    ],
                }
            )
        return rows

    def _find_copies(self, copies: dict, of_source: np.ndarray) -> None:
        ends = np.cumsum(self.columns.read("id-size"))
        characters = self.columns.read("id")

        def name(document: int) -> str:
            return characters[ends[document - 1] if document else 0 : ends[document]].tobytes().decode()

        for kind, (first, partner, similarity) in copies.items():
            for document in np.flatnonzero(first != np.arange(len(first))).tolist():
                other = int(partner[document])
                score = 1.0 if similarity is None else similarity[document]
                place = self.names[of_source[other]], name(other)
                self._find(kind, of_source[document], name(document), *place, score)

    def _find(self, kind: str, source: int, document: str, partner_source: str | None, partner: str, score) -> None:
        line = {
            "kind": kind,
            "source": self.names[source],
            "document": document,
            "partner_source": partner_source,
            "partner": partner,
            "score": round(float(score), 4),
        }
        self.findings.write(json.dumps(line, ensure_ascii=False) + "\n")
