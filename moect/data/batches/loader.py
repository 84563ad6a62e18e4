"""The loader: which rows an optimizer step takes, and this rank's micro-batches of them.

The rows of a step are a function of the configuration and of the rows drawn before, never of the number of ranks, of
micro-batches or of worker processes.

B rows of a micro-batch, S tokens a row
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moect.config import RunConfig
from moect.data.batches.batch import MicroBatch, RowReader
from moect.data.batches.best_fit import BestFitRows
from moect.data.batches.corpus import Corpus, Documents, corpora_of, source_keys
from moect.data.batches.mixture import Mixture, Segment
from moect.data.batches.packing import JoinedRows
from moect.data.batches.shares import corpus_shares
from moect.data.batches.summary import sample_rows, source_records
from moect.data.batches.workers import Workers
from moect.data.tokens.store import TokenStore, build_store, find_store
from moect.errors import CheckpointError, ConfigError, DataError

log = logging.getLogger("moect.data")

PACKINGS = {"concatenate": JoinedRows, "best-fit": BestFitRows}
DECIDES_ROWS = {"seed": "seed", "sequence_length": "data.sequence_length", "packing": "data.packing"}


class Loader:
    """Micro-batches of all steps, for one rank.

    Args:
        config: reads `data`, `seed`, `train.steps`, `train.batch_size` and `train.micro_batch`.
        tokenizer: a fast Hugging Face tokenizer.
        cache_folder: where token stores are kept.
        rank, world_size: this process, and how many share the steps.
        vocab_size: rows of the model's embedding, to check the tokens against.

    Attributes:
        corpora: of the configuration.
        packed: the rows of each.
        mixture: which corpus gives the next row.
        skipped: rows of each corpus that an earlier run has taken.

    Raises:
        ConfigError: the batch does not divide among the ranks, or no source has a weight.
        DataError: a corpus that cannot be used, a batch larger than an epoch, a token that the model does not have.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer,
        cache_folder: Path,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ):
        assert 0 <= rank < world_size
        self.config, self.rank, self.world_size = config, rank, world_size
        self._configured_replay = config.data.replay  # what holds now may have been raised since
        check_division(config.train.batch_size, config.train.micro_batch, world_size)
        self.stores = [build_store(source, config.data, tokenizer, cache_folder) for source in config.data.train]
        for key, store in zip(source_keys(config.data.train), self.stores, strict=True):
            if vocab_size is not None and store.max_token >= vocab_size:
                raise DataError(
                    f"{key}: the tokenizer gives token {store.max_token}, the model has {vocab_size}; set "
                    "`model.tokenizer` to the model's own"
                )
        self.corpora = corpora_of(config.data)
        self.packed = _pack(config, self.corpora, self.stores)
        self.skipped = [0] * len(self.corpora)
        self._tokens_skipped: list[int] | None = None  # the tokens in them, once somebody has asked
        self.mixture = Mixture(self._shares(tell=rank == 0))
        for corpus, share in zip(self.corpora, self.mixture.weights, strict=True):
            if share == 0 and rank == 0:
                log.warning("%s: has weight 0 and is never read", corpus.key)
        _check_batch(config, self.packed, self.mixture.weights.tolist())
        self._reader = RowReader(self.corpora, self.packed, sorted(config.data.languages))
        self._workers = Workers(self._reader, config.data.workers, self._ahead) if config.data.workers else None

    @property
    def rows(self) -> int:
        """Rows that all steps so far have taken, over all ranks."""
        return sum(self.mixture.drawn)

    @property
    def replay(self) -> float | None:
        """The share of rows of old languages that holds now; None: by size, like the others."""
        return self.config.data.replay

    @property
    def old_share(self) -> float:
        """The share of rows of old languages in the mixture as it is now."""
        weights = self.mixture.weights
        return float(sum(w for w, c in zip(weights, self.corpora, strict=True) if c.role == "old") / sum(weights))

    def set_replay(self, share: float, steps: int) -> None:
        """From the next step on so large a share of the rows is of old languages; checkpoints keep it.

        Args:
            share: in place of `data.replay`, which must be there.
            steps: that the run has before it, those among them that it makes once more.
        """
        self._take_replay(share)
        left = steps * self.config.train.batch_size
        shares = self._shares(self.rows, tuple(self.mixture.drawn), tell=self.rank == 0, left=left)
        self.mixture.change(shares, left)
        self._restart()

    @property
    def change(self) -> dict[str, dict[str, float]] | None:
        """The shares of the corpora by key, `before` and `now`, if they change at the next row; else None."""
        *_, before, now = [None, *self.mixture.segments]
        if before is None or now.row < self.rows:
            return None
        return {"before": self._by_key(before.weights.tolist()), "now": self._by_key(now.weights.tolist())}

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step.

        Micro-batch m of rank r holds rows (m * world_size + r) * micro_batch and following of the step.

        Raises:
            DataError: a worker process ended.
        """
        if self._workers:  # they plan from where the mixture stands when they begin, so this comes before drawing
            train = self.config.train
            count = train.batch_size // (train.micro_batch * self.world_size)
            batches = [self._workers.next() for _ in range(count)]
            self._draw(self.mixture)
            return batches
        return [MicroBatch.of(self._reader[chosen]) for chosen in self._draw(self.mixture)]

    def close(self) -> None:
        """End the worker processes."""
        if self._workers:
            self._workers.close()

    def tokens_seen(self) -> dict[str, int]:
        """By language, in the order of the corpora: tokens, no padding, that all steps so far have taken, over all
        ranks. What an earlier run has taken does not count."""
        if self._tokens_skipped is None:
            self._tokens_skipped = [rows.tokens_before(n) for rows, n in zip(self.packed, self.skipped, strict=True)]
        seen = dict.fromkeys((corpus.lang for corpus in self.corpora), 0)
        for i, corpus in enumerate(self.corpora):
            until_now = self.packed[i].tokens_before(self.skipped[i] + self.mixture.drawn[i])
            seen[corpus.lang] += until_now - self._tokens_skipped[i]
        return seen

    def state_dict(self) -> dict:
        """The position, as plain values; the same on all ranks, whatever worker processes have made ahead.

        `rows` drawn in all, rows `drawn` from each corpus after those `skipped`, the mixture's `segments` and share of
        `replay`, and what gives these numbers their meaning: the fingerprints of the `corpora`'s sources, and how rows
        are cut.
        """
        segments = self.mixture.segments
        return {
            "rows": self.rows,
            "drawn": self._by_key(self.mixture.drawn),
            "skipped": self._by_key(self.skipped),
            "segments": [
                {
                    "row": s.row,
                    "weights": self._by_key(s.weights.tolist()),
                    "drawn": self._by_key(s.drawn),
                    "left": s.left,
                }
                for s in segments
            ],
            "corpora": {corpus.key: self._fingerprint(corpus) for corpus in self.corpora},
            "replay": {"configured": self._configured_replay, "now": self.replay},
            **self._decides_rows(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a position, on any number of ranks.

        Where the configuration gives the corpora other shares than they had, the new ones hold from here on; see
        `change`.

        Raises:
            CheckpointError: it is a position in other data, or none at all.
        """
        mine = self.state_dict()
        if isinstance(state, dict):  # positions of before there were stages have skipped nothing, and so on
            before = {"skipped": dict.fromkeys(mine["drawn"], 0), "segments": [], "packing": "concatenate"}
            state = {**before, "replay": mine["replay"], **state}
        if not _is_position(state) or set(state) != set(mine):
            raise CheckpointError("the checkpoint's data position is incomplete; resume from another checkpoint")
        if problem := _difference(state, mine):
            raise CheckpointError(f"the checkpoint is of other data: {problem}; restore that, or start a new run")
        try:
            drawn, skipped = ([_count(state[name][c.key]) for c in self.corpora] for name in ("drawn", "skipped"))
            segments = [
                Segment(
                    _count(s["row"]),
                    np.array([float(s["weights"][c.key]) for c in self.corpora]),
                    tuple(_count(s["drawn"][c.key]) for c in self.corpora),
                    None if s.get("left") is None else _count(s["left"]),
                )
                for s in state["segments"]
            ]
            if sum(drawn) != state["rows"] or any(sum(s.drawn) != s.row for s in segments):
                raise ValueError("rows do not add up")
            replay, configured = state["replay"]["now"], self._configured_replay
            if state["replay"]["configured"] != configured:  # then what the configuration says now holds
                replay = configured
            self._take_replay(replay if replay is None else float(replay))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "the checkpoint's data position is damaged; resume from another checkpoint"
            ) from error
        self.skipped, self.mixture = skipped, self._mixture(drawn, segments)
        self._restart()

    def go_on_after(self, state: dict) -> None:
        """Begin each corpus where another run's position, `state`, stands in it, so that no document comes twice in an
        epoch. A corpus that the other run did not have, or cut otherwise, begins at its start.

        Raises:
            CheckpointError: it is no position.
        """
        if not _is_position(state):
            raise CheckpointError("the checkpoint's data position is incomplete; start from another checkpoint")
        skipped = state.get("skipped", {})
        for i, corpus in enumerate(self.corpora):
            if _same(state["corpora"].get(corpus.key), self._fingerprint(corpus)):
                try:
                    self.skipped[i] = _count(skipped.get(corpus.key, 0)) + _count(state["drawn"].get(corpus.key))
                except ValueError as error:
                    raise CheckpointError(
                        "the checkpoint's data position is damaged; start from another checkpoint"
                    ) from error
        then = {"packing": "concatenate", **state}
        moved = [name for name, now in self._decides_rows().items() if then.get(name) != now]
        if moved:  # then rows are cut and ordered otherwise
            self.skipped = [0] * len(self.corpora)
        self._restart()
        if self.rank == 0:
            why = f" ({' and '.join(moved)} changed)" if moved else ""
            count = sum(map(bool, self.skipped))
            log.info("%d of %d corpora are read on from where the run before stopped%s", count, len(self.corpora), why)

    def summary(self) -> list[dict]:
        """One record a source: source, the corpus that it is in, lang, role, documents, tokens, bytes and weight (its
        share of the rows that are left); and of its corpus rows_per_epoch, epochs that the run will take it through,
        the share of padding, and the share of documents that are cut. tokens_drawn are those of the whole run."""
        weights = self.mixture.weights.tolist()
        return source_records(self.config, self.corpora, self.stores, self.packed, weights, self.mixture.drawn)

    def samples(self, tokenizer) -> list[dict]:
        """A row of each language to look at; see `sample_rows`."""
        return sample_rows(self.config, self.corpora, self.packed, tokenizer)

    def _shares(
        self, row: int = 0, drawn: tuple[int, ...] | None = None, tell: bool = False, left: int | None = None
    ) -> np.ndarray:
        tokens = [rows.documents.n_tokens for rows in self.packed]
        sizes = [rows.rows_per_epoch for rows in self.packed]
        return np.array(corpus_shares(self.config, self.corpora, tokens, sizes, row, drawn, tell, left))

    def _mixture(self, drawn: list[int], segments: list[Segment]) -> Mixture:
        """A mixture that has come so far; from here on with other shares, where the configuration now gives such."""
        rows = sum(drawn)
        if segments:  # machines may differ in the last bit of a power
            last = segments[-1]
            now = self._shares(last.row, last.drawn, left=last.left)
            same = np.allclose(last.weights, now, rtol=1e-9, atol=1e-12)
        else:  # a position of before there were segments: what was drawn tells the shares, to a row or two
            first = self._shares()
            same = np.abs(first * rows - drawn).max() < 2
            segments = [Segment(0, first if same else np.array(drawn) / rows, (0,) * len(drawn))]
        mixture = Mixture(segments[-1].weights, drawn, segments)
        if not same:
            last = mixture.segments[-1]
            left = None if last.left is None else last.left - (rows - last.row)
            mixture.change(self._shares(rows, tuple(drawn), tell=self.rank == 0, left=left), left)
        return mixture

    def _draw(self, mixture: Mixture) -> list[list[tuple[int, int]]]:
        """The next step: for each of this rank's micro-batches, (corpus, row of the corpus) of its rows."""
        B = self.config.train.micro_batch
        chosen = []
        for _ in range(self.config.train.batch_size):
            corpus = mixture.next()
            chosen.append((corpus, self.skipped[corpus] + mixture.drawn[corpus] - 1))
        return [chosen[start : start + B] for start in range(self.rank * B, len(chosen), self.world_size * B)]

    def _ahead(self) -> Iterator[list[tuple[int, int]]]:
        """This rank's micro-batches from the present position on, as `next_step` will want them."""
        mixture = self.mixture.copy()
        while True:
            yield from self._draw(mixture)

    def _take_replay(self, share: float | None) -> None:
        self.config = replace(self.config, data=replace(self.config.data, replay=share))

    def _restart(self) -> None:
        """Forget what followed from the position before."""
        self._tokens_skipped = None
        if self._workers:
            self._workers.restart()

    def _by_key(self, values) -> dict:
        return dict(zip((corpus.key for corpus in self.corpora), values, strict=True))

    def _fingerprint(self, corpus: Corpus) -> str | dict[str, str]:
        """Of a corpus's store, or of its stores by source."""
        if len(corpus.sources) == 1:
            return self.stores[corpus.sources[0]].fingerprint
        keys = source_keys(self.config.data.train)
        return {keys[i]: self.stores[i].fingerprint for i in corpus.sources}

    def _decides_rows(self) -> dict:
        data = self.config.data
        return {"seed": self.config.seed, "sequence_length": data.sequence_length, "packing": data.packing}


