"""Proof that a training left its base alone: its tensors in memory and its files on disk, at the start and at the end.

In memory that is every frozen parameter that was not appended, by the sha256 of its bytes: with `moe-ct` and `lora` the
whole base; with `full` there is none, since all of it trains. One rank's copies are digested (with ZeRO-3 the pieces of
all ranks, put together); that the ranks do not drift apart is another check.
"""

from __future__ import annotations

import hashlib
import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect import distributed
from moect.config import RunConfig
from moect.errors import CheckpointError, MoectError, TrainingError
from moect.model.append import is_appended_tensor
from moect.model.build import base_files, base_fingerprint, load_base_config
from moect.model.partition import full_shape
from moect.train.checkpoints.reading import values_digest

log = logging.getLogger("moect.train")


class BaseProof:
    """What the base is when a run starts, to be held against what it is later. Every rank makes one.

    Args:
        config: the run's.
        model: with its base, before the first step, on the device that it trains on.
        files: digests of the base's files as they were read, by name: `base_files`.
        fingerprint: of the base.

    Attributes:
        memory: a digest of all frozen tensors, with names, dtypes and shapes; the same on any number of ranks and with
            every ZeRO stage. None: there are none.
        tensors, bytes: how many there are.
    """

    def __init__(self, config: RunConfig, model: nn.Module, files: dict[str, str], fingerprint: str):
        self.config, self.files, self.fingerprint = config, files, fingerprint
        self._frozen = frozen_parameters(model)
        self._at_start = self._digests()
        self.tensors = len(self._frozen)
        self.bytes = sum(full_shape(p).numel() * p.element_size() for p in self._frozen.values())
        self.memory = values_digest(self._at_start) if self.tensors else None

    def check_resumed(self, info: dict, where: str) -> None:
        """Whether the frozen tensors are those that a checkpoint of this run was trained with.

        Args:
            info: the checkpoint's plain values. Those of another precision, or from before there were digests, are not
                compared.
            where: begins the message.

        Raises:
            CheckpointError: they are not, although the files of the base are the same.
        """
        then, precision = info.get("base_memory"), info["config"]["train"]["precision"]
        if then is not None and precision == self.config.train.precision and then != self.memory:
            raise CheckpointError(
                f"{where}: the base's files are those that it was trained with, but its tensors in memory are not "
                f"(digest {then[:12]}…, now {(self.memory or 'none')[:12]}…); take the versions of torch and "
                "transformers that the run began with, and if they are the same, another machine"
            )

    def prove(self, files: bool = True) -> dict:
        """Look again; every rank calls it.

        Args:
            files: read those on disk, too.

        Returns:
            What is to be logged.

        Raises:
            TrainingError: a tensor or a file is not what it was.
        """
        now = self._digests()
        changed = [name for name, digest in self._at_start.items() if now[name] != digest]
        fault = distributed.on_main(self._fault_of_files) if files else None
        if changed:
            raise TrainingError(
                f"{self.config.folder}: {changed[0]} of the frozen base ({len(changed)} of {self.tensors} tensors) has "
                "changed in memory since the run started, so nothing trained since can be trusted; "
                + (
                    f"so has the file it is read from: {fault}"
                    if fault
                    else "let the machine's memory be tested, and go on elsewhere from a checkpoint before this start"
                )
            )
        if fault:
            raise TrainingError(
                f"{self.config.folder}: {fault}; put the files back as they were before you resume or export; what "
                "was trained is not touched by it"
            )
        return {
            "event": "base",
            "unchanged": True,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "files": len(self.files) if files else None,
            "fingerprint": self.fingerprint,
        }

    def _fault_of_files(self) -> str | None:
        """What has become of the files on disk, or None."""
        model = self.config.model
        try:
            load_base_config(model)  # has words for a base that is gone
            now = base_files(model)
            fingerprint = base_fingerprint(model, self.config.seed, now)
        except (MoectError, OSError) as error:
            return f"the base cannot be read any more ({error})"
        if fingerprint == self.fingerprint:
            return None
        names = sorted(self.files.keys() | now.keys())
        name = next((n for n in names if self.files.get(n) != now.get(n)), "config.json")
        return f"the base {model.base} has changed on disk since the run started ({name})"

    def _digests(self) -> dict[str, str]:
        """Of each frozen tensor, by name; the same on every rank."""
        if not any(hasattr(p, "ds_id") for p in self._frozen.values()):
            return distributed.on_main(lambda: {name: digest(p) for name, p in self._frozen.items()})
        whole = {name: _put_together(p) for name, p in self._frozen.items()}  # digested as it comes
        return distributed.on_main(lambda: whole)


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that do not train, by name."""
    return {n: p for n, p in model.named_parameters() if not p.requires_grad and not is_appended_tensor(n)}


def told(proof: dict) -> str:
    """A proof as a line for the screen."""
    where = ["on disk"] if proof["files"] else []
    if proof["tensors"]:
        where.insert(0, f"in memory ({proof['tensors']} tensors, {proof['bytes'] / 2**20:,.1f} MiB)")
    return f"the base is unchanged {' and '.join(where)}" if where else "the base was made from scratch, and all trains"


@torch.no_grad()
def digest(tensor: Tensor) -> str:
    """The sha256 of a tensor's dtype, shape and bytes."""
    raw = tensor.detach().contiguous().to("cpu").reshape(-1).view(torch.uint8)
    made = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    made.update(raw.numpy())
    return made.hexdigest()


@torch.no_grad()
def _put_together(parameter: nn.Parameter) -> str | None:
    """`digest` of a parameter that ZeRO-3 divided, on the main rank; None on the others.

    The pieces themselves are collected: DeepSpeed's own gathering would change what it holds ready for the next step.
    A parameter that it keeps whole beside its pieces (the small ones) counts as it is used.
    """
    piece = parameter.ds_tensor.detach().to(distributed.device()).contiguous().view(torch.uint8)
    pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size())] if distributed.is_main() else None
    dist.gather(piece, pieces, dst=0)
    if pieces is None:
        return None
    size, shape = parameter.ds_numel, full_shape(parameter)
    joined = torch.cat([p.to("cpu") for p in pieces]).view(parameter.ds_tensor.dtype)[:size].view(shape)
    of_pieces = digest(joined)
    if parameter.shape == shape and (whole := digest(parameter)) != of_pieces:
        return f"{of_pieces} in pieces, {whole} whole"
    return of_pieces
