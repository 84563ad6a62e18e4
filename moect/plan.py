"""What can be known about a run before it: printed at its start, written to plan.json, and shown by `moect plan`."""

from __future__ import annotations

import math

from torch import nn

from moect.config import RunConfig, unused_keys
from moect.data.batches.summary import language_records
from moect.data_config import DataConfig
from moect.model.append import modules_of
from moect.model.block_expansion import copied_blocks
from moect.model.build import parameter_counts
from moect.model.embeddings import describe_rows
from moect.model.flops import training_flops_per_token
from moect.model.losses import CHUNK_ELEMENTS
from moect.monitor.measuring.cost import USUAL_SHARE, monitor_cost
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
    samples: list[dict] | None = None,
    held_out: list[list[int]] | str | None = None,
) -> dict:
    """Derived numbers of a run.

    Args:
        config: the run.
        model: as `build_model` makes it; the meta device is enough.
        mixture: `Loader.summary()`, or the records of `planned_data`, where what is not known yet is None.
        world_size: ranks it will run on.
        gpu: name of the GPU that each rank will have; adds whether the run fits it, and its time.
        mfu: share of the GPU's arithmetic that the time assumes.
        samples: rows to look at, of `Loader.samples()` or `planned_data`.
        held_out: what the monitor reads, of `token_lengths` or `planned_lengths`: tokens of the documents of each text,
            or why they are not known; None or empty: it reads nothing.

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
        "blocks_copied": copied_blocks(model),
        "parameters": parameter_counts(model),
        "embeddings": describe_rows(model),
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
        "checkpoints": _checkpoints(config, parameter_counts(model)["trainable"]),
        "monitor": _monitor(config, model, held_out, flops),
        "rows": _rows(data),
        "mixture": mixture,
        "samples": samples or [],
    }
    if gpu:
        plan |= _on_gpu(plan, config, *find_gpu(gpu), mfu)
    return plan


def _checkpoints(config: RunConfig, trainable: int) -> dict:
    """Bytes of one, steps between two, and how many lie on the disk at once, the one being written among them."""
    train = config.train
    made = math.ceil(train.steps / train.save_every)
    kept = made
    if train.keep_last:  # and the best one
        kept = min(made, train.keep_last + 1 + (train.steps // train.keep_every if train.keep_every else 0))
    return {"bytes": 12 * trainable, "every": train.save_every, "most": kept + 1}


def _monitor(config: RunConfig, model: nn.Module, held_out: list[list[int]] | str | None, flops: int) -> dict | None:
    if not held_out or not config.monitor.enabled:
        return None
    if isinstance(held_out, str):
        return {"unknown": held_out}
    uncounted = ["samples", "tasks", *(["data.calibration"] if config.calibrates else [])]
    return monitor_cost(config, model, held_out, flops) | {"uncounted": uncounted}


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
    blocks, copied = plan["blocks_with_module"], plan["blocks_copied"]
    where = f", module in {len(blocks)} blocks ({_ranges(blocks)})" if blocks else ""
    where += f", a copy after {len(copied)} blocks ({_ranges(copied)})" if copied else ""
    rows = [
        ("method", plan["method"] + where),
        ("base", plan["base"]),
        (
            "parameters",
            f"{_si(count['total'])} total, {_si(count['trainable'])} trainable "
            f"({100 * count['trainable'] / count['total']:.1f}%), {_si(count['active'])} active per token",
        ),
        *([("embeddings", _embeddings(plan["embeddings"]))] if plan["embeddings"] else []),
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
    rows.append(("checkpoints", _disk(**plan["checkpoints"])))
    if plan["monitor"]:
        rows += [("" if number else "monitor", line) for number, line in enumerate(_monitor_lines(plan["monitor"]))]
    rows += [("" if number else "export", line) for number, line in enumerate(plan.get("export", ()))]
    if plan["unused_keys"]:
        rows.append(("not used", f"{', '.join(plan['unused_keys'])} (they say nothing for this configuration)"))
    lines = [f"{name:<14} {text}".rstrip() for name, text in rows]
    lines += ["", *_mixture(plan)]
    for sample in plan["samples"]:
        more = sample["documents"] - len(sample["text"])
        padding = f", {sample['padding']:.1%} padding" if sample["padding"] else ""
        count = f"{sample['documents']} document{'s' * (sample['documents'] != 1)}"
        lines += ["", f"a row of {sample['lang']}: {count}{padding}", *(f"  {text}" for text in sample["text"])]
        lines += [f"  and {more} more"] if more else []
    return "\n".join(lines)


def _embeddings(rows: dict) -> str:
    """Which tokens have rows of embedding and head beside the base's, in words."""
    most = "at most " if rows.get("at_most") else ""
    added = f", {rows['added']:,} of them beyond the base's vocabulary" if rows["added"] else ""
    train = "which train" if rows["train"] else "which do not train"
    return f"{most}{rows['rows']:,} of {rows['vocabulary']:,} tokens have rows of their own{added}, {train}"


