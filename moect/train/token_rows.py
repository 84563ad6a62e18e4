"""Which tokens have rows of their own in a run: decided when it starts, and from then on as its checkpoints have it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from moect.config import RunConfig
from moect.data.tokens.store import TokenStore, find_store
from moect.data.tokens.unseen import telling_tokens, unseen_tokens
from moect.data.vocabulary.extended_tokenizer import Extension, extension_of
from moect.errors import CheckpointError
from moect.train.checkpoints.reading import Tensors

IDS = "model.embed_tokens.rows.ids"  # in a checkpoint; absent where no token has a row of its own
log = logging.getLogger("moect.train")


def decide_rows(
    config: RunConfig, stores: list[TokenStore], vocab_size: int, checkpoint: Path | None, start: Path | None
) -> list[int]:
    """The tokens whose rows train under `unseen`; [] otherwise.

    Args:
        config: the run.
        stores: one for each source of `data.train`.
        vocab_size: of the tokenizer and the base, the greater.
        checkpoint: what the run is resumed from; its rows stay. None: it is decided now.
        start: the checkpoint of `model.start` that it begins with; its rows stay, and more may come.

    Raises:
        ConfigError: there is no text of old languages to compare with.
    """
    model = config.model
    if model.train_embeddings == "none" and model.extend_tokenizer:
        log.warning("rows of added tokens stay the means of their pieces; `model.train_embeddings: unseen` trains them")
    if model.train_embeddings != "unseen":
        return []
    if checkpoint:
        return kept_rows(checkpoint)
    rows = unseen_tokens(config.data, stores, vocab_size)
    if start:
        rows = sorted({*rows, *kept_rows(start)})
    if not rows and not model.extend_tokenizer:
        log.warning("`model.train_embeddings: unseen` finds none: the old languages use every token of the new ones")
    return rows


def opening_tokens(config: RunConfig, stores: list[TokenStore], vocab_size: int) -> list[int]:
    """The tokens that open the language gate by themselves, of those that have rows; [] where there is no such thing.

    Args:
        config, stores, vocab_size: as in `decide_rows`.
    """
    if not config.has_language_gate or config.model.train_embeddings == "none" or not config.gate.telling_tokens:
        return []
    return telling_tokens(config.data, stores, vocab_size)


def planned_rows(config: RunConfig, tokenizer, cache_folder: Path) -> dict:
    """What can be told to `build_model` of rows and added tokens before the run: as far as the tokenizer and the token
    stores are there. Nothing is made. Where `rows` or `extension` is missing, the model has as many as there can be.

    Args:
        config: the run.
        tokenizer: the run's; None: it is still to be made.
        cache_folder: where token stores are kept.
    """
    known = {}
    if tokenizer is None:
        return known
    if config.model.extend_tokenizer:
        known["extension"] = extension_of(tokenizer)
    if config.model.train_embeddings == "unseen":
        stores = [find_store(source, config.data, tokenizer, cache_folder) for source in config.data.train]
        if all(stores):
            known["rows"] = unseen_tokens(config.data, stores, 1 + max(store.max_token for store in stores))
    return known


def kept_rows(checkpoint: Path) -> list[int]:
    """The tokens that have rows of their own in a checkpoint."""
    tensors = Tensors(checkpoint, "module")
    return tensors[IDS].tolist() if IDS in tensors else []


def widen_rows(tensors: dict[str, Tensor], of_model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with rows for more tokens, those new ones differences of zero.

    Args:
        tensors: by name, as `read_module` gives them.
        of_model: the model's buffers by name; the tokens that have rows now, all of the checkpoint's among them. Those
            of the checkpoint open the gate or not as they did there.
    """
    if IDS not in of_model or IDS not in tensors:
        return tensors
    wider, places = dict(tensors), torch.searchsorted(of_model[IDS].cpu(), tensors[IDS])
    for name in tensors:
        if name.endswith(".rows.ids"):
            wider[name] = of_model[name].cpu().clone()
        elif name.endswith(".rows.opens"):
            wider[name] = of_model[name].cpu().clone()
            wider[name][places] = tensors[name]
        elif name.endswith(".rows.delta"):
            wider[name] = tensors[name].new_zeros(len(of_model[IDS]), tensors[name].shape[1])
            wider[name][places] = tensors[name]
    return wider


def extension_digest(extension: Extension | None) -> str | None:
    """A digest of the tokens that were added to the base's; None where none were."""
    if extension is None:
        return None
    return hashlib.sha256(json.dumps([extension.first_id, extension.pieces]).encode()).hexdigest()


def check_extension(info: dict, extension: Extension | None, where: str) -> None:
    """Whether the rows of added tokens in a checkpoint are of the tokens that are added now.

    Raises:
        CheckpointError: they are of others.
    """
    if info.get("extension") != extension_digest(extension):
        raise CheckpointError(
            f"{where}: made with other tokens added to the base's (`model.extend_tokenizer` learns them from the new "
            "languages in `data.train`); take the same sources and number, or start without `model.start` and resume"
        )
