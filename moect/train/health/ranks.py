"""Whether all ranks have the same weights, bit for bit: what a fault of memory or network changes on one of them would
otherwise train on in silence."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect.errors import TrainingError
from moect.model.append import is_appended_tensor

CHUNK = 2**24  # elements whose bits are widened to int64 at once
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def check_ranks(model: nn.Module, where: str, everything: bool = False) -> None:
    """Compare the ranks' copies of what trains, parameters and appended buffers. Every rank calls it.

    Under ZeRO 3 a divided parameter is there once, each rank with its piece, and there is nothing to compare: only what
    is whole on every rank is looked at.

    Args:
        model: the causal LM.
        where: when that is, for the message.
        everything: also what is frozen.

    Raises:
        TrainingError: they differ. It names the odd ranks, and the first tensor that differs.
    """
    if dist.get_world_size() == 1:
        return
    copies = dict(_copies(model, everything))
    if not copies:
        return
    names = list(copies)
    mine = torch.stack([checksum(tensor) for tensor in copies.values()]).to(_device())
    sums = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, mine)
    sums_WN = torch.stack(sums).cpu()
    different = (sums_WN != sums_WN[0]).any(0)
    if not different.any():
        return
    hosts = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    odd = [name for name, differs in zip(names, different.tolist(), strict=True) if differs]
    error = TrainingError(
        f"{where}: {_who(sums_WN, hosts)} in {odd[0]} ({len(odd)} of {len(names)} tensors differ): a fault of memory, "
        "of the network, or another file; leave that machine out, and start again with resume=auto from the last "
        "checkpoint, which was made before"
    )
    error.told_by_main_rank = dist.get_rank() != 0
    raise error


def checksum(tensor: Tensor) -> Tensor:
    """A number of a tensor's bits, int64 on its device: other if one bit is, or if two elements change places.

    The sum of bits_i (2i + 1) in integers, modulo 2^64. One element that is other changes it, since 2i + 1 is odd; two
    elements of up to 32 bits that change places do, since 2 (i - j) times their difference is less than 2^64.
    """
    flat = tensor.detach().contiguous().flatten()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        bits = flat[start : start + CHUNK].view(BITS[flat.element_size()]).long()
        total += (bits * torch.arange(2 * start + 1, 2 * (start + len(bits)), 2, device=flat.device)).sum()
    return total


def _copies(model: nn.Module, everything: bool) -> Iterator[tuple[str, Tensor]]:
    """What each rank has a whole copy of, by name."""
    for name, parameter in model.named_parameters():
        whole = parameter.numel() == getattr(parameter, "ds_numel", parameter.numel())
        if whole and (everything or parameter.requires_grad):
            yield name, parameter
    for name, buffer in model.named_buffers():
        if everything or is_appended_tensor(name):
            yield name, buffer


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _who(sums_WN: Tensor, hosts: list[str]) -> str:
    rows = [tuple(row) for row in sums_WN.tolist()]
    ((common, count), *_) = Counter(rows).most_common()
    if 2 * count > len(rows):
        odd = [f"rank {rank} on {hosts[rank]}" for rank, row in enumerate(rows) if row != common]
        return f"{', '.join(odd)} {'differs' if len(odd) == 1 else 'differ'} from the others"
    groups: dict[tuple, list[str]] = {}
    for rank, row in enumerate(rows):
        groups.setdefault(row, []).append(f"rank {rank} on {hosts[rank]}")
    return f"{' and '.join(', '.join(group) for group in groups.values())} differ"
