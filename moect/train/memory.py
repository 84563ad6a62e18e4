"""Memory that one rank needs, from the shapes of the model and what DeepSpeed allocates for them.

The terms are those of DeepSpeed 0.19.8 with the settings of `moect.train.engine`; tests/test_plan_memory.py holds them
against what a real training allocates, outside the optimizer's own kernel (PyTorch's fused AdamW needs no room).

T numbers that train, w ranks, b bytes a weight: 2 in bf16, 4 in fp32; B numbers in a bucket (`reduce_bucket_size`)
"""

from __future__ import annotations

from torch import nn

from moect.config import RunConfig
from moect.model.append import modules_of
from moect.model.build import parameter_counts
from moect.model.embeddings import rows_of
from moect.model.losses import CHUNK_ELEMENTS
from moect.train import engine

ALL_REDUCE = 500_000_000  # numbers that DeepSpeed joins for one all-reduce without ZeRO
LOGIT_BYTES = 12  # a chunk of logits in bf16 and in fp32, and what their cross-entropy keeps


def memory_per_rank(config: RunConfig, model: nn.Module, world_size: int) -> dict[str, int]:
    """Bytes one rank needs at its fullest moment, by purpose.

    weights and optimizer are exact but for padding. gradients are what is kept of them until the step. buffers are
    DeepSpeed's own, and the layers that ZeRO-3 gathers whole. activations are estimated.
    ZeRO divides among the ranks: the optimizer's state from stage 1, gradients from 2, weights from 3: a base from disk
    while it is read, each module as it is made. Not counted: what CUDA and NCCL take for themselves, some 1 GiB.

    Args:
        config: the run.
        model: as `build_model` makes it, undivided; the meta device is enough.
        world_size: ranks it will run on.
    """
    train = config.train
    counts = parameter_counts(model)
    T, total = counts["trainable"], counts["total"]
    b = 2 if train.precision == "bf16" else 4
    share = lambda number, stage: number // world_size if train.zero_stage >= stage else number  # noqa: E731
    # AdamW's two moments in fp32, and a master copy: always for bf16, and because ZeRO keeps one in fp32 too
    has_master = train.precision == "bf16" or train.zero_stage > 0
    # the weights' own gradients in bf16, and the fp32 sum of them: of one bucket at a time from stage 2
    whole_low_precision = 2 * T if b == 2 and train.zero_stage < 2 else 0
    return {
        "weights": share(total * b, 3),
        "gradients": share(T * 4, 2) + whole_low_precision,
        "optimizer": share(T * (12 if has_master else 8), 1),
        "buffers": _buffers(config, model, counts, world_size),
        "activations": _activations(config, model),
    }


def _buffers(config: RunConfig, model: nn.Module, counts: dict[str, int], world_size: int) -> int:
    """Bytes of DeepSpeed's own buffers: the larger of those in the backward pass and those before the step."""
    train = config.train
    T = counts["trainable"]
    settings = _zero_settings(config, world_size, T)
    b = 2 if train.precision == "bf16" else 4
    bucket = settings.reduce_bucket_size
    filled = min(bucket, T)
    if train.zero_stage == 0:
        return 4 * min(T, ALL_REDUCE) if b == 4 else 0  # in bf16 smaller than the fp32 copy that comes after it
    part = -(-T // world_size)
    if train.zero_stage == 1:
        # bf16: the fp32 sums once more in bf16, to be sent; fp32: the bucket, and a copy of this rank's part
        return 2 * T if b == 2 else 4 * bucket + 4 * part
    if train.zero_stage == 2:
        if b == 2:  # the bucket, its sum over the ranks in fp32, and the gradient that is on its way
            return 2 * bucket + 4 * filled + 2 * _largest(model, trains=True)
        accumulated = 4 * part if train.batch_size > train.micro_batch * world_size else 0
        return accumulated + max(4 * bucket, 4 * part)
    before_step = 4 * min(part, settings.sub_group_size)
    if world_size == 1:
        return b * bucket + before_step
    gathered = b * max(min(counts["total"], settings.max_live_parameters), _largest_unit(model))
    return b * bucket + max(before_step, gathered + 4 * b * filled)  # a bucket travels in four copies


def _zero_settings(config: RunConfig, world_size: int, trains: int):
    """DeepSpeed's ZeRO settings with every default filled in."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**engine.deepspeed_config(config.train, world_size, trains)["zero_optimization"])


def _largest(model: nn.Module, trains: bool) -> int:
    return max((p.numel() for p in model.parameters() if p.requires_grad == trains), default=0)


def _largest_unit(model: nn.Module) -> int:
    """Numbers in the largest piece that ZeRO-3 gathers at once: an appended module, or a layer."""
    modules = [sum(p.numel() for p in moe.parameters()) for moe in modules_of(model)]
    return max([*modules, *(p.numel() for p in model.parameters())])


def _activations(config: RunConfig, model: nn.Module) -> int:
    """Bytes kept for the backward pass of one micro-batch, and the largest piece of its logits.

    Per token a block keeps some 12 numbers of its width D (norms, queries, keys, values, sums), 4 of its FFN's width F,
    and for each of the token's experts 2 D and 4 of the expert's width. With activation checkpointing it keeps its
    input, and all of that for one block at a time.
    """
    train, shape = config.train, model.config
    tokens = train.micro_batch * config.data.sequence_length
    widths = 12 * shape.hidden_size + 4 * shape.intermediate_size
    for moe in modules_of(model)[:1]:
        widths += moe.config.top_k * (2 * shape.hidden_size + 4 * moe.experts.down_proj.shape[-1])
    blocks = shape.num_hidden_layers
    at_once = 2 if config.method == "block-expansion" else 1  # a block is recomputed with the one inserted after it
    kept = shape.hidden_size * blocks + widths * at_once if train.activation_checkpointing else widths * blocks
    b = 2 if train.precision == "bf16" else 4
    # rows that train make logits of their own, and a copy of all with these added
    rows = 2 * b if rows_of(model) else 0
    sides = 2 if config.loss.base_kl else 1  # the base's
    logits = sides * min(tokens * shape.vocab_size, CHUNK_ELEMENTS) * (LOGIT_BYTES + rows)
    return tokens * kept * b + logits
