"""One optimizer step: its micro-batches through the engine, its sums over all ranks, and what they come to."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moect.config import RunConfig
from moect.data.batches.loader import Loader, MicroBatch
from moect.model.losses import balance_loss
from moect.train import state
from moect.train.engine import clips_itself
from moect.train.health.judge import Judge
from moect.train.health.step_guard import StepGuard
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
        fault: why the last step was skipped; None: it was taken.
        judge: decides it.
    """

    def __init__(self, config: RunConfig, engine, objective: Objective, loader: Loader, rank: int, world_size: int):
        self.config, self.engine, self.objective, self.loader = config, engine, objective, loader
        self.rank, self.world_size = rank, world_size
        self.sums: dict[str, torch.Tensor] = {}
        self.notes: dict[str, float] = {}
        self.counts = StepCounts(*torch.zeros(4, dtype=torch.int64))
        self.judge = Judge(config.health)
        self.fault: str | None = None
        self._guard = StepGuard(state.torch_optimizer(engine))
        self._notes: dict[str, torch.Tensor] = {}  # those of the sums that became `notes`
        self._loss = self._norm = 0.0  # of the last step; the norm before clipping, over all that trains

    def take(self, step: int, notes: dict[str, float]) -> None:
        """One optimizer step over its micro-batches. A bad one is skipped: nothing but the text goes on.

        Args:
            step: optimizer steps before it.
            notes: numbers for the other ranks, the same names on each: they travel with the step's sums, at no
                message of their own.
        """
        config, engine = self.config, self.engine
        engine.train()
        torch.manual_seed((config.seed * 1_000_003 + step) * 4099 + self.rank)
        state.set_learning_rate(engine, learning_rate(step, config.train))
        if self.loader.change:  # losses of another mixture say nothing of this one's
            self.judge.forget()
        batches = [batch.to(engine.device) for batch in self.loader.next_step()]
        self.counts = self.count(batches)
        # DeepSpeed averages over ranks and accumulation steps; the objective's shares are to be summed
        scale = float(self.world_size * len(batches))
        for number, batch in enumerate(batches, 1):
            engine.backward(engine(**arguments(batch), counts=self.counts, scale=scale))
            if number < len(batches):
                engine.step()
        self._add_up(notes)  # before the optimizer acts on them
        with self._guard.judged(self._judge) as asked:
            engine.step()
        if not asked():  # DeepSpeed left the step out by itself: the norm is not finite
            self._judge()
        if self.fault is None:
            self._balance()

    def count(self, batches: list[MicroBatch]) -> StepCounts:
        """Count a step's tokens over all ranks; without waiting for the device."""
        labels = sum((b.labels_BS != -100).sum() for b in batches)
        old, new = (sum((b.role_BS == role).sum() for b in batches) for role in (0, 1))
        counts = torch.stack([labels, old, new])
        dist.all_reduce(counts)
        labels, old, new = counts
        return StepCounts(labels=labels, valid=old + new, old=old, new=new, old_share=self.loader.old_share)

    def figures(self, step: int) -> dict:
        """The last step's losses over all its tokens, and its expert load; `step` is the number of steps by now."""
        sums, load_LE = {name: value.cpu() for name, value in self.sums.items()}, self.objective.load_LE.cpu()
        known = self.counts
        counts = StepCounts(*torch.stack([known.labels, known.valid, known.old, known.new]).tolist())
        values = {
            "loss": self._loss,
            "lr": learning_rate(step - 1, self.config.train),
            "grad_norm": self._norm,
            "old_share": counts.old / max(counts.valid, 1),
        }
        if "expert_counts" in sums:
            values["greatest_load"] = (load_LE.max(1).values * self.objective.experts_L).max().item()
        if "scores" in sums:
            scores_LE = sums["scores"] / counts.valid
            experts_L, first = self.objective.experts_L, self.objective.first_balanced
            values["balance"] = balance_loss(load_LE, scores_LE, first, experts_L).item()
        if "base_kl" in sums:
            values["base_kl"] = sums["base_kl"].item() / max(counts.old, 1)
        if "prior" in sums:
            values["language_prior"] = sums["prior"].item() / max(counts.old, 1)
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
        self._notes = {name: self.sums.pop(f"note {name}").reshape(1) for name in notes}

    def _balance(self) -> None:
        """Take the step's expert load, over all ranks, to the next step's balance loss or to the selection bias."""
        objective = self.objective
        if "expert_counts" not in self.sums:
            return
        counts_LE = self.sums["expert_counts"]
        objective.load_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp_min(1)
        if self.config.moe.balance == "bias":
            first = objective.first_balanced
            for moe, all_E in zip(objective.modules_L, counts_LE, strict=True):
                counts_E = all_E[: moe.num_experts]
                step_E = torch.sign(counts_E[first:].mean() - counts_E) * self.config.loss.bias_rate
                step_E[:first] = 0
                moe.router.selection_bias += step_E.to(moe.router.selection_bias)

    def _judge(self) -> bool:
        """Whether the step is taken. Called where DeepSpeed knows the norm and has waited for it, so that reading here
        waits for nothing more."""
        if clips_itself(self.config.train):
            norm = self._clip()
        else:
            norm = self.engine.optimizer._global_grad_norm
        norm = torch.as_tensor(norm, dtype=torch.float64, device=self.engine.device).reshape(1)
        loss = (self.sums["cross_entropy"] / self.counts.labels.clamp_min(1)).reshape(1)
        self._loss, self._norm, *notes = torch.cat([loss, norm, *self._notes.values()]).tolist()
        self.notes = dict(zip(self._notes, notes, strict=True))
        self.fault = self.judge.fault(self._loss, self._norm)
        return self.fault is None

    def _clip(self) -> torch.Tensor:
        """Clip the gradient, as DeepSpeed would, and return its norm before."""
        from deepspeed.runtime.utils import clip_grad_norm_

        return clip_grad_norm_(self.objective.parameters(), self.config.train.clip or float("inf"))


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
