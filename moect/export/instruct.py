"""From an extended base to an extended chat model: the difference between a chat model and its base is added.

Added to what was frozen, that makes the chat model's own weights. Experts that began as copies of the FFN get the FFN's
difference, each (DeltaMoE, arXiv 2605.18083); experts that began silent stand beside the FFN and stay as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moect.config import ModelConfig
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.errors import ConfigError, DataError, ExportError
from moect.export.trained import TrainedModel
from moect.export.weights import FolderWeights
from moect.model.append import is_appended_tensor
from moect.model.build import load_base_config

SAME = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class ChatModel:
    """The extended chat model.

    Attributes:
        trained: its tensors.
        tokenizer: with the chat template.
        folder: of the chat model that it was made with.
        digests: of that model's files, by name.
    """

    trained: TrainedModel
    tokenizer: object
    folder: Path
    digests: dict[str, str]


def add_instruct_delta(trained: TrainedModel, tokenizer, instruct: str, pickle: bool = False) -> ChatModel:
    """The trained model as if its base had been the chat model, with the chat model's configuration.

    Args:
        trained: base and module.
        tokenizer: of the run.
        instruct: folder or hub name of a chat model made from the same base.
        pickle: whether it may be read from pickled weights.

    Raises:
        ExportError: it is no such chat model.
    """
    subject, where = trained.subject, f"--instruct-delta {instruct}"
    if subject.moe is None:
        raise ExportError(f"{where}: nothing was appended to the base; it serves runs of method moe-ct")
    chat = ModelConfig(base=instruct)
    try:
        config, theirs = load_base_config(chat), load_tokenizer(chat)
    except (ConfigError, DataError) as error:
        raise ExportError(f"{where}: {str(error).removeprefix('model.base ')}") from error
    for key in SAME:
        here, there = getattr(subject.base, key), getattr(config, key, None)
        if here != there:
            raise ExportError(f"{where}: is not made from this base: {key} is {there} there and {here} here")
    folder = _folder(instruct)
    weights = FolderWeights(folder, pickle)
    if missing := [name for name in trained if not is_appended_tensor(name) and name not in weights]:
        raise ExportError(f"{where}: has no {missing[0]}")
    config.dtype = subject.base.dtype
    copies = subject.moe.starts_as_copies(subject.base.intermediate_size)

    def read(name: str) -> Tensor:
        if not is_appended_tensor(name):
            return weights[name]
        if copies and ".moe.experts." in name:
            return trained.exact(name).float() + _ffn_delta(name, trained, weights)
        return trained.exact(name)

    if theirs.get_vocab() != tokenizer.get_vocab():  # tokens were added: the run's tokenizer speaks as theirs does
        tokenizer.chat_template, theirs = theirs.chat_template, tokenizer
    extended = TrainedModel(replace(subject, base=config), trained.slots, read)
    return ChatModel(extended, theirs, folder, weights.digests())


def _ffn_delta(name: str, trained: TrainedModel, weights: FolderWeights) -> Tensor:
    """What the chat model's FFN has more than the base's, in the experts' layout, fp32."""
    start, part = name.split(".moe.experts.")
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    names = [f"{start}.mlp.{p}.weight" for p in parts]
    return torch.cat([weights[n].float() - trained.exact(n).float() for n in names])


def _folder(name: str) -> Path:
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.jinja", "LICEN*"]))
    except Exception as error:  # the hub has many ways to say no
        raise ExportError(f"--instruct-delta {name}: cannot be fetched: {str(error).splitlines()[0]}") from error
