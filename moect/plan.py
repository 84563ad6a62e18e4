"""What can be known about a run before it: printed at its start, written to plan.json, and shown by `moect plan`."""

from __future__ import annotations

from torch import nn

from moect.config import RunConfig, unused_keys
from moect.model.append import modules_of
from moect.model.build import parameter_counts
from moect.model.flops import training_flops_per_token
from moect.model.losses import CHUNK_ELEMENTS
from moect.train.memory import memory_per_rank
from moect.train.meters import Gpu, duration, find_gpu

FULL = 0.93  # share of a GPU's memory to plan with: CUDA, NCCL and gaps between tensors take the rest


def make_plan(
    config: RunConfig,
    model: nn.Module,
    mixture: list[dict],
    world_size: int,
    gpu: str | None = None,
    mfu: float = 0.35,
) -> dict:
    """Derived numbers of a run.

    Args:
        config: the run.
        model: as `build_model` makes it; the meta device is enough.
        mixture: `Loader.summary()`, or `planned_sources`, where what is not known yet is None.
        world_size: ranks it will run on.
        gpu: name of the GPU that each rank will have; adds whether the run fits it, and its time.
        mfu: share of the GPU's arithmetic that the time assumes.

    Raises:
        ConfigError: a GPU that is not in the table.
    """
    train, data = config.train, config.data
    tokens_per_step = train.batch_size * data.sequence_length
    chunks = train.micro_batch * data.sequence_length * model.config.vocab_size > CHUNK_ELEMENTS
    flops = training_flops_per_token(model, data.sequence_length, train.activation_checkpointing, chunks)
    plan = {
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
    if gpu:
        plan |= _on_gpu(plan, config, *find_gpu(gpu), mfu)
    return plan


def _on_gpu(plan: dict, config: RunConfig, name: str, gpu: Gpu, mfu: float) -> dict:
    needed = sum(plan["memory_per_rank"].values()) / 2**30
    return {
        "gpu": name,
        "gpu_memory_gib": gpu.memory,
        "fits": needed <= FULL * gpu.memory,
        "remedy": _remedy(config, plan["ranks"]),
        "mfu": mfu,
        # the table has bf16 peaks only
        "seconds": plan["flops"] / (gpu.flops * mfu * plan["ranks"]) if plan["precision"] == "bf16" else None,
    }


def _remedy(config: RunConfig, ranks: int) -> str:
    """What to change first when memory does not suffice."""
    train = config.train
    if not train.activation_checkpointing:
        return "set train.activation_checkpointing=true"
    if train.zero_stage < 2:
        return "set train.zero_stage=2"
    if train.micro_batch > 1:
        return f"set train.micro_batch={train.micro_batch // 2 if train.micro_batch % 2 == 0 else 1}"
    if train.zero_stage < 3 and ranks > 1:
        return "set train.zero_stage=3"
    if config.method == "moe-ct":
        return "lower moe.width or moe.experts, or take more GPUs"
    return "take more GPUs, or method=lora"


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
        ("", _total(plan)),
    ]
    if "gpu" in plan:
        rows.append(("time", _time(plan)))
    if plan["unused_keys"]:
        rows.append(("not used", f"{', '.join(plan['unused_keys'])} (they say nothing for this configuration)"))
    lines = [f"{name:<14} {text}".rstrip() for name, text in rows]
    lines += ["", f"{'language':<10}{'role':<6}{'documents':>11}{'tokens':>10}{'share':>8}{'epochs':>8}  source"]
    for row in plan["mixture"]:
        documents, tokens, weight, epochs = (row[key] for key in ("documents", "tokens", "weight", "epochs"))
        lines.append(
            f"{row['lang']:<10}{row['role']:<6}{_known(documents, '{:,}'):>11}{_known(tokens and _si(tokens)):>10}"
            f"{_known(weight, '{:.1%}'):>8}{_known(epochs, '{:.2f}'):>8}  {row['source']}"
        )
    unread = sum(row["tokens"] is None for row in plan["mixture"])
    if unread:
        lines.append(f"?: {unread} of {len(plan['mixture'])} corpora are not tokenized yet; training does it first")
    return "\n".join(lines)


def _total(plan: dict) -> str:
    total = sum(plan["memory_per_rank"].values())
    if "gpu" not in plan:
        return f"{_bytes(total)} in all, buffers and activations being estimates"
    verdict = "fits" if plan["fits"] else f"does not fit; {plan['remedy']}"
    return f"{total / 2**30:.1f} of {plan['gpu_memory_gib']:g} GiB on {plan['gpu']}: {verdict}"


def _time(plan: dict) -> str:
    if plan["seconds"] is None:
        return "not known for fp32"
    hours = plan["seconds"] * plan["ranks"] / 3600
    return (
        f"{duration(plan['seconds'])} on {plan['ranks']} x {plan['gpu']} at an assumed {100 * plan['mfu']:g}% MFU "
        f"({hours:,.{0 if hours >= 10 else 1}f} GPU hours)"
    )


def _known(value, form: str = "{}") -> str:
    return "?" if value is None else form.format(value)


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
    """Bytes in GiB, or in MiB where that is less than one."""
    return f"{number / 2**30:.1f} GiB" if number >= 0.95 * 2**30 else f"{number / 2**20:.1f} MiB"
