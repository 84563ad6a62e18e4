"""Run by DeepSpeed's launcher: ranks that drift apart, each case in its turn; OUTPUT-RANK.json tells what was said.

deepspeed --num_accelerators 3 tests/health_worker.py --config OUTPUT
"""

import json
import os
import sys
from pathlib import Path

import torch

from moect import distributed
from moect.errors import TrainingError
from moect.train.health.ranks import check_ranks


class Model(torch.nn.Module):
    """Two parameters that train, one that is frozen, an appended buffer and one of the base."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Parameter(torch.randn(7, 5).to(dtype))
        self.second = torch.nn.Parameter(torch.randn(64).to(dtype))
        self.base = torch.nn.Parameter(torch.randn(9).to(dtype), requires_grad=False)
        self.block = torch.nn.ModuleDict({"moe": torch.nn.BatchNorm1d(4, affine=False)})


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    """One bit of one element."""
    bits = tensor.data.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[place] ^= 1 << bit


def swap(tensor: torch.Tensor, one: int, other: int) -> None:
    """Two elements change places."""
    tensor.data.view(-1)[[one, other]] = tensor.data.view(-1)[[other, one]].clone()


# name: (ranks that differ, what happens to the model there, whether all of it is compared)
CASES = {
    "nothing": ((), None, True),
    "lowest bit": ((1,), lambda m: flip(m.second, 63, 0), False),
    "places": ((2,), lambda m: swap(m.first, 3, 34), False),
    "buffer": ((0,), lambda m: m.block["moe"].running_mean.add_(1), False),
    "frozen, not looked at": ((1,), lambda m: flip(m.base, 0, 3), False),
    "frozen": ((1,), lambda m: flip(m.base, 0, 3), True),
    "two tensors": ((1,), lambda m: (flip(m.first, 0, 3), flip(m.second, 0, 3)), False),
    "all apart": ((1, 2), lambda m: flip(m.first, 0, torch.distributed.get_rank()), False),
}


def main(output: Path) -> None:
    rank, _ = distributed.start()
    said = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (odd, happens, everything) in CASES.items():
            model = Model(dtype)
            if rank in odd:
                happens(model)
            try:
                check_ranks(model, "here", everything)
            except TrainingError as error:
                said[f"{name} {dtype}"] = str(error)
    Path(f"{output}-{rank}.json").write_text(json.dumps(said))
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)  # as moect.cli.process does, and for its reason


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
