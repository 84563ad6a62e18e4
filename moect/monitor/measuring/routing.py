"""What the appended modules did with the tokens of each text: expert load and gates.

G groups of documents (texts), T tokens of a forward pass, L blocks with a module, E experts, K experts per token
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect.model.append import modules_of
from moect.model.record import ForwardRecord


@dataclass
class Routing:
    """What the modules did with one text.

    Attributes:
        blocks: (L,), indices of the blocks that have a module.
        expert_load: (L, E), share of a block's assignments that each expert got, E its own; all 0 where no token
            reached it.
        load_entropy: (L,), entropy of that load over log E: 1 where all experts get the same, 0 where one gets all (or
            nothing came). Routing that collapses in deep blocks shows here (arXiv 2605.17598).
        router_entropy: (L,), mean over tokens of the entropy of the router's scores over log E: 0 where it is sure.
        gate: mean weight p on the frozen FFN, over tokens and blocks (fusions `gate`, `discrete`, `fixed`); or the
            language gate's mean value q, over tokens; None for a plain `add`.
        gate_by_block: (L,), mean p in each block; None without such a fusion (all share a language gate's value).
        open_share: share of tokens that the language gate lets through to the experts; None without one.
    """

    blocks: list[int]
    expert_load: list[list[float]]
    load_entropy: list[float]
    router_entropy: list[float]
    gate: float | None
    gate_by_block: list[float] | None
    open_share: float | None


class RoutingMeter:
    """Adds up forward records. Only positions that belong to a document count: not padding, not repeated context.

    Args:
        model: a model with an appended module, in evaluation mode while it runs.
        group_of_document: for every document the index of its group.
    """

    def __init__(self, model: nn.Module, group_of_document: list[int]):
        modules = modules_of(model)
        self.config = modules[0].config
        self.blocks = [m.index for m in modules]
        self.experts = [m.num_experts for m in modules]
        device = next(model.parameters()).device
        self.group_of_document = torch.tensor(group_of_document, device=device)
        G, L, E = max(group_of_document) + 1, len(modules), max(self.experts)
        self.assignments_GLE = torch.zeros(G, L, E, dtype=torch.float64, device=device)
        self.tokens_GL = torch.zeros(G, L, dtype=torch.float64, device=device)  # that reached the experts
        self.entropy_GL, self.frozen_GL = (torch.zeros_like(self.tokens_GL) for _ in range(2))
        self.gate_G3 = torch.zeros(G, 3, dtype=torch.float64, device=device)  # tokens, gate values, open tokens

    def add(self, record: ForwardRecord, document_T: Tensor) -> None:
        """Count one forward pass.

        Args:
            record: what it left.
            document_T: int64, the document of each position, batch and sequence flattened; -1: do not count it.
        """
        group_T = torch.where(document_T >= 0, self.group_of_document[document_T.clamp_min(0)], -1)
        for layer, index in enumerate(self.blocks):
            block = record.blocks.get(index)
            if block is None:  # no token got through the language gate
                continue
            here_T = group_T if block.open_T is None else group_T[block.open_T]
            assignments_GE = self.assignments_GLE[:, layer]
            cell_NK = here_T[here_T >= 0, None] * assignments_GE.shape[1] + block.indices_TK[here_T >= 0]
            counts_GE = torch.bincount(cell_NK.flatten(), minlength=assignments_GE.numel())
            assignments_GE += counts_GE.view_as(assignments_GE)
            _sum(self.tokens_GL[:, layer], here_T, torch.ones_like(here_T))
            _sum(self.entropy_GL[:, layer], here_T, self._entropy(block.logits_TE))
            if block.frozen_share_T is not None:
                _sum(self.frozen_GL[:, layer], here_T, block.frozen_share_T)
        if record.gate_logit_T is not None:
            q_T, open_T = record.gate_logit_T.sigmoid(), record.gate_logit_T > self.config.threshold_logit
            for column, value_T in enumerate((torch.ones_like(q_T), q_T, open_T)):
                _sum(self.gate_G3[:, column], group_T, value_T)

    def reduce(self) -> None:
        """Add up over the ranks. Call it once, on every rank."""
        for sums in (self.assignments_GLE, self.tokens_GL, self.entropy_GL, self.frozen_GL, self.gate_G3):
            dist.all_reduce(sums)

    def result(self) -> list[Routing]:
        """The routing of each group."""
        load_GLE = self.assignments_GLE / self.assignments_GLE.sum(-1, keepdim=True).clamp_min(1)
        greatest_L = torch.tensor([_greatest_entropy(E) for E in self.experts]).to(load_GLE)
        load_entropy_GL = torch.special.entr(load_GLE).sum(-1) / greatest_L
        means = [sums_GL / self.tokens_GL.clamp_min(1) for sums_GL in (self.entropy_GL, self.frozen_GL)]
        tokens_G, gate_G, open_G = self.gate_G3.T
        gate_G, open_G = gate_G / tokens_G.clamp_min(1), open_G / tokens_G.clamp_min(1)
        has_language_gate = self.config.language_gate
        has_fusion = not has_language_gate and self.config.fusion != "add"
        if has_fusion:
            gate_G = means[1].mean(1)
        columns = (load_GLE, load_entropy_GL, *means, gate_G, open_G)
        return [
            Routing(
                self.blocks,
                [load_E[:E] for load_E, E in zip(load_LE, self.experts, strict=True)],
                load_entropy_L,
                router_entropy_L,
                gate if has_fusion or has_language_gate else None,
                frozen_L if has_fusion else None,
                share if has_language_gate else None,
            )
            for load_LE, load_entropy_L, router_entropy_L, frozen_L, gate, share in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]

    def _entropy(self, logits_TE: Tensor) -> Tensor:
        """Entropy (T,) of the router's scores as shares, over its greatest value."""
        scores_TE = logits_TE.float()
        scores_TE = scores_TE.softmax(-1) if self.config.router == "softmax" else scores_TE.sigmoid()
        shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        return torch.special.entr(shares_TE).sum(-1) / _greatest_entropy(shares_TE.shape[1])


def _greatest_entropy(experts: int) -> float:
    return log(experts) if experts > 1 else 1.0


def _sum(sums_G: Tensor, group_T: Tensor, value_T: Tensor) -> None:
    counted_T = group_T >= 0
    sums_G.index_add_(0, group_T[counted_T], value_T[counted_T].double())
