"""What one micro-batch contributes to the step's loss.

The step's loss is defined over all tokens of the step: of all ranks and all accumulation steps. Each micro-batch adds
its share of that sum, so neither the number of ranks nor of accumulation steps changes the result.

The balance loss E·Σ f_e P_e is the one term that is not a sum over tokens. P_e is linear in the tokens; for the load
f_e, which carries no gradient, the exact load of the step before is taken: that of this step would only be known after
its last micro-batch.

B batch rows, S sequence, T = B·S tokens, E experts, L blocks with a module
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moect.config import RunConfig
from moect.model.append import RECORD, modules_of
from moect.model.build import base_view
from moect.model.embeddings import logits_of
from moect.model.losses import (
    balance_loss,
    base_kl_sum,
    cross_entropy_sum,
    expert_counts,
    gate_sums,
    language_prior_sum,
    score_sums,
    z_sum,
)
from moect.model.record import ForwardRecord


@dataclass
class StepCounts:
    """Tokens of a whole optimizer step, over all ranks and accumulation steps; numbers or int64 tensors without shape,
    which the device need not be waited for."""

    labels: int | Tensor
    valid: int | Tensor
    old: int | Tensor
    new: int | Tensor
    old_share: float | None = None  # of the valid tokens, as the mixture has it over many steps


class Objective(nn.Module):
    """The causal LM with its losses; what DeepSpeed wraps.

    Attributes:
        model: the causal LM.
        experts_L: fp64, E of each block with a module.
        num_experts: E of the block that has the most.
        load_LE: fp64, share of assignments each expert had in the last step that was taken; uniform at the start.
        sums: what the micro-batches of this step added up to on this rank, by name; fp64, without gradient.
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__()
        self.model = model
        self.config = config
        self.modules_L = modules_of(model)
        counts = [moe.num_experts for moe in self.modules_L]
        self.experts_L = torch.tensor(counts, dtype=torch.float64)
        self.num_experts = max(counts, default=0)
        there_LE = torch.arange(self.num_experts) < self.experts_L[:, None]
        self.load_LE = there_LE / self.experts_L[:, None]
        self.sums: dict[str, Tensor] = {}
        self.first_balanced = int(config.loss.balance_over == "trained")  # expert 0 is the frozen FFN

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, role: Tensor, counts: StepCounts, scale: float
    ) -> Tensor:
        """This micro-batch's share of the step's loss, times `scale`.

        Args:
            input_ids, labels, position_ids: (B, S) int64; label -100 is not scored.
            role: (B, S) int8, 0 old, 1 new, -1 padding.
            counts: tokens of the whole step.
            scale: undoes the averaging of whoever sums the gradients.
        """
        record = ForwardRecord()
        extra = {RECORD: record} if self.modules_L else {}
        # use_cache=False is what keeps packed documents from seeing one another
        hidden_BSD = self.model.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **extra
        ).last_hidden_state
        cross_entropy = cross_entropy_sum(
            hidden_BSD.flatten(0, 1),
            labels.flatten(),
            partial(logits_of, self.model),
            self.model.config.vocab_size,
            record.gate_logit_T,
        )
        self._add("cross_entropy", cross_entropy)
        loss = cross_entropy / _some(counts.labels)
        if self.modules_L:
            loss = loss + self._module_losses(record, role.flatten(), counts)
        if weight := self.config.loss.base_kl:
            kl = self._base_kl(input_ids, position_ids, role, hidden_BSD, record.gate_logit_T)
            self._add("base_kl", kl)
            loss = loss + weight * kl / _some(counts.old)
        return loss * scale

    def _base_kl(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        role: Tensor,
        hidden_BSD: Tensor,
        gate_logit_T: Tensor | None,
    ) -> Tensor:
        """The sum over old tokens of KL(base || model), the base being this model without what was appended, on the
        rows that have any; on one row if none has, as under ZeRO-3 every rank has to pass the blocks."""
        rows = (role == 0).any(1).nonzero()[:, 0]
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=role.device)
        with torch.no_grad(), base_view(self.model):
            of_base_RSD = self.model.model(
                input_ids=input_ids[rows], position_ids=position_ids[rows], use_cache=False
            ).last_hidden_state
        if gate_logit_T is not None:
            gate_logit_T = gate_logit_T.view(role.shape)[rows].flatten()
        return base_kl_sum(
            hidden_BSD[rows].flatten(0, 1),
            of_base_RSD.flatten(0, 1),
            role[rows].flatten() == 0,
            partial(logits_of, self.model),
            lambda: base_view(self.model),
            role.numel() * self.model.config.vocab_size,
            gate_logit_T,
        )

    def _module_losses(self, record: ForwardRecord, role_T: Tensor, counts: StepCounts) -> Tensor:
        moe, weights = self.config.moe, self.config.loss
        valid_T = role_T >= 0
        with torch.no_grad():
            self._add("expert_counts", expert_counts(record, self.num_experts, valid_T))
            shares = [b.frozen_share_T[valid_T].sum() for b in record.blocks.values() if b.frozen_share_T is not None]
            if shares:
                self._add("frozen_share", torch.stack(shares).mean())
        loss = torch.zeros((), device=role_T.device)
        if moe.balance == "loss" and weights.balance:
            sums_LE = score_sums(record, moe.router, valid_T, self.first_balanced)
            self._add("scores", sums_LE)
            load_LE, experts_L = self.load_LE.to(sums_LE), self.experts_L.to(sums_LE)
            balance = balance_loss(load_LE, sums_LE / counts.valid, self.first_balanced, experts_L)
            loss = loss + weights.balance * balance
        if weights.language_prior:
            prior = language_prior_sum(record, role_T)
            self._add("prior", prior)
            loss = loss + weights.language_prior * prior / _some(counts.old)
        if weights.z:
            z = z_sum(record, valid_T)
            self._add("z", z)
            loss = loss + weights.z * z / counts.valid
        if record.gate_logit_T is not None:
            old, new = gate_sums(record.gate_logit_T, role_T)
            self._add("gate_old", old)
            self._add("gate_new", new)
            loss = loss + weights.gate * sum(part / of for part, of in zip((old, new), _expected(counts), strict=True))
        return loss

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _expected(counts: StepCounts) -> tuple[int | float | Tensor, int | float | Tensor]:
    """Old and new tokens of a step as the mixture has them: where a step has little text, old tokens may be in one step
    and not in the next, and a mean over those that are there would give new ones too much weight."""
    share = counts.old_share
    if share is None or not 0 < share < 1:
        return _some(counts.old), _some(counts.new)
    valid = _some(counts.valid)
    return valid * share, valid * (1 - share)


def _some(count: int | Tensor) -> int | Tensor:
    """To divide by."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
