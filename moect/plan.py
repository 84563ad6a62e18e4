"""What can be known about a run before it: printed at its start, written to plan.json, and shown by `moect plan`."""

from __future__ import annotations

from torch import nn

from moect.config import RunConfig, unused_keys
from moect.model.append import modules_of
from moect.model.build import parameter_counts
from moect.model.flops import training_flops_per_token
from moect.model.losses import CHUNK_ELEMENTS


def make_plan(config: RunConfig, model: nn.Module, mixture: list[dict], world_size: int) -> dict:
    """Derived numbers of a run.

    Args:
        config: the run.
        model: as `build_model` makes it; the meta device is enough.
        mixture: `Loader.summary()`.
        world_size: ranks it will run on.
    """
    train, data = config.train, config.data
    tokens_per_step = train.batch_size * data.sequence_length
    flops = training_flops_per_token(model, data.sequence_length, train.activation_checkpointing)
    return {
        "method": config.method,
        "unused_keys": unused_keys(config),
        "base": config.model.base or "from scratch",
        "blocks_with_module": [m.index for m in modules_of(model)],
        "parameters": parameter_counts(model),
        "ranks": world_size,
        "zero_stage": train.zero_stage,
        "precision": train.precision,
        "accumulation_steps": train.batch_size // (train.micro_batch * world_size),
        "steps": train.steps,
        "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * train.steps,
        "flops_per_token": flops,
        "flops": flops * tokens_per_step * train.steps,
        "memory_per_rank": memory_per_rank(config, model, world_size),
        "mixture": mixture,
    }


def memory_per_rank(config: RunConfig, model: nn.Module, world_size: int) -> dict[str, int]:
    """Bytes one rank needs, by purpose. `activations` is an estimate; the others leave out padding and
    DeepSpeed's buffers. ZeRO-3 reaches its figure for weights after loading: each rank reads the whole base first.

    ZeRO divides among the ranks: the optimizer's state from stage 1, gradients from 2, weights from 3.
    """
    train = config.train
    counts = parameter_counts(model)
    element = 2 if train.precision == "bf16" else 4
    divide = lambda number, stage: number // world_size if train.zero_stage >= stage else number  # noqa: E731
    # AdamW's two moments in fp32, and a master copy: always for bf16, and because ZeRO keeps one in fp32 too
    has_master = train.precision == "bf16" or train.zero_stage > 0
    optimizer_bytes = counts["trainable"] * (12 if has_master else 8)
    shape = model.config
    tokens = train.micro_batch * config.data.sequence_length
    widths = 12 * shape.hidden_size + 4 * shape.intermediate_size
    for moe in modules_of(model)[:1]:
        widths += moe.config.top_k * (2 * shape.hidden_size + 3 * moe.experts.down_proj.shape[-1])
    blocks = shape.num_hidden_layers
    kept = shape.hidden_size * blocks + widths if train.activation_checkpointing else widths * blocks
    logits = min(tokens * shape.vocab_size, CHUNK_ELEMENTS) * 8
    return {
        "weights": divide(counts["total"] * element, 3),
        "gradients": divide(counts["trainable"] * 4, 2),
        "optimizer": divide(optimizer_bytes, 1),
        "activations": tokens * kept * element + logits,
    }


def render(plan: dict) -> str:
    """The plan as aligned text."""
    count = plan["parameters"]
    memory = plan["memory_per_rank"]
    blocks = plan["blocks_with_module"]
    rows = [
        ("method", plan["method"] + (f", module in {len(blocks)} blocks ({_ranges(blocks)})" if blocks else "")),
        ("base", plan["base"]),
        (
            "parameters",
            f"{_si(count['total'])} total, {_si(count['trainable'])} trainable "
            f"({100 * count['trainable'] / count['total']:.1f}%), {_si(count['active'])} active per token",
        ),
        ("ranks", f"{plan['ranks']}, ZeRO {plan['zero_stage']}, {plan['precision']}"),
        (
            "step",
            f"{plan['tokens_per_step']:,} tokens, {plan['accumulation_steps']} accumulation step(s) a rank",
        ),
        ("run", f"{plan['steps']:,} steps, {_si(plan['tokens'])} tokens, {_si(plan['flops'])}FLOP"),
        ("memory a rank", ", ".join(f"{name} {_bytes(size)}" for name, size in memory.items())),
        ("", f"{_bytes(sum(memory.values()))} in all, activations being an estimate"),
    ]
    if plan["unused_keys"]:
        rows.append(("not used", f"{', '.join(plan['unused_keys'])} (they say nothing for this configuration)"))
    lines = [f"{name:<14} {text}".rstrip() for name, text in rows]
    lines += ["", f"{'language':<10}{'role':<6}{'documents':>11}{'tokens':>10}{'share':>8}{'epochs':>8}  source"]
    for row in plan["mixture"]:
        lines.append(
            f"{row['lang']:<10}{row['role']:<6}{row['documents']:>11,}{_si(row['tokens']):>10}"
            f"{100 * row['weight']:>7.1f}%{row['epochs']:>8.2f}  {row['source']}"
        )
    return "\n".join(lines)


def _ranges(indices: list[int]) -> str:
    if indices == list(range(indices[0], indices[-1] + 1)) and len(indices) > 2:
        return f"{indices[0]}–{indices[-1]}"
    return ", ".join(map(str, indices))


def _si(number: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:g} B"