@dataclass
class PlannedData:
    """What can be known of a run's data before it: records as of `Loader.summary`, and samples as of `sample_rows`."""

    records: list[dict]
    samples: list[dict]


def planned_data(config: RunConfig, tokenizer, cache_folder: Path) -> PlannedData:
    """What `Loader.summary` and `Loader.samples` say, as far as it can be known without the network.

    Files are tokenized if need be, as for training; a dataset counts where its tokens are in the cache already. What
    is not known is None: documents, tokens, bytes, rows_per_epoch, epochs and the like of a source that is not
    tokenized, and the weight of every source that shares its rows (among all, or with `data.replay` among those of its
    role) with such a one, unless sizes do not matter.

    Args:
        config: reads `data`, `seed`, `train.steps` and `train.batch_size`.
        tokenizer: a fast Hugging Face tokenizer; None where there is none yet, and then no source is opened.
        cache_folder: where token stores are kept.

    Raises:
        ConfigError, DataError: as `Loader`, as far as it can be known; not for what depends on the ranks and the model.
    """
    data = config.data
    stores = [None] * len(data.train)
    if tokenizer is not None:
        stores = [
            (build_store if source.path else find_store)(source, data, tokenizer, cache_folder) for source in data.train
        ]
    corpora = corpora_of(data)
    packed = _pack(config, corpora, stores)
    tokens = [rows and rows.documents.n_tokens for rows in packed]
    sizes = [rows and rows.rows_per_epoch for rows in packed]
    shares = corpus_shares(config, corpora, tokens, sizes, tell=True)
    if all(packed):
        _check_batch(config, packed, shares)
    records = source_records(config, corpora, stores, packed, shares)
    return PlannedData(records, sample_rows(config, corpora, packed, tokenizer))


