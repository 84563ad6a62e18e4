"""A model, or some of its blocks, built from tensors by name: what an export is held against.

B batch, S sequence, D width
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from moect.export.targets.form import EMBEDDING, HEAD, Subject
from moect.model.append import append_moe, modules_of
from moect.model.embeddings import append_counted_rows
from moect.model.families import config_of_blocks


def assemble(subject: Subject, tensors: Mapping[str, Tensor], blocks: range | None = None) -> nn.Module:
    """The model in fp32 on the CPU, computing experts one after the other, attention as written down (`eager`).

    Args:
        subject: what it is.
        tensors: by their names in training, in any dtype.
        blocks: these blocks only, in an evaluation of its own; embedding, norm and head are there too. None: all.

    Returns:
        A causal LM in evaluation mode, that nobody trains.
    """
    from transformers import AutoModelForCausalLM

    all_blocks = range(subject.base.num_hidden_layers)
    blocks = all_blocks if blocks is None else blocks
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config_of_blocks(subject.base, blocks), dtype=torch.float32, attn_implementation="eager"
        )
    inside = [i - blocks.start for i in subject.blocks if i in blocks]
    if inside:
        experts = subject.moe.experts_by_block(subject.base.num_hidden_layers)
        counts = [experts[i + blocks.start] for i in inside]
        append_moe(model, replace(subject.moe, layers=inside, experts=counts, dispatch="reference"))
        if blocks.start > subject.blocks[0]:  # a block below has the language gate
            modules_of(model)[0].language_gate = None
    if subject.rows:
        if not inside:
            model.moe_config = subject.moe  # which the rows need to know, in no block or in all
        append_counted_rows(model, **subject.rows)
    values = {}
    for name, slot in model.state_dict().items():
        source = renumbered(name, blocks.start)
        tensor = tensors[EMBEDDING if _tied(model, name) else source]
        values[name] = tensor.to(slot.dtype, copy=True)  # mapped from a file it lies anywhere, and rounds otherwise
    model.load_state_dict(values, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.model.config)  # its buffers are in no file
    return model.requires_grad_(False).eval()


def renumbered(name: str, by: int) -> str:
    """A tensor's name with the number of its block raised."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return f"model.layers.{int(match[1]) + by}.{match[2]}" if match else name


def _tied(model: nn.Module, name: str) -> bool:
    return name == HEAD and model.config.get_text_config().tie_word_embeddings
