"""A run as one Hugging Face folder: base and trained parameters together.

`moe-ct` is written in our own architecture, with the modelling file beside the weights; `full` and `lora` (merged) in
the base's. The folder appears under its name only when it is complete and verified.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from moect.config import RunConfig, load_config
from moect.data.vocabulary.extended_tokenizer import Extension, extension_of
from moect.data.vocabulary.tokenizer import kept_tokenizer
from moect.errors import ExportError
from moect.export.bundle import bundle
from moect.export.card import make_card
from moect.export.verify import verify
from moect.model.append import is_appended
from moect.model.build import DTYPES, base_fingerprint, build_model, merge_lora
from moect.model.embeddings import rows_of
from moect.monitor.rows import read_rows
from moect.monitor.verdict import verdicts
from moect.train.checkpoints.best import best_checkpoint
from moect.train.checkpoints.reading import find_checkpoint, list_checkpoints, load_module, read_info, step_of
from moect.train.checkpoints.same_run import check_same_run
from moect.train.token_rows import check_extension, kept_rows

log = logging.getLogger("moect.export")
SHARD_SIZE = "5GB"
AUTO_MAP = {"AutoConfig": "modeling_moect.MoectConfig", "AutoModelForCausalLM": "modeling_moect.MoectForCausalLM"}


def export_run(
    run_folder: Path, checkpoint: str | None = None, output: Path | None = None, dtype: str | None = None
) -> Path:
    """Write a checkpoint of a run as a Hugging Face folder.

    Args:
        run_folder: the run's folder.
        checkpoint: `step-N`; None: see `choose_checkpoint`.
        output: where to; None: `export` in the run's folder.
        dtype: of the weights, `fp32`, `bf16` or `auto`; None: the run's `export.dtype`.

    Returns:
        The folder written.

    Raises:
        ExportError: the output exists, the base is not the one trained on, or the verification failed.
        CheckpointError, ConfigError, DataError: checkpoint, base or tokenizer cannot be read.
    """
    run_folder = Path(run_folder)
    if not (run_folder / "config.yaml").is_file():
        raise ExportError(f"{run_folder}: no run there (no config.yaml); give the folder of a run")
    output = Path(output) if output else run_folder / "export"
    _check_free(output)
    config = load_config(run_folder / "config.yaml")
    path = choose_checkpoint(run_folder, config, checkpoint)
    info = read_info(path)
    _check_base(config, info, path)
    dtype = dtype or config.export.dtype
    tokenizer = kept_tokenizer(config, run_folder)
    check_extension(info, extension_of(tokenizer), str(path))
    model = trained_model(config, path, config.train.precision if dtype == "auto" else dtype, extension_of(tokenizer))
    measured = [row for row in read_rows(run_folder / "monitor") if row["step"] == info["step"]]
    card = make_card(config, info, measured)
    return export_merged(model, tokenizer, output, card, _licences(config))


def choose_checkpoint(run_folder: Path, config: RunConfig, name: str | None = None) -> Path:
    """The named checkpoint of a run, or the best undamaged one within its budget (`moect.monitor.verdict.best`).

    Where no checkpoint was measured on all texts, or the run's base was made from scratch and there is nothing to hold
    it against, that is the newest undamaged one.

    Raises:
        ExportError: checkpoints were measured, and none that is undamaged is within `monitor.max_forgetting`.
        CheckpointError: there is none, or the named one is damaged.
    """
    newest = find_checkpoint(run_folder, name)
    if name is not None or config.model.base is None:
        return newest
    measured = {verdict.step for verdict in verdicts(read_rows(run_folder / "monitor"), config)}
    there = [path for path in list_checkpoints(run_folder / "checkpoints") if step_of(path) in measured]
    if not there:
        if config.monitor.max_forgetting:
            log.warning("%s: no checkpoint was measured, so none is known to be within monitor.max_forgetting", newest)
        return newest
    verdict = best_checkpoint(run_folder, config, sound=True)
    if verdict is None:
        raise ExportError(
            f"{run_folder}: none of {', '.join(path.name for path in there)} is whole and within "
            "monitor.max_forgetting; choose one with --checkpoint all the same, or train on with more data.replay"
        )
    path = run_folder / "checkpoints" / f"step-{verdict.step}"
    if path != newest:
        log.info("%s is the best checkpoint within the budget; %s is newer (--checkpoint takes it)", path, newest.name)
    return path


def trained_model(config: RunConfig, checkpoint: Path, dtype: str, extension: Extension | None = None) -> nn.Module:
    """The model of a checkpoint, as it is exported: in evaluation mode, low-rank updates merged.

    The checkpoint's fp32 tensors are rounded to `dtype` once, low-rank updates after they were added to the weights.

    Args:
        config: the run.
        checkpoint: its folder.
        dtype: `fp32` or `bf16`.
        extension: tokens that were added to the base's.

    Raises:
        CheckpointError: the checkpoint is not of this model.
    """
    merges = config.method == "lora"
    config = replace(
        config,
        model=replace(config.model, attention="sdpa"),  # no part of the weights, and other kernels need a GPU
        train=replace(config.train, precision="fp32" if merges else dtype),
    )
    model = build_model(config, rows=kept_rows(checkpoint), extension=extension).eval()
    load_module(model, checkpoint)
    if merges:
        merge_lora(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def export_merged(model: nn.Module, tokenizer, folder: Path, card: str, extras: tuple[Path, ...] = ()) -> Path:
    """Write a model as a Hugging Face folder and verify it.

    Args:
        model: a causal LM, extended by `append_moe` or plain, in evaluation mode; written in its dtype, with its
            generation config.
        tokenizer: saved with it; None: none.
        folder: must not exist, or be empty.
        card: README.md.
        extras: further files to copy, the base's licence for one.

    Returns:
        The folder.

    Raises:
        ExportError: it exists, cannot be written, or what was written is not the model.
    """
    folder = Path(folder)
    _check_free(folder)
    if model.training:
        raise ExportError("the model is in training mode: call model.eval() first")
    temporary = folder.parent / f".writing-{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_model(model, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for path in extras:
            shutil.copyfile(path, temporary / path.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        difference = verify(temporary, model, _probe(model))
        os.rename(temporary, folder)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written: {error}; free space or choose another output") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s: every tensor accounted for, logits of the reloaded model differ by %.1e", folder, difference)
    return folder


def _write_model(model: nn.Module, folder: Path) -> None:
    target = _empty_twin(model) if is_appended(model) else model
    target.save_pretrained(folder, state_dict=model.state_dict(), max_shard_size=SHARD_SIZE)
    if is_appended(model):
        (folder / "modeling_moect.py").write_text(bundle(), encoding="utf-8")
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**values, "auto_map": AUTO_MAP}, indent=2) + "\n", encoding="utf-8")


def _empty_twin(model: nn.Module) -> nn.Module:
    """The model as `MoectForCausalLM`, shapes only: it lends its configuration and its way of saving."""
    from moect.model.modeling_moect import MoectConfig, MoectForCausalLM

    moe = replace(model.moe_config, dispatch="auto")  # no part of the model: what trained here need not be there
    base_config, rows = copy.deepcopy(model.config.get_text_config()), rows_of(model)
    base_config.vocab_size = model.model.embed_tokens.num_embeddings
    of_rows = {"rows": len(rows[0].ids), "added_tokens": rows[0].added, "spare_tokens": rows[0].spare} if rows else {}
    config = MoectConfig(base_config=base_config, moe=asdict(moe), dtype=model.dtype, **of_rows)
    with torch.device("meta"):
        twin = MoectForCausalLM._from_config(config)
    twin.generation_config = model.generation_config
    return twin


def _probe(model: nn.Module) -> torch.Tensor:
    """Token ids to compare logits on, (4, S) from the whole vocabulary."""
    length = min(64, getattr(model.config.get_text_config(), "max_position_embeddings", 64))
    return torch.randint(model.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists: remove it, or choose another folder with --output")


def _check_base(config: RunConfig, info: dict, checkpoint: Path) -> None:
    fingerprint = base_fingerprint(config.model, config.seed)
    if fingerprint != info["base_fingerprint"]:
        raise ExportError(
            f"{checkpoint}: trained on another base (fingerprint {info['base_fingerprint'][:12]}…, "
            f"{config.model.base} has {fingerprint[:12]}…); set model.base in the run's config.yaml to that one"
        )
    check_same_run(info, config, fingerprint, str(checkpoint))  # config.yaml may have been edited since


def _licences(config: RunConfig) -> tuple[Path, ...]:
    """Licence and notice files of a base in a local folder: many licences want them passed on."""
    if not config.model.base or not os.path.isdir(config.model.base):
        return ()
    files = Path(config.model.base).iterdir()
    return tuple(
        sorted(p for p in files if p.is_file() and p.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")))
    )
