"""Both models in memory, the written one as transformers loads the folder."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from moect.errors import ExportError
from moect.export.proof.comparison import Comparison, RoutesOfStock, Text, routes_of
from moect.model.append import modules_of
from moect.model.record import RECORD, ForwardRecord


@torch.no_grad()
def compare_whole(folder: Path, ours: nn.Module, texts: list[Text], bound: float) -> Comparison:
    """Compare logits and routes of a folder with those of the model that it was written from, both in fp32.

    Args:
        folder: in Hugging Face format.
        ours: the trained model, computing as `assemble`'s does.
        texts: to compare on.
        bound: greatest difference of a logit that passes.

    Raises:
        ExportError: transformers finds a tensor missing, or one too many.
    """
    theirs, comparison = load_whole(folder), Comparison(bound)
    for text in texts:
        a, of_ours = _run(ours, text)
        b, of_theirs = _run(theirs, text)
        comparison.add_logits(text, a, b)
        comparison.add_routes(of_ours, of_theirs)
    return comparison


def load_whole(folder: Path) -> nn.Module:
    """The model of a folder in fp32, computing as `assemble`'s does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    check_report(report, folder)
    return computing_as_ours(model)


def check_report(report: dict, where: Path | str) -> None:
    """What transformers says about loading.

    Raises:
        ExportError: a tensor is missing, one too many, or of another shape.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ExportError(
                f"{where}: transformers reports {kind.replace('_', ' ')}, first {sorted(map(str, report[kind]))[0]}"
            )


def computing_as_ours(model: nn.Module) -> nn.Module:
    """The same experts' kernel, and weights where products round the same: those mapped from a file lie anywhere."""
    for moe in modules_of(model):
        moe.experts.backend = "reference"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.requires_grad_(False).eval()


@contextmanager
def quiet():
    """Inside, transformers shows no bars and no table of what it has loaded: the caller reads it."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _run(model: nn.Module, text: Text):
    if modules_of(model):
        record = ForwardRecord()
        logits = model(text.ids, use_cache=False, **{RECORD: record}).logits
        return logits, routes_of(record)
    routes = RoutesOfStock(model)
    logits = model(text.ids, use_cache=False).logits
    routes.remove()
    return logits, routes.chosen
