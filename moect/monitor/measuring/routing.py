"""What the appended modules did with the tokens of each text: expert load and gates.

G groups of documents (texts), T tokens of a forward pass, L blocks with a module, E experts, K experts per token
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect.model.append import modules_of
from moect.model.record import ForwardRecord


@dataclass
class Routing:
    """What the modules did with one text.

    Attributes:
        expert_load: (L, E), share of a block's assignments that each expert got; all 0 where no token reached it.
        gate: mean weight p on the frozen FFN, over tokens and blocks (fusions `gate`, `discrete`, `fixed`); or the
            language gate's mean value q, over tokens; None for a plain `add`.
        open_share: share of tokens that the language gate lets through to the experts; None without one.
    """

    expert_load: list[list[float]]
    gate: float | None
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
        device = next(model.parameters()).device
        self.group_of_document = torch.tensor(group_of_document, device=device)
        G, L, E = max(group_of_document) + 1, len(modules), self.config.experts
        self.assignments_GLE = torch.zeros(G, L, E, dtype=torch.float64, device=device)
        self.sums_G3 = torch.zeros(G, 3, dtype=torch.float64, device=device)  # tokens, gate values, open tokens

    def add(self, record: ForwardRecord, document_T: Tensor) -> None:
        """Count one forward pass.

        Args:
            record: what it left.
            document_T: int64, the document of each position, batch and sequence flattened; -1: do not count it.
        """
        group_T = torch.where(document_T >= 0, self.group_of_document[document_T.clamp_min(0)], -1)
        self._sum(0, group_T, torch.ones_like(group_T))
        for layer, index in enumerate(self.blocks):
            block = record.blocks.get(index)
            if block is None:  # no token got through the language gate
                continue
            here_T = group_T if block.open_T is None else group_T[block.open_T]
            cell_NK = here_T[here_T >= 0, None] * self.config.experts + block.indices_TK[here_T >= 0]
            counts_GE = torch.bincount(cell_NK.flatten(), minlength=self.assignments_GLE[:, layer].numel())
            self.assignments_GLE[:, layer] += counts_GE.view_as(self.assignments_GLE[:, layer])
            if block.frozen_share_T is not None:
                self._sum(1, here_T, block.frozen_share_T)
        if record.gate_logit_T is not None:
            q_T = record.gate_logit_T.sigmoid()
            self._sum(1, group_T, q_T)
            self._sum(2, group_T, q_T > self.config.gate_threshold)

    def result(self, world_size: int = 1) -> list[Routing]:
        """The routing of each group, over all ranks. Call it once, on every rank."""
        if world_size > 1:
            dist.all_reduce(self.assignments_GLE)
            dist.all_reduce(self.sums_G3)
        load_GLE = self.assignments_GLE / self.assignments_GLE.sum(-1, keepdim=True).clamp_min(1)
        tokens_G, gate_G, open_G = self.sums_G3.T
        has_language_gate = self.config.language_gate
        values_G = tokens_G if has_language_gate else tokens_G * len(self.blocks)  # one a token, or one a block too
        gate_G, open_G = gate_G / values_G.clamp_min(1), open_G / tokens_G.clamp_min(1)
        has_gate = has_language_gate or self.config.fusion != "add"
        return [
            Routing(load, gate if has_gate else None, share if has_language_gate else None)
            for load, gate, share in zip(load_GLE.tolist(), gate_G.tolist(), open_G.tolist(), strict=True)
        ]

    def _sum(self, column: int, group_T: Tensor, value_T: Tensor) -> None:
        counted_T = group_T >= 0
        self.sums_G3[:, column].index_add_(0, group_T[counted_T], value_T[counted_T].double())