def _rows(data: DataConfig) -> str:
    """How rows are made and shared out, in words."""
    packing = {"concatenate": "joined and cut", "best-fit": "packed by best fit"}[data.packing]
    sizes = {
        "temperature": f"by tokens to the power 1/{data.temperature:g}" if data.temperature != 1 else "by tokens",
        "unimax": "equally",
    }[data.sampling]
    weights = [source.weight for source in data.train]
    if None not in weights:
        sizes = "by weight"
    elif weights.count(None) < len(weights):
        sizes += " or weight"
    replay = "" if data.replay is None else f", {data.replay:.1%} of them old languages"
    limit = "" if data.max_epochs is None else f", at most {data.max_epochs:g} epochs"
    return f"rows of {data.sequence_length:,} tokens, {packing}{replay}; languages {sizes}{limit}"


def _mixture(plan: dict) -> list[str]:
    """The table of languages, each with its sources below it where it has several."""
    columns = ("documents", 11), ("tokens", 10), ("share", 8), ("drawn", 10), ("epochs", 8), ("padding", 9), ("cut", 7)
    languages = language_records(plan["mixture"])
    width = max([10, *(len(record["lang"]) + 2 for record in languages)])
    heading = f"{'language':<{width}}{'role':<6}" + "".join(f"{name:>{size}}" for name, size in columns)
    lines = [plan["rows"], "", f"{heading}  source"]
    for language in languages:
        several = len(language["sources"]) > 1
        source = f"{len(language['sources'])} sources" if several else language["sources"][0]["source"]
        lines.append(f"{language['lang']:<{width}}{language['role']:<6}{_figures(language)}  {source}")
        lines += [f"{'':<{width + 6}}{_figures(s)}    {s['source']}" for s in language["sources"] if several]
    unread = sum(row["tokens"] is None for row in plan["mixture"])
    if unread:
        lines.append(f"?: {unread} of {len(plan['mixture'])} corpora are not tokenized yet; training does it first")
    return lines


def _figures(row: dict) -> str:
    tokens, drawn = row["tokens"], row["tokens_drawn"]
    return (
        f"{_known(row['documents'], '{:,}'):>11}{_known(None if tokens is None else _si(tokens)):>10}"
        f"{_known(row['weight'], '{:.1%}'):>8}{_known(None if drawn is None else _si(drawn)):>10}"
        f"{_known(row['epochs'], '{:.2f}'):>8}{_known(row['padding'], '{:.2%}'):>9}{_known(row['cut'], '{:.1%}'):>7}"
    )


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


def _disk(bytes: int, every: int, most: int) -> str:
    return f"{_bytes(bytes)} each, every {every:,} steps; at most {most:,} on the disk at once, {_bytes(most * bytes)}"


def _monitor_lines(cost: dict) -> list[str]:
    """What a measurement costs, in words, and what to do about one that costs too much."""
    if "unknown" in cost:
        return [f"its cost is not known: {cost['unknown']}"]
    base = f", {_si(cost['base_tokens'])} of the base's" if cost["base_tokens"] else ""
    lines = [
        f"a checkpoint: {_si(cost['tokens'])} tokens of the model's{base}, {cost['passes']:,} passes; "
        f"{_si(cost['flops'])}FLOP",
        f"{100 * cost['share']:.1f}% of the training's in the {cost['every']:,} steps between",
        f"not counted: {', '.join(cost['uncounted'])}",
    ]
    if cost["share"] > USUAL_SHARE:
        enough = math.ceil(cost["every"] * cost["share"] / USUAL_SHARE)
        lines.append(
            f"more than the usual {100 * USUAL_SHARE:g}%: lower data.evaluation[].limit or monitor.compare, or raise "
            f"train.save_every to {enough:,}"
        )
    return lines


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
