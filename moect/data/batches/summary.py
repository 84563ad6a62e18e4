"""What the corpora of a run are and give: a record a source, and a row to look at from each language."""

from __future__ import annotations

import numpy as np

from moect.config import RunConfig
from moect.data.batches.best_fit import BestFitRows
from moect.data.batches.corpus import Corpus, source_keys
from moect.data.batches.packing import JoinedRows
from moect.data.tokens.store import TokenStore

SHOWN = 3  # documents of a sample
SHOWN_CHARACTERS = 100  # of each


def source_records(
    config: RunConfig,
    corpora: list[Corpus],
    stores: list[TokenStore | None],
    packed: list[JoinedRows | BestFitRows | None],
    shares: list[float | None],
    drawn: list[int] | None = None,
) -> list[dict]:
    """See `Loader.summary`; None for whatever hangs on a store or a share that is not known.

    Args:
        config: reads `data`, `train.steps` and `train.batch_size`.
        corpora: of the configuration.
        stores: of each source.
        packed, shares: of each corpus; its rows, and its share of the rows that are left.
        drawn: rows that the run has taken from each corpus already.
    """
    drawn = drawn or [0] * len(corpora)
    rows_left = max(0, config.train.steps * config.train.batch_size - sum(drawn))
    keys = source_keys(config.data.train)
    records = {}
    for corpus, rows, share, before in zip(corpora, packed, shares, drawn, strict=True):
        epochs = None if rows is None or share is None else (before + share * rows_left) / rows.rows_per_epoch
        for i in corpus.sources:
            store = stores[i]
            part = 1.0 if len(corpus.sources) == 1 else rows and store.n_tokens / rows.documents.n_tokens
            records[i] = {
                "source": keys[i],
                "corpus": corpus.key,
                "lang": corpus.lang,
                "role": corpus.role,
                "documents": store and store.n_documents,
                "tokens": store and store.n_tokens,
                "bytes": store and store.n_bytes,
                "weight": None if share is None or part is None else share * part,
                "rows_per_epoch": rows and rows.rows_per_epoch,
                "epochs": epochs,
                "tokens_drawn": None if epochs is None else round(epochs * rows.tokens_per_epoch * part),
                "padding": rows and 1 - rows.tokens_per_epoch / (rows.rows_per_epoch * rows.sequence_length),
                "cut": rows and rows.share_cut(),
            }
    return [records[i] for i in range(len(keys))]


def language_records(records: list[dict]) -> list[dict]:
    """The records of sources, by language, in the order of first appearance: lang, role, documents, tokens, bytes,
    weight, tokens_drawn, epochs, padding, cut, and the list of its `sources`' records.

    Shares of padding and of cut documents are means over corpora, by the rows that are drawn of each and by their
    documents; epochs are tokens drawn by tokens there are, which of a single corpus are the corpus's own.
    """
    languages: dict[str, list[dict]] = {}
    for record in records:
        languages.setdefault(record["lang"], []).append(record)
    return [
        {
            "lang": lang,
            "role": sources[0]["role"],
            **{key: _sum(sources, key) for key in ("documents", "tokens", "bytes", "weight", "tokens_drawn")},
            "epochs": _mean(sources, "epochs", "tokens"),
            "padding": _mean(sources, "padding", "weight"),
            "cut": _mean(sources, "cut", "documents"),
            "sources": sources,
        }
        for lang, sources in languages.items()
    ]


def sample_rows(
    config: RunConfig, corpora: list[Corpus], packed: list[JoinedRows | BestFitRows | None], tokenizer
) -> list[dict]:
    """The first row of the first corpus that can be read of each language, for reading: lang, corpus, the number of
    documents in the row, the share of padding, and the text of the first few.

    In the text `⟦` stands where a document begins and `⟧` where it ends; one that goes on from, or in, another row has
    no such mark there. `…` stands for characters that are left out.
    """
    samples = {}
    for corpus, rows in zip(corpora, packed, strict=True):
        if rows is None or corpus.lang in samples:
            continue
        row = rows.row(0)
        shown = [_shown(rows, fragment, tokenizer) for fragment in row.fragments_F4[:SHOWN]]
        samples[corpus.lang] = {
            "lang": corpus.lang,
            "corpus": corpus.key,
            "documents": len(row.fragments_F4),
            "padding": float(np.mean(~row.valid_S)),
            "text": shown,
        }
    return list(samples.values())


def _shown(rows: JoinedRows | BestFitRows, fragment: np.ndarray, tokenizer) -> str:
    """A fragment as text on one line, its middle left out where it is long."""
    which, document, first, last = fragment.tolist()
    store = rows.documents.stores[which]
    start, stop = store.offsets[document : document + 2].tolist()
    ids = store.tokens[start + first : start + last + 1].astype(np.int64).tolist()
    text = " ".join(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).split())
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return ("⟦" if first == 0 else "") + text + ("⟧" if start + last + 1 == stop else "")


def _sum(records: list[dict], key: str):
    values = [record[key] for record in records]
    return None if None in values else sum(values)


def _mean(records: list[dict], key: str, weight: str) -> float | None:
    """The mean of a key, by another."""
    if any(record[key] is None or record[weight] is None for record in records):
        return None
    total = sum(record[weight] for record in records)
    if not total:
        return sum(record[key] for record in records) / len(records)
    return sum(record[key] * record[weight] for record in records) / total
