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
    *("num_key_value_heads", "head_dim", "attention_bias", "vocab_size", "tie_word_embeddings"),
)
FAR = 0.5  # a chat model's FFN differs from its base's by less than this share; one of another model by more than all


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
        here, there = getattr(subject.base, key, None), getattr(config, key, None)
        if here != there:
            raise ExportError(f"{where}: is not made from this base: {key} is {there} there and {here} here")
    folder = _folder(instruct, pickle)
    weights = FolderWeights(folder, pickle)
    if missing := [name for name in trained if not is_appended_tensor(name) and name not in weights]:
        raise ExportError(f"{where}: has no {missing[0]}; load it with transformers and save it anew")
    name = "model.layers.0.mlp.down_proj.weight"
    base = trained.exact(name).float()
    if (weights[name].float() - base).norm() > FAR * base.norm():
        raise ExportError(
            f"{where}: is too far from the base to be made from it; give the chat model of this very base"
        )
    config.dtype = subject.base.dtype
    copies = subject.moe.starts_as_copies(subject.base.intermediate_size)

    def read(name: str) -> Tensor:
        if not is_appended_tensor(name):
            return weights[name]
        if copies and ".moe.experts." in name:
            return trained.exact(name).float() + _ffn_delta(name, trained, weights)
        return trained.exact(name)

    theirs = _tokenizer(tokenizer, theirs, where)
    extended = TrainedModel(replace(subject, base=config), trained.slots, read)
    return ChatModel(extended, theirs, folder, weights.digests())


def _tokenizer(ours, theirs, where: str):
    """The chat model's, where it has all tokens of the run's; the run's with the chat's template and end, where tokens
    were added to it."""
    here, there = ours.get_vocab(), theirs.get_vocab()
    if here.items() <= there.items():
        return theirs
    if there.items() <= here.items():
        ours.chat_template, ours.eos_token = theirs.chat_template, theirs.eos_token
        return ours
    raise ExportError(
        f"{where}: its tokenizer and the run's give one id to different tokens; train without model.extend_tokenizer"
    )


def _ffn_delta(name: str, trained: TrainedModel, weights: FolderWeights) -> Tensor:
    """What the chat model's FFN has more than the base's, in the experts' layout, fp32."""
    start, part = name.split(".moe.experts.")
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    names = [f"{start}.mlp.{p}.weight" for p in parts]
    return torch.cat([weights[n].float() - trained.exact(n).float() for n in names])


def _folder(name: str, pickle: bool) -> Path:
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "LICEN*", *(["*.bin"] if pickle else [])]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["consolidated*", "*/*"]))
    except Exception as error:  # the hub has many ways to say no
        raise ExportError(f"--instruct-delta {name}: cannot be fetched: {str(error).splitlines()[0]}") from error