def planned_sources(config: RunConfig, tokenizer, cache_folder: Path) -> list[dict]:
    """The records of `planned_data`."""
    return planned_data(config, tokenizer, cache_folder).records


def check_division(batch_size: int, micro_batch: int, world_size: int) -> None:
    """ConfigError unless a step's rows divide into micro-batches on every rank."""
    at_once = micro_batch * world_size
    if batch_size % at_once:
        raise ConfigError(
            f"`train.batch_size` {batch_size} is no multiple of `train.micro_batch` x ranks = {micro_batch} x "
            f"{world_size}; set it to {-(-batch_size // at_once) * at_once}, or change one of the other two"
        )


def _pack(
    config: RunConfig, corpora: list[Corpus], stores: list[TokenStore | None]
) -> list[JoinedRows | BestFitRows | None]:
    """The rows of each corpus; None where a store is not known."""
    packed = []
    for corpus in corpora:
        of_corpus = [stores[i] for i in corpus.sources]
        # a seed for each corpus, so that parallel corpora are not read in step
        seed = (config.seed << 32) + zlib.crc32(corpus.key.encode("utf-8"))
        rows = PACKINGS[config.data.packing]
        known = all(store is not None for store in of_corpus)
        packed.append(rows(Documents(of_corpus), config.data.sequence_length, seed) if known else None)
    return packed


