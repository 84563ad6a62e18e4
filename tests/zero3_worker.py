"""Run by DeepSpeed's launcher: several jobs one after another, in one process a rank.

    deepspeed --num_accelerators 2 tests/zero3_worker.py JOBS.json

JOBS.json is a list of {"train": CONFIG} and {"weigh": CONFIG}, configurations as plain values. A training under ZeRO-3
has settings with which nothing stays whole: at the sizes of tests DeepSpeed would gather everything once and keep it.
OUTPUT/NAME-RANK.json tells what a rank held when the model of such a run was built, or what loading its base took.
"""

import json
import os
import sys
from pathlib import Path

import torch
from deepspeed import zero

from moect import distributed
from moect.config import config_from_dict
from moect.model.build import DTYPES, build_model, load_base
from moect.train import engine, loop

NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
plain_settings = engine.deepspeed_config


def strict_settings(train, *counts):
    settings = plain_settings(train, *counts)
    if train.zero_stage == 3:
        settings["zero_optimization"].update(NOTHING_STAYS)
    return settings


def inspect(model, config, world_size) -> dict:
    """What this rank holds of a model just built, and where it differs from the one that is built whole."""
    expected = build_model(config)
    expected = dict(expected.named_parameters()) | dict(expected.named_buffers())
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    assert expected.keys() == found.keys()
    divided = {name: p for name, p in model.named_parameters() if hasattr(p, "ds_id")}
    told = {
        "ranks": world_size,
        "whole": [name for name, p in model.named_parameters() if p.numel()],
        "parameters": sum(expected[name].numel() for name in divided),
        "pieces": sum(p.ds_tensor.numel() for p in divided.values()),
        "tensors": len(divided),
        "different": [],
    }
    for name, tensor in expected.items():
        with zero.GatheredParameters([found[name]]):
            same = (tensor.dtype, tensor.requires_grad) == (found[name].dtype, found[name].requires_grad)
            if not same or not torch.equal(tensor, found[name]):
                told["different"].append(name)
    return told


def weigh(config, world_size) -> dict:
    """Bytes of memory that loading the base divided adds: at most (without what is only mapped, on all ranks but the
    first, which reads the files), and in the end."""
    before = status()
    model = load_base(config.model, DTYPES[config.train.precision], zero3=strict_settings(config.train, world_size))
    after = status()
    assert all(p.numel() == 0 for p in model.parameters())
    return {"most": after["VmHWM"] - before["VmRSS"], "in the end": after["RssAnon"] - before["RssAnon"]}


def status() -> dict[str, int]:
    """Bytes of this process by the kernel's names."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(value.split()[0]) * 1024 for key, value in lines if value.endswith("kB")}


def main(jobs: Path) -> None:
    rank, world_size = distributed.start()
    engine.deepspeed_config = loop.deepspeed_config = strict_settings

    def tell(config, told):
        (Path(config.output) / f"{config.name}-{rank}.json").write_text(json.dumps(told))

    def build_and_tell(config, **kwargs):
        model = build_model(config, **kwargs)
        if kwargs.get("zero3"):
            tell(config, inspect(model, config, world_size))
        return model

    loop.build_model = build_and_tell
    for job in json.loads(jobs.read_text()):
        ((kind, values),) = job.items()
        config = config_from_dict(values)
        if kind == "weigh":
            tell(config, weigh(config, world_size))
        else:
            loop.train(config)
    distributed.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as moect.cli.process does, and for its reason


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
