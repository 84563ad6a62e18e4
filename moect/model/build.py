"""From a configuration to a model: load or make the base, then add what the method trains.

After `build_model` exactly the parameters that train have `requires_grad`, whatever the method.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moect.config import ModelConfig, RunConfig
from moect.errors import ConfigError, UnsupportedModelError
from moect.model.append import append_moe, base_only, modules_of, train_parts
from moect.model.block_expansion import insert_blocks, inserted_blocks, without_inserted
from moect.model.embeddings import append_rows, rows_of
from moect.model.families import check_config
from moect.model.partition import divide, dividing, loading_divided

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_base_config(config: ModelConfig, key: str = "model.base"):
    """The base's Hugging Face config; `key` is what the user calls it.

    Raises:
        ConfigError: it cannot be found or read, or `model.from_config` is not a config of its family.
    """
    from transformers import AutoConfig

    if config.from_config is not None:
        values = dict(config.from_config)
        try:
            return AutoConfig.for_model(values.pop("model_type"), **values)
        except Exception as error:  # transformers has many ways to say no
            raise ConfigError(f"model.from_config: {_first_line(error)}") from error
    try:
        return AutoConfig.from_pretrained(config.base, **_source(config))
    except Exception as error:
        raise ConfigError(
            f"{key} {config.base!r} cannot be loaded: {_first_line(error)}; give a folder in Hugging Face format or a "
            "hub name"
        ) from error


def load_base(
    config: ModelConfig, dtype: torch.dtype, seed: int = 0, meta: bool = False, zero3: dict | None = None
) -> nn.Module:
    """The base as a transformers causal LM, in evaluation mode.

    Args:
        config: which base.
        dtype: of its weights in memory.
        seed: of the weights of a base made from scratch.
        meta: make shapes only, read no weights.
        zero3: DeepSpeed's settings; then each parameter is divided among the ranks as it is read. A base made from
            scratch is divided when it is there: its random weights must not depend on the ranks.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    hf_config = load_base_config(config)
    kwargs = {"attn_implementation": config.attention, "dtype": dtype}
    if meta or config.from_config is not None:
        with torch.device("meta") if meta else torch.random.fork_rng():
            if not meta:
                torch.manual_seed(seed)
            try:
                model = AutoModelForCausalLM.from_config(
                    hf_config, trust_remote_code=config.trust_remote_code, **kwargs
                ).eval()
            except Exception as error:
                raise ConfigError(f"model: no model can be made of this config: {_first_line(error)}") from error
        if zero3 and not meta:
            divide(model, zero3)
        return model
    if os.path.isdir(config.base):
        _check_shapes(config, load_base(config, dtype, meta=True))
    try:
        # safetensors only: a pickled checkpoint could run code
        with loading_divided(zero3) if zero3 else nullcontext():
            model, report = AutoModelForCausalLM.from_pretrained(
                config.base, use_safetensors=True, output_loading_info=True, **kwargs, **_source(config)
            )
    except Exception as error:
        raise ConfigError(f"model.base {config.base!r} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # transformers has made them up, on each rank others
        raise ConfigError(
            f"model.base {config.base!r} is incomplete: its files lack {len(missing)} of the model's tensors, first "
            f"{missing[0]}; fetch or save it anew"
        )
    return model.eval()


def build_model(
    config: RunConfig,
    meta: bool = False,
    zero3: dict | None = None,
    rows: list[int] | None = None,
    extension=None,
    opening: Collection[int] = (),
) -> nn.Module:
    """Base plus what `config.method` trains.

    Args:
        config: the run.
        meta: make shapes only.
        zero3: DeepSpeed's settings of a run with ZeRO-3. Then parameters are divided among the ranks as they come,
            with the values they have undivided (LoRA's own few are left whole), and every rank must call.
        rows: for `model.train_embeddings: unseen`, the tokens whose rows train; those that were added may be among
            them. None: it is not known which; shapes are made as if it were all of them, which is the most.
        extension: `moect.data.vocabulary.extended_tokenizer.Extension`, the tokens that were added to the base's, with
            what they are made of. None: no token was, or it is not known which; then there are as many as may be.
        opening: the tokens that open the language gate, of those that have rows; where a checkpoint is read afterwards,
            it says which.

    Returns:
        A transformers causal LM in `train.precision`; what trains has `requires_grad`.

    Raises:
        ConfigError, UnsupportedModelError: the base cannot be loaded, or cannot be extended.
    """
    check_config(load_base_config(config.model))  # before gigabytes are read
    if not meta and (
        (config.model.train_embeddings == "unseen" and rows is None)
        or (config.model.extend_tokenizer and extension is None)
    ):
        raise ValueError("a model to train needs to know its rows and added tokens; only shapes do without")
    model = load_base(config.model, DTYPES[config.train.precision], config.seed, meta, zero3)
    if config.method == "full":
        return model.requires_grad_(True)
    if config.method == "lora":
        return _add_lora(model, config)
    if config.method == "block-expansion":
        return insert_blocks(model, config.expansion, within=dividing if zero3 else None)
    append_moe(model, config.moe, config.seed, within=dividing if zero3 else None)
    _add_rows(model, config.model, rows, extension, opening, dividing if zero3 else None)
    if config.train.parts != "all":
        train_parts(model, config.train.parts)
    return model


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters: `total`, `trainable`, and `active`, those that one token meets (K of E experts)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for moe in modules_of(model):
        trained = moe.experts.shape[0]
        per_expert = sum(p.numel() for p in moe.experts.parameters()) // trained
        idle += per_expert * max(0, trained - moe.config.top_k)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "active": total - idle}


