"""Run by DeepSpeed's launcher on every rank: short trainings, and the most bytes that tensors took in each.

    memory_worker.py BUCKET CONFIG[,CONFIG…]      one JSON line a configuration, from rank 0

Counted is every tensor that PyTorch makes between the start of the run and its end, from its storage's first sight to
its release; left out, what the optimizer's kernel takes for the moment of its work.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moect import distributed
from moect.config import load_config
from moect.train import engine, meters
from moect.train.loop import Run

BLOCK = 100_000_000  # bytes
STEPS = 2  # the second has all of the optimizer's state


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages alive, and the most there were.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Summed anew: storages are also released by other threads, and while this one counts."""
        return sum(list(self.sizes.values()))

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is released."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.sizes.pop, storage._cdata)

    def add_all(self) -> None:
        """Count the tensors that came about unseen, as those read from files."""
        gc.collect()
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                self.add(thing)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def measure(path: str, rank: int, world_size: int) -> dict:
    """The most bytes of a training of STEPS steps, beside the run's plan."""
    with LiveBytes() as live:
        live.add_all()
        before = live.now
        run = Run(load_config(path), rank, world_size)
        live.add_all()
        _leave_out_its_kernel(_torch_optimizer(run.engine), live)
        live.peak = live.now
        for _ in range(STEPS):
            run.steps.take(run.step, {})
            run.step += 1
        found = {"peak": live.peak - before, "planned": run.plan["memory_per_rank"]}
    found["processes"], found["greatest"] = _process_peaks(rank, world_size)
    del _torch_optimizer(run.engine).step
    run.close()
    return found


def _process_peaks(rank: int, world_size: int) -> tuple[list[int], int]:
    """The peak of every rank's process when each has taken more than the one before, and the greatest as it is told."""
    meters.reset_peak_memory(torch.device("cpu"))
    torch.ones((rank + 1) * BLOCK, dtype=torch.uint8)
    own = [0] * world_size
    dist.all_gather_object(own, meters.peak_memory(torch.device("cpu")))
    return own, meters.greatest_peak_memory(torch.device("cpu"))


def _torch_optimizer(deepspeed_engine) -> torch.optim.Optimizer:
    optimizer = deepspeed_engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _leave_out_its_kernel(optimizer: torch.optim.Optimizer, live: LiveBytes) -> None:
    original = optimizer.step

    def step(*args, **kwargs):
        peak = live.peak
        result = original(*args, **kwargs)
        live.peak = max(peak, live.now)
        return result

    optimizer.step = step


def _with_bucket(size: int) -> None:
    """DeepSpeed's own bucket of 500 million numbers would be all there is to see beside a small model."""
    original = engine.deepspeed_config

    def smaller(*args):
        settings = original(*args)
        settings["zero_optimization"]["reduce_bucket_size"] = size
        return settings

    engine.deepspeed_config = smaller


if __name__ == "__main__":
    _with_bucket(int(sys.argv[1]))
    rank, world_size = distributed.start()
    for path in sys.argv[2].split(","):
        found = measure(path, rank, world_size)
        gc.collect()
        if rank == 0:
            print("measured", json.dumps(found), flush=True)
    distributed.stop()
