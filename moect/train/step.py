"""One optimizer step: its micro-batches through the engine, its sums over all ranks, and what they come to."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from moect.config import RunConfig
from moect.data.batches.loader import Loader, MicroBatch
from moect.errors import TrainingError
from moect.train import state
from moect.train.objective import Objective, StepCounts
from moect.train.schedule import learning_rate


class Steps:
    """Takes the optimizer steps of a run, on one rank.

    Args:
        config: the run's.
        engine: DeepSpeed's, around `objective`.
        objective: the model with its losses.
        loader: gives the micro-batches.
        rank, world_size: this process, and how many share the steps.

    Attributes:
        sums: of the last step, over all ranks, by name.
        notes: of the last step, the sums of what the ranks passed on.
    """

    def __init__(self, config: RunConfig, engine, objective: Objective, loader: Loader, rank: int, world_size: int):
        self.config, self.engine, self.objective, self.loader = config, engine, objective, loader
        self.rank, self.world_size = rank, world_size
        self.sums: dict[str, torch.Tensor] = {}
        self.notes: dict[str, float] = {}
        self.counts = StepCounts(0, 0, 0, 0)

    def take(self, step: int, notes: dict[str, float]) -> None:
        """One optimizer step over its micro-batches.

        Args:
            step: optimizer steps before it.
            notes: numbers for the other ranks, the same names on each: they travel with the step's sums, at no
                message of their own.
        """
        config, engine = self.config, self.engine
        engine.train()
        torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + self.rank)
        state.set_learning_rate(engine, learning_rate(step, config.train))
        batches = [batch.to(engine.device) for batch in self.loader.next_step()]
        self.counts = self.count(batches)
        # DeepSpeed averages over ranks and accumulation steps; the objective's shares are to be summed
        scale = float(self.world_size * len(batches))
        for number, batch in enumerate(batches, 1):
            engine.backward(engine(**arguments(batch), counts=self.counts, scale=scale))
            if number == len(batches):  # before the optimizer acts on them
                self._add_up(notes)
            engine.step()
        self._balance()
        self._check_finite(step + 1)

    def count(self, batches: list[MicroBatch]) -> StepCounts:
        """Count a step's tokens over all ranks."""
        labels = sum((b.labels_BS != -100).sum() for b in batches)
        old, new = (sum((b.role_BS == role).sum() for b in batches) for role in (0, 1))
        counts = torch.stack([labels, old, new])
        dist.all_reduce(counts)
        labels, old, new = counts.tolist()
        return StepCounts(labels=labels, valid=old + new, old=old, new=new)

    def grad_norm(self) -> float:
        """Of the last step, before clipping, over all that trains."""
        return float(self.engine.get_global_grad_norm() or 0.0)

    def figures(self, step: int) -> dict:
        """The last step's losses over all its tokens, and its expert load; `step` is the number of steps by now."""
        sums, counts = {name: value.cpu() for name, value in self.sums.items()}, self.counts
        values = {
            "loss": sums["cross_entropy"].item() / max(counts.labels, 1),
            "lr": learning_rate(step - 1, self.config.train),
            "grad_norm": self.grad_norm(),
            "old_share": counts.old / max(counts.valid, 1),
        }
        if "expert_counts" in sums:
            load_LE = self.objective.load_LE
            values["greatest_load"] = load_LE.max().item() * load_LE.shape[1]
        if "scores" in sums:
            scores_LE = sums["scores"] / counts.valid
            values["balance"] = (scores_LE.shape[1] * (self.objective.load_LE * scores_LE).sum(1)).mean().item()
        if "z" in sums:
            values["z"] = sums["z"].item() / counts.valid
        if "gate_old" in sums:
            values["gate"] = sums["gate_old"].item() / max(counts.old, 1) + sums["gate_new"].item() / max(counts.new, 1)
        if "frozen_share" in sums:
            values["frozen_share"] = sums["frozen_share"].item() / counts.valid
        return values

    def _add_up(self, notes: dict[str, float]) -> None:
        """The step's sums and notes over all ranks, in one collective."""
        sums, self.objective.sums = self.objective.sums, {}
        device = self.engine.device
        sums |= {f"note {k}": torch.tensor(v, dtype=torch.float64, device=device) for k, v in notes.items()}
        self.sums = _all_reduced(sums)
        self.notes = {name: self.sums.pop(f"note {name}") for name in notes}

    def _balance(self) -> None:
        """Take the step's expert load, over all ranks, to the next step's balance loss or to the selection bias."""
        objective = self.objective
        if "expert_counts" not in self.sums:
            return
        counts_LE = self.sums["expert_counts"]
        objective.load_LE = (counts_LE / counts_LE.sum(1, keepdim=True).clamp_min(1)).cpu()
        if self.config.moe.balance == "bias":
            for moe, counts_E in zip(objective.modules_L, counts_LE, strict=True):
                step_E = torch.sign(counts_E.mean() - counts_E) * self.config.loss.bias_rate
                moe.router.selection_bias += step_E.to(moe.router.selection_bias)

    def _check_finite(self, step: int) -> None:
        """Stop at the first step that went wrong, before a checkpoint is made of it."""
        for name, value in (("loss", self.sums["cross_entropy"].item()), ("norm of the gradient", self.grad_norm())):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.config.folder}: the {name} is {value} at step {step}: lower train.lr or lengthen "
                    "train.warmup, and go on from the last checkpoint with resume=auto"
                )


def arguments(batch: MicroBatch) -> dict:
    """What the objective's forward takes of a micro-batch."""
    return {
        "input_ids": batch.input_ids_BS,
        "labels": batch.labels_BS,
        "position_ids": batch.position_ids_BS,
        "role": batch.role_BS,
    }


def _all_reduced(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums over all ranks, in one collective."""
    names = sorted(sums)
    flat = torch.cat([sums[name].reshape(-1) for name in names])
    dist.all_reduce(flat)
    parts = flat.split([sums[name].numel() for name in names])
    return {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
