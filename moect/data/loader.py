"""The loader: which rows an optimizer step takes, and this rank's micro-batches of them.

The rows of a step are a function of the configuration and of the rows drawn before, never of the number of ranks.

B rows of a micro-batch, S tokens a row
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moect.config import RunConfig
from moect.data.mixture import Mixture, source_weights
from moect.data.packing import PackedCorpus, Row
from moect.data.sources import source_key
from moect.data.store import TokenStore, build_store, find_store
from moect.data_config import DataConfig, SourceConfig
from moect.errors import CheckpointError, ConfigError, DataError

log = logging.getLogger("moect.data")

ROLES = {"old": 0, "new": 1}
PADDING = -1


@dataclass
class MicroBatch:
    """What a rank takes at once.

    Attributes:
        input_ids_BS: int64.
        labels_BS: int64, already shifted: the next token of the same document, else -100.
        position_ids_BS: int64, from 0 in each document's fragment. Pass them to the model with `use_cache=False` and
            without an attention mask: then documents cannot see one another.
        role_BS: int8, role of the token's language: 0 old, 1 new, -1 padding.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    position_ids_BS: Tensor
    role_BS: Tensor

    def to(self, device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


class Loader:
    """Micro-batches of all steps, for one rank.

    Args:
        config: reads `data`, `seed`, `train.steps`, `train.batch_size` and `train.micro_batch`.
        tokenizer: a fast Hugging Face tokenizer.
        cache_folder: where token stores are kept.
        rank, world_size: this process, and how many share the steps.
        vocab_size: rows of the model's embedding, to check the tokens against.

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
        self.sources = config.data.train
        self.keys = _keys(self.sources)
        self.roles = [config.data.languages[source.lang] for source in self.sources]
        check_division(config.train.batch_size, config.train.micro_batch, world_size)

        self.stores = [build_store(source, config.data, tokenizer, cache_folder) for source in self.sources]
        for key, store in zip(self.keys, self.stores, strict=True):
            if vocab_size is not None and store.max_token >= vocab_size:
                raise DataError(
                    f"{key}: the tokenizer gives token {store.max_token}, the model has {vocab_size}; set "
                    "`model.tokenizer` to the model's own"
                )
        self.corpora = [
            # a seed for each source, so that parallel corpora are not read in step
            PackedCorpus(store, config.data.sequence_length, (config.seed << 32) + zlib.crc32(key.encode("utf-8")))
            for key, store in zip(self.keys, self.stores, strict=True)
        ]
        self.skipped = [0] * len(self.sources)  # rows of each source that an earlier run has taken
        self.weights = self._weights()
        self.mixture = Mixture(self.weights)

        _check_batch(config, self.summary())

    @property
    def rows(self) -> int:
        """Rows that all steps so far have taken, over all ranks."""
        return sum(self.mixture.drawn)

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step.

        Micro-batch m of rank r holds rows (m * world_size + r) * micro_batch and following of the step.
        """
        B = self.config.train.micro_batch
        chosen = []  # (source, row of the source) for each row of the step
        for _ in range(self.config.train.batch_size):
            source = self.mixture.next()
            chosen.append((source, self.skipped[source] + self.mixture.drawn[source] - 1))
        starts = range(self.rank * B, len(chosen), self.world_size * B)
        return [self._micro_batch(chosen[start : start + B]) for start in starts]

    def state_dict(self) -> dict:
        """The position, as plain values; the same on all ranks.

        `rows` drawn in all, rows `drawn` from each source after those `skipped`, and what gives these numbers their
        meaning: the `corpora`'s fingerprints, `seed` and `sequence_length`.
        """
        return {
            "rows": self.rows,
            "drawn": dict(zip(self.keys, self.mixture.drawn, strict=True)),
            "skipped": dict(zip(self.keys, self.skipped, strict=True)),
            "corpora": dict(zip(self.keys, (store.fingerprint for store in self.stores), strict=True)),
            "seed": self.config.seed,
            "sequence_length": self.config.data.sequence_length,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a position, on any number of ranks.

        Raises:
            CheckpointError: it is a position in other data, or none at all.
        """
        mine = self.state_dict()
        if isinstance(state, dict):  # positions of before there were stages have skipped nothing
            state = {"skipped": dict.fromkeys(self.keys, 0), **state}
        if not isinstance(state, dict) or set(state) != set(mine):
            raise CheckpointError("the checkpoint's data position is incomplete; resume from another checkpoint")
        problem = None
        if gone := [key for key in state["drawn"] if key not in mine["drawn"]]:
            problem = f"`{gone[0]}` is no longer in `data.train`"
        elif added := [key for key in mine["drawn"] if key not in state["drawn"]]:
            problem = f"`{added[0]}` is new in `data.train`"
        elif changed := [key for key in self.keys if state["corpora"].get(key) != mine["corpora"][key]]:
            problem = f"the text of `{changed[0]}`, its options or the tokenizer changed"
        else:
            for name, key in (("seed", "seed"), ("sequence_length", "data.sequence_length")):
                if state[name] != mine[name]:
                    problem = f"`{key}` was {state[name]} and is {mine[name]}"
        if problem:
            raise CheckpointError(f"the checkpoint is of other data: {problem}; restore that, or start a new run")
        drawn, skipped = ([state[name].get(key) for key in self.keys] for name in ("drawn", "skipped"))
        if not all(isinstance(n, int) and n >= 0 for n in drawn + skipped) or sum(drawn) != state["rows"]:
            raise CheckpointError("the checkpoint's data position is damaged; resume from another checkpoint")
        self.skipped = skipped
        self.mixture = Mixture(self.weights, drawn)

    def go_on_after(self, state: dict) -> None:
        """Begin each corpus where another run's position, `state`, stands in it, so that no document comes twice in an
        epoch. A corpus that the other run did not have, or cut otherwise, begins at its start."""
        skipped = state.get("skipped", {})
        for i, key in enumerate(self.keys):
            if state["corpora"].get(key) == self.stores[i].fingerprint:
                self.skipped[i] = skipped.get(key, 0) + state["drawn"][key]
        moved = [name for name in ("seed", "sequence_length") if state[name] != self.state_dict()[name]]
        if moved:  # then rows are cut and ordered otherwise
            self.skipped = [0] * len(self.keys)
        if self.rank == 0:
            why = f" ({' and '.join(moved)} changed)" if moved else ""
            count = sum(map(bool, self.skipped))
            log.info("%d of %d corpora are read on from where the run before stopped%s", count, len(self.keys), why)

    def summary(self) -> list[dict]:
        """One record a source: source, lang, role, documents, tokens, bytes, weight (its share of the rows),
        rows_per_epoch, and epochs that `train.steps` will take it through."""
        return _summary(self.config, self.stores, self.weights.tolist())

    def _weights(self) -> np.ndarray:
        weights = np.array(_shares(self.config.data, [store.n_tokens for store in self.stores]))
        for key, weight in zip(self.keys, weights, strict=True):
            if weight == 0:
                log.warning("%s: has weight 0 and is never read", key)
        return weights

    def _micro_batch(self, chosen: list[tuple[int, int]]) -> MicroBatch:
        rows = [self.corpora[source].row(index) for source, index in chosen]
        role_B = [ROLES[self.roles[source]] for source, _ in chosen]
        return MicroBatch(
            input_ids_BS=_stack([row.input_ids_S for row in rows]),
            labels_BS=_stack([row.labels_S for row in rows]),
            position_ids_BS=_stack([row.position_ids_S for row in rows]),
            role_BS=_stack([_role_S(row, role) for row, role in zip(rows, role_B, strict=True)]),
        )


def planned_sources(config: RunConfig, tokenizer, cache_folder: Path) -> list[dict]:
    """The records of `Loader.summary` as far as they can be known without the network.

    Files are tokenized if need be, as for training; a dataset counts where its tokens are in the cache already. What
    is not known is None: documents, tokens, bytes, rows_per_epoch and epochs of a source that is not tokenized, and the
    weight of every source that shares its rows (among all, or with `data.replay` among those of its role) with such
    a one, unless all of these have a `weight`.

    Args:
        config: reads `data`, `train.steps` and `train.batch_size`.
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
    records = _summary(config, stores, _shares(data, [store and store.n_tokens for store in stores]))
    if all(stores):
        _check_batch(config, records)
    return records


def _summary(config: RunConfig, stores: list[TokenStore | None], weights: list[float | None]) -> list[dict]:
    """See `Loader.summary`; None for a store or a weight that is not known."""
    rows = config.train.steps * config.train.batch_size
    records = []
    for source, key, store, weight in zip(config.data.train, _keys(config.data.train), stores, weights, strict=True):
        rows_per_epoch = store and PackedCorpus(store, config.data.sequence_length, config.seed).rows_per_epoch
        records.append(
            {
                "source": key,
                "lang": source.lang,
                "role": config.data.languages[source.lang],
                "documents": store and store.n_documents,
                "tokens": store and store.n_tokens,
                "bytes": store and store.n_bytes,
                "weight": weight,
                "rows_per_epoch": rows_per_epoch,
                "epochs": None if store is None or weight is None else weight * rows / rows_per_epoch,
            }
        )
    return records


def _shares(data: DataConfig, tokens: list[int | None]) -> list[float | None]:
    """The share of rows of each source, from the tokens that it has; None for both where it is not known."""
    roles = [data.languages[source.lang] for source in data.train]
    explicit = [source.weight for source in data.train]
    groups = roles if data.replay is not None else ["any"] * len(roles)
    known = {}
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        without = [i for i in members if explicit[i] is None]
        if without and len(without) < len(members):
            log.warning(
                "data.train: some sources of %s role have a `weight` and some do not; theirs is their tokens", group
            )
        known[group] = not without or len(members) == 1 or all(tokens[i] is not None for i in members)
    # where a size is not known any will do: it decides nothing, or the shares of its group are not told
    sizes = [1 if n is None else n for n in tokens]
    weights = source_weights(sizes, roles, explicit, data.replay, data.temperature)
    return [weight if known[group] else None for weight, group in zip(weights.tolist(), groups, strict=True)]


def _keys(sources: list[SourceConfig]) -> list[str]:
    """A name for each source that does not depend on `data.root`; the second of the same name gets `#2`."""
    seen = Counter()
    keys = []
    for key in map(source_key, sources):
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return keys


def _check_batch(config: RunConfig, records: list[dict]) -> None:
    rows = sum(record["rows_per_epoch"] for record in records if record["weight"] > 0)
    if config.train.batch_size > rows:
        raise DataError(
            f"`train.batch_size` is {config.train.batch_size} rows, but an epoch of `data.train` has {rows} rows "
            f"of {config.data.sequence_length} tokens; lower it or `data.sequence_length`, or give more text"
        )


def check_division(batch_size: int, micro_batch: int, world_size: int) -> None:
    """ConfigError unless a step's rows divide into micro-batches on every rank."""
    at_once = micro_batch * world_size
    if batch_size % at_once:
        raise ConfigError(
            f"`train.batch_size` {batch_size} is no multiple of `train.micro_batch` x ranks = {micro_batch} x "
            f"{world_size}; set it to {-(-batch_size // at_once) * at_once}, or change one of the other two"
        )


def _role_S(row: Row, role: int) -> np.ndarray:
    return np.where(row.valid_S, role, PADDING).astype(np.int8)


def _stack(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))
