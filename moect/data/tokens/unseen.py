"""Tokens that the new languages use and the old ones hardly do: their embeddings the base cannot have learned well.

V tokens of the vocabulary
"""

from __future__ import annotations

import numpy as np

from moect.data.tokens.store import TokenStore
from moect.data_config import DataConfig
from moect.errors import ConfigError

SHARE = 1e-6  # of the old languages' tokens, at most
AT_ONCE = 2**24  # tokens counted at once: 128 MiB as int64


def unseen_tokens(config: DataConfig, stores: list[TokenStore], vocab_size: int) -> list[int]:
    """Tokens that occur in the new languages' text and are at most SHARE of the old languages', ascending.

    Args:
        config: reads `train` and `languages`.
        stores: one for each source of `train`.
        vocab_size: V, beyond every token of the stores.

    Raises:
        ConfigError: there is no text of old languages to compare with.
    """
    new_V, old_V = _counts(config, stores, vocab_size)
    if not old_V.any():
        raise ConfigError(
            "`model.train_embeddings: unseen` compares with text of old languages, and `data.train` has none; add "
            "some, or set it to `all` or `none`"
        )
    return ((new_V > 0) & (old_V <= SHARE * old_V.sum())).nonzero()[0].tolist()


def telling_tokens(config: DataConfig, stores: list[TokenStore], vocab_size: int) -> list[int]:
    """Tokens of the new languages' text that the old languages' text never has, ascending: they tell a text as new.

    Args:
        config, stores, vocab_size: as `unseen_tokens`; there is text of old languages.
    """
    new_V, old_V = _counts(config, stores, vocab_size)
    return ((new_V > 0) & (old_V == 0)).nonzero()[0].tolist()


def counts_by_language(config: DataConfig, stores: list[TokenStore], vocab_size: int) -> dict[str, np.ndarray]:
    """How often each token occurs in the text of each language, int64 (V,); arguments as `unseen_tokens`."""
    counts_V = {source.lang: np.zeros(vocab_size, dtype=np.int64) for source in config.train}
    for source, store in zip(config.train, stores, strict=True):
        for start in range(0, store.n_tokens, AT_ONCE):
            counts_V[source.lang] += np.bincount(store.tokens[start : start + AT_ONCE], minlength=vocab_size)
    return counts_V


def _counts(config: DataConfig, stores: list[TokenStore], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each token occurs in text of new (or learnt) and of old languages, int64 (V,)."""
    of_role = {role: np.zeros(vocab_size, dtype=np.int64) for role in ("new", "old")}
    for language, counts_V in counts_by_language(config, stores, vocab_size).items():
        of_role["old" if config.languages[language] == "old" else "new"] += counts_V
    return of_role["new"], of_role["old"]
