"""Block expansion, a rival of the appended module: whole blocks inserted into a frozen base, which alone train.

    h = B(x),   h' = B'(h)        B' a copy of B whose output projections, of attention and FFN, start at zero

So the model starts as its base, bit for bit (LLaMA Pro, arXiv 2401.02415, section 3.2). The copy is a child of the
block that it follows, `inserted`: the base's tensors keep their names. Exported, all blocks stand in one row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from moect.errors import ConfigError
from moect.expansion_config import ExpansionConfig
from moect.model.families import blocks_of, config_of_blocks

MARK = ".inserted."  # in the names of what is inserted


class ExpandedBlock:
    """Mixed into a decoder block's class: the block's own forward, then that of the block inserted after it, if any."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        hidden_BSD = super().forward(hidden_states, **kwargs)
        if self.inserted is None or not self.inserted.enabled:
            return hidden_BSD
        return self.inserted.forward(hidden_BSD, **kwargs)  # not called: activation checkpointing holds both in one


def insert_blocks(
    model: nn.Module,
    config: ExpansionConfig,
    within: Callable[[nn.Module, nn.Module], AbstractContextManager] | None = None,
) -> nn.Module:
    """Insert a copy after each chosen block of a causal LM, in place, and freeze everything else.

    Args:
        model: of a supported family; on the meta device only shapes are made.
        config: after which blocks.
        within: makes the context in which a copy is made, from the block and the copy; for a model whose weights are
            not in one place (`moect.model.partition`).

    Returns:
        The same model; its config counts the inserted blocks, behind the base's.

    Raises:
        ConfigError: blocks that the model does not have.
    """
    blocks = blocks_of(model)
    depth = len(blocks)
    try:
        indices = config.layer_indices(depth)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model.requires_grad_(False)
    # caches make room for as many blocks as the config has, each of the kind that it says
    model.config.__dict__.update(config_of_blocks(model.config, [*range(depth), *indices]).__dict__)
    block_class, expanded_class = type(blocks[0]), _expanded_class(type(blocks[0]))
    for index, block in enumerate(blocks):
        copy = None
        if index in indices:
            copy = _copy(block_class, block, model.config, depth + indices.index(index), within)
        block.__class__ = expanded_class
        block.inserted = copy
    return model


def copied_blocks(model: nn.Module) -> list[int]:
    """The blocks of the base that are followed by a copy, ascending; empty for a model without."""
    return [i for i, block in enumerate(blocks_of(model)) if getattr(block, "inserted", None) is not None]


def inserted_blocks(model: nn.Module) -> list[nn.Module]:
    """What `insert_blocks` inserted, by ascending place."""
    return [blocks_of(model)[i].inserted for i in copied_blocks(model)]


def row_of_blocks(model: nn.Module) -> list[int]:
    """All blocks in one row, in the order in which they compute; an inserted one by the index of what it copies."""
    return sorted([*range(len(blocks_of(model))), *copied_blocks(model)])


def all_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Every block of a causal LM with its own parameters, as they compute one after the other, inserted ones too."""
    for block in blocks_of(model):
        yield block, [p for name, p in block.named_parameters() if MARK not in f".{name}"]
        if getattr(block, "inserted", None) is not None:
            yield block.inserted, list(block.inserted.parameters())


@contextmanager
def without_inserted(model: nn.Module):
    """Inside, the model is the base: the inserted blocks are skipped."""
    blocks = inserted_blocks(model)
    for block in blocks:
        block.enabled = False
    try:
        yield model
    finally:
        for block in blocks:
            block.enabled = True


def places(model: nn.Module) -> dict[str, str]:
    """Where the blocks lie in one row: how names begin there, by how they begin in this model."""
    found = {}
    for place, index in enumerate(row_of_blocks(model)):
        start = f"model.layers.{index}."
        found[start[:-1] + MARK if start in found else start] = f"model.layers.{place}."
    return found


def _copy(block_class: type, block: nn.Module, config, number: int, within) -> nn.Module:
    weight = block.mlp.down_proj.weight
    with torch.device("meta"):
        copy = block_class(config, number)
    copy.to(dtype=weight.dtype).to_empty(device=weight.device)
    if weight.device.type != "meta":
        with within(block, copy) if within else nullcontext():
            copy.load_state_dict(block.state_dict())
            for last in (copy.self_attn.o_proj, copy.mlp.down_proj):
                for parameter in last.parameters():
                    nn.init.zeros_(parameter)
    copy.enabled = True
    return copy.train(block.training).requires_grad_(True)


@functools.cache
def _expanded_class(base_class: type) -> type:
    return type(f"Expanded{base_class.__name__}", (ExpandedBlock, base_class), {"__module__": base_class.__module__})