def holds_base(model: nn.Module) -> bool:
    """Whether what trains stands apart from the base, so that one model is both."""
    return bool(modules_of(model) or lora_layers(model) or inserted_blocks(model))


@contextmanager
def base_view(model: nn.Module):
    """Inside, the model computes what its base computes, where `holds_base`.

    Raises:
        UnsupportedModelError: everything was trained, so the base is not in the model any more.
    """
    if modules_of(model):
        with base_only(model):
            yield model
    elif lora_layers(model):
        for layer in lora_layers(model):
            layer.enable_adapters(False)
        try:
            yield model
        finally:
            for layer in lora_layers(model):
                layer.enable_adapters(True)
    elif inserted_blocks(model):
        with without_inserted(model):
            yield model
    else:
        raise UnsupportedModelError("a model trained in full does not hold its base; load the base by itself")


def base_fingerprint(config: ModelConfig, seed: int = 0, files: dict[str, str] | None = None) -> str:
    """A digest of the base, the same wherever it lies: of its config and safetensors files, or of shape and seed.

    Args:
        config: which base.
        seed: of the weights of a base made from scratch.
        files: what `base_files` returned; None: it is asked.
    """
    if config.from_config is not None:
        made = {"from_config": config.from_config, "seed": seed}
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    where_and_who = ("_name_or_path", "transformers_version", "architectures", "dtype", "auto_map")
    values = {k: v for k, v in load_base_config(config).to_dict().items() if k not in where_and_who}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, of_file in (base_files(config) if files is None else files).items():
        digest.update(name.encode() + bytes.fromhex(of_file))
    return digest.hexdigest()


def base_files(config: ModelConfig) -> dict[str, str]:
    """The sha256 of each of the base's safetensors files, by name, in order; none of a base made from scratch."""
    files = {}
    for path in sorted(weights_folder(config).glob("*.safetensors")) if config.from_config is None else ():
        with path.open("rb") as file:
            files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return files


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that carry a low-rank update; empty for a model without."""
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "enable_adapters")]


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every low-rank update to its weight, in place, and put the plain layers back."""
    for name, layer in [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "merge")]:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


def _add_rows(model: nn.Module, config: ModelConfig, rows: list[int] | None, extension, opening, within) -> nn.Module:
    """Rows of embedding and head, as `model.train_embeddings` and the added tokens want them."""
    V = model.model.embed_tokens.num_embeddings
    first_id, pieces = (
        (extension.first_id, extension.pieces) if extension else (V, [[0]] * (config.extend_tokenizer or 0))
    )
    ids = [] if config.train_embeddings == "none" else range(min(V, first_id))  # spare rows beyond are nobody's
    if config.train_embeddings == "unseen" and rows is not None:
        ids = [i for i in rows if i < V]
    if not ids and not pieces:
        return model
    append_rows(model, ids, first_id, pieces, within, opening)
    if config.train_embeddings == "none":
        for of_place in rows_of(model):
            of_place.requires_grad_(False)
    return model


def _add_lora(model: nn.Module, config: RunConfig) -> nn.Module:
    import peft

    lora = config.lora
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            # inside a PeftModel the same module objects: the causal LM itself, its linear layers wrapped
            return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).get_base_model()
        except ValueError as error:
            raise ConfigError(f"lora.targets: {_first_line(error)}") from error


def _check_shapes(config: ModelConfig, model: nn.Module) -> None:
    """Compare a folder's tensors with the model that its config describes, before they are read: with ZeRO-3 only the
    first rank reads values, and would be alone with its error."""
    parameters = dict(model.named_parameters())
    for path in sorted(Path(config.base).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if name in parameters}
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"model.base {config.base!r} cannot be loaded: {path.name}: {_first_line(error)}"
            ) from error
        for name, shape in found.items():
            if shape != tuple(parameters[name].shape):
                raise ConfigError(
                    f"model.base {config.base!r} cannot be loaded: {name} is {shape} in {path.name} and "
                    f"{tuple(parameters[name].shape)} by config.json; give weights and config of one model"
                )


def _source(config: ModelConfig) -> dict:
    return {
        "revision": config.revision or "main",
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": os.path.isdir(config.base),
    }


def weights_folder(config: ModelConfig) -> Path:
    if os.path.isdir(config.base):
        return Path(config.base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.base, revision=config.revision, local_files_only=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
