"""What was trained by itself, without the base: a few per cent of the size, and `load` joins the two again.

    adapter.safetensors     the appended tensors by their names in the model
    adapter.json            what the module is, of which base
    tokenizer files         of the run

Low-rank updates are written in the form of peft, whose `PeftModel.from_pretrained` joins them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import moect
from moect.config import ModelConfig
from moect.errors import ConfigError, ExportError
from moect.export.card import base_name
from moect.export.folder import alone, cannot_write, check_free
from moect.export.source import Source
from moect.model.append import append_moe, is_appended_tensor
from moect.model.build import DTYPES, base_fingerprint
from moect.model.embeddings import append_counted_rows
from moect.moe_config import MoeConfig
from moect.train.checkpoints.reading import Tensors

FORMAT = 1
VALUES, WEIGHTS = "adapter.json", "adapter.safetensors"


def write_adapter(source: Source, folder: Path) -> None:
    """Write what a run trained, without its base; the folder appears when it is complete.

    Raises:
        ExportError: everything was trained, or the folder is there.
    """
    config, folder = source.config, Path(folder).resolve()
    if config.method == "full":
        raise ExportError("--adapter: method full trains the whole model, nothing stands apart from it; leave it out")
    if config.method == "block-expansion":
        raise ExportError("--adapter: method block-expansion makes a deeper model, which no adapter is; leave it out")
    if config.model.base is None:
        raise ExportError("--adapter: the run's base was made from scratch and is in no folder to join; leave it out")
    check_free(folder)
    temporary = folder.parent / f".writing-{folder.name}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            try:
                _write(source, temporary)
                if folder.is_dir():
                    folder.rmdir()
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error


def _write(source: Source, temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write = _write_lora if source.config.method == "lora" else _write_module
    write(source, temporary)
    source.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_card(source), encoding="utf-8")


def load(base: str | Path, adapter: str | Path, check: bool = True, **kwargs) -> nn.Module:
    """A base and an adapter as one model, in evaluation mode: what `append_moe` makes, with what was trained.

    Args:
        base: folder or hub name of the adapter's base.
        adapter: a folder that `moect export --adapter` wrote.
        check: compare the base with the one that was trained on, which reads all its files.
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ExportError: the adapter cannot be read, or is of another base.
    """
    from transformers import AutoModelForCausalLM

    adapter = Path(adapter)
    values = _read_values(adapter)
    try:
        moe, dtype = MoeConfig(**{"gate_sees": "token"} | values["moe"]), DTYPES[values["dtype"]]
    except (TypeError, ValueError, KeyError) as error:
        raise ExportError(f"{adapter}: {VALUES} is damaged; export it again") from error
    model = AutoModelForCausalLM.from_pretrained(base, **{"dtype": dtype, "use_safetensors": True, **kwargs})
    which = ModelConfig(base=str(base), revision=kwargs.get("revision"))  # its files have been fetched by now
    if check and base_fingerprint(which) != values["base_fingerprint"]:
        raise ExportError(f"{adapter}: of another base than {base}: {values['base']}; give that one")
    append_moe(model, moe)
    try:
        if values["rows"]:
            append_counted_rows(model, **values["rows"])
    except (TypeError, ValueError, RuntimeError, ConfigError) as error:
        raise ExportError(f"{adapter}: {VALUES} is damaged; export it again") from error
    try:
        tensors = load_file(adapter / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{adapter}: {WEIGHTS} cannot be read: {error}; export it again") from error
    slots = {name: tensor for name, tensor in model.state_dict().items() if is_appended_tensor(name)}
    if odd := sorted(slots.keys() ^ tensors.keys()):
        raise ExportError(f"{adapter}: {WEIGHTS} does not fit {VALUES}: {odd[0]} is in one of the two only")
    for name, tensor in tensors.items():
        slot = slots[name]
        if tensor.shape != slot.shape or tensor.is_floating_point() != slot.is_floating_point():
            raise ExportError(f"{adapter}: {name} is not what {VALUES} says; export it again")
    with torch.no_grad():
        for name, tensor in tensors.items():
            slots[name].copy_(tensor)
    return model.eval()


def _read_values(adapter: Path) -> dict:
    try:
        values = json.loads((adapter / VALUES).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ExportError(f"{adapter}: {VALUES} is of format {values['format']}, this version reads {FORMAT}")
        missing = {"moe", "rows", "base", "base_fingerprint", "dtype"} - set(values)
    except OSError as error:
        if (adapter / "adapter_config.json").is_file():
            raise ExportError(
                f"{adapter}: low-rank updates; load them with peft's PeftModel.from_pretrained"
            ) from error
        raise ExportError(f"{adapter}: no adapter there ({VALUES}); make one with moect export --adapter") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{adapter}: {VALUES} is damaged; export it again") from error
    if missing:
        raise ExportError(f"{adapter}: {VALUES} has no `{sorted(missing)[0]}`; export it again")
    return values


def _write_module(source: Source, folder: Path) -> None:
    trained, subject = source.trained, source.trained.subject
    tensors = {name: trained[name].contiguous() for name in trained if is_appended_tensor(name)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    values = {
        "format": FORMAT,
        "moect": moect.__version__,
        "base": base_name(source.config),
        "base_fingerprint": source.info["base_fingerprint"],
        "step": source.info["step"],
        "dtype": subject.dtype,
        "moe": asdict(subject.moe) | {"dispatch": "auto"},
        "rows": subject.rows,
    }
    (folder / VALUES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_lora(source: Source, folder: Path) -> None:
    import peft

    lora = source.config.lora
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name(source.config),
        inference_mode=True,
    )
    settings.save_pretrained(folder)
    tensors = Tensors(source.checkpoint, "module")
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensors[name] for name in tensors}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _card(source: Source) -> str:
    config, step = source.config, source.info["step"]
    base = base_name(config)
    head = f"# {config.name}\n\nWhat {step} steps of training (method {config.method}) added to `{base}`"
    if config.method == "lora":
        code = 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "FOLDER")'
    else:
        code = 'import moect\n\nmodel = moect.load("BASE", "FOLDER")'
    return f"{head}, with moect; the base is not in here.\n\n```python\n{code}\n```\n"