def _check_batch(config: RunConfig, packed: list[JoinedRows | BestFitRows], shares: list[float]) -> None:
    rows = sum(p.rows_per_epoch for p, share in zip(packed, shares, strict=True) if share > 0)
    if config.train.batch_size > rows:
        raise DataError(
            f"`train.batch_size` is {config.train.batch_size} rows, but an epoch of `data.train` has {rows} rows "
            f"of {config.data.sequence_length} tokens; lower it or `data.sequence_length`, or give more text"
        )


def _difference(then: dict, now: dict) -> str | None:
    """What keeps a position from having a meaning in the data of now."""
    was, is_ = _by_source(then["corpora"]), _by_source(now["corpora"])
    if gone := [key for key in was if key not in is_]:
        return f"`{gone[0]}` is no longer in `data.train`"
    if added := [key for key in is_ if key not in was]:
        return f"`{added[0]}` is new in `data.train`"
    if changed := [key for key in is_ if was[key] != is_[key]]:
        return f"the text of `{changed[0]}`, its options or the tokenizer changed"
    for name, key in DECIDES_ROWS.items():
        if then[name] != now[name]:
            return f"`{key}` was {then[name]} and is {now[name]}"
    if apart := [key for key in now["corpora"] if not _same(then["corpora"].get(key), now["corpora"][key])]:
        return (
            f"`{apart[0]}` was not the same corpus; sources of a language are read as one, in their order, unless they "
            "have a `weight`"
        )
    return None


def _is_position(state) -> bool:
    """Whether a value from a file has the tables of a position. What is in them is looked at where it is used."""
    tables = ("corpora", "drawn", "skipped")
    return (
        isinstance(state, dict)
        and all(isinstance(state.get(t, {}), dict) for t in tables)
        and {"corpora", "drawn"} <= set(state)
    )


def _same(then: str | dict | None, now: str | dict) -> bool:
    """Whether two corpora have the same documents with the same numbers: the order of the sources decides too."""
    return list(then.items()) == list(now.items()) if isinstance(then, dict) and isinstance(now, dict) else then == now


def _by_source(corpora: dict) -> dict[str, str]:
    """Fingerprints by source, from those by corpus."""
    flat = {}
    for key, fingerprint in corpora.items():
        flat |= fingerprint if isinstance(fingerprint, dict) else {key: fingerprint}
    return flat


def _count(value) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
