"""The appended module of one block: frozen FFN + router + dispatch + experts + fusion. The file to read first.

    r = x + attention(norm1(x))          the base's own
    u = norm2(r),  f = FFN(u)            the base's own, frozen
    e = sum_{k in top K} w_k E_k(u)      appended, trained
    h' = fusion(r, f, e)                 appended, trained

With a language gate (fusion `add` only) q scales e in training, and decides at inference: a token with q at or below
the threshold leaves the block as r + f, bit for bit what the base computes, and costs no expert any work.

B batch, S sequence, T = B·S tokens, O open tokens, K experts per token, E experts, D width, F expert width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moect.errors import UnsupportedModelError
from moect.model.counting_gate import CountingGate, Sums
from moect.model.experts import Experts
from moect.model.fusion import Fusion
from moect.model.language_gate import OPEN, EvidenceGate, TokenGate
from moect.model.record import BlockRecord, ForwardRecord
from moect.model.router import Router
from moect.moe_config import MoeConfig


class MoEFFN(nn.Module):
    """The appended module of one block.

    Args:
        config: what it is made of.
        experts: E of this block.
        width: D of the base.
        ffn_width: width of the base's FFN.
        index: the block's index.
        decides: this block computes the language gate's value; the others read it from the record.
        context: C, of the gate's context.
        vocab: tokens of the base.
    """

    def __init__(
        self,
        config: MoeConfig,
        experts: int,
        width: int,
        ffn_width: int,
        index: int,
        decides: bool,
        context: int,
        vocab: int,
    ):
        super().__init__()
        self.config = config
        self.num_experts = experts
        self.index = index
        self.enabled = True
        self.copies = config.starts_as_copies(ffn_width)
        self.router = Router(config, experts, width)
        self.experts = Experts(experts - config.frozen_experts, width, config.width or ffn_width, config.dispatch)
        self.fusion = Fusion(config, width, around=not self.copies)
        self.language_gate = None
        if config.language_gate and decides:
            gates = {
                "token": lambda: TokenGate(width),
                "context": lambda: EvidenceGate(context),
                "pairs": lambda: CountingGate(vocab),
            }
            self.language_gate = gates[config.gate_sees]()

    @torch.no_grad()
    def reset(self, ffn: nn.Module, generator: torch.Generator) -> None:
        """Start as the identity beside `ffn`: the block computes the base's function."""
        self.router.reset(generator)
        if self.copies:
            self.experts.copy_from(ffn)
        else:
            self.experts.start_silent(generator)
        self.fusion.reset(generator)
        if self.language_gate is not None:
            self.language_gate.reset(generator)

    @property
    def listens(self) -> bool:
        """Whether the language gate decides here, and wants the context."""
        return self.language_gate is not None and self.config.gate_sees == "context"

    @property
    def counts(self) -> bool:
        """Whether the language gate decides here, by tokens alone."""
        return self.language_gate is not None and self.config.gate_sees == "pairs"

    def decide(self, x_BSD: Tensor, record: ForwardRecord, position_ids: Tensor, sums: Sums | None) -> Tensor:
        """Let a gate that counts decide before the block has computed anything.

        Args:
            x_BSD: the block's input.
            record: of the pass.
            position_ids: as in `CountingGate`.
            sums: of the cache, if there is one.

        Returns:
            x, and where the gate is open the difference of the token's embedding on it: attention hears it too.
        """
        if record.gate_logit_T is None:  # set: this is the block's recomputation in backward
            record.gate_logit_T = _with_told(self.language_gate(record.tokens, position_ids, sums), record)
        logit_T = record.gate_logit_T.to(x_BSD.device)
        if not self.training:
            self._open(logit_T, record)
        if record.late_BSD is None or not (self.training or len(record.open_token)):
            return x_BSD
        late_BSD = record.late_BSD.to(x_BSD.device)
        if self.training:
            return x_BSD + logit_T.sigmoid().view(*x_BSD.shape[:2], 1).to(x_BSD.dtype) * late_BSD
        return torch.where(record.open_T.view(*x_BSD.shape[:2], 1), x_BSD + late_BSD, x_BSD)

    def forward(self, r_BSD: Tensor, u_BSD: Tensor, f_BSD: Tensor, record: ForwardRecord) -> Tensor:
        """The block's output h' (B, S, D) from residual r, FFN input u and frozen FFN output f."""
        if self.config.language_gate and not self.training:
            return self._with_open_tokens(r_BSD, u_BSD, f_BSD, record)
        r_TD, u_TD, f_TD = (x_BSD.flatten(0, 1) for x_BSD in (r_BSD, u_BSD, f_BSD))
        if self.config.language_gate:
            logit_T = self._gate_logit(u_TD, record)
            e_TD = self._mixture(u_TD, record)
            if self._late(record):
                e_TD = e_TD + record.late_BSD.to(e_TD.device).flatten(0, 1)
            h_TD = r_TD + (f_TD + logit_T.sigmoid()[:, None].to(e_TD.dtype) * e_TD)
        else:
            e_TD, frozen_T = (self._routed if self.config.fusion == "routed" else self._unrouted)(u_TD, record)
            h_TD, share_T = self.fusion(r_TD, f_TD, e_TD, frozen_T)
            record.blocks[self.index].frozen_share_T = share_T
        return h_TD.view_as(r_BSD)

    def _with_open_tokens(self, r_BSD: Tensor, u_BSD: Tensor, f_BSD: Tensor, record: ForwardRecord) -> Tensor:
        """With the hard gate: r + f, and e where it is open. A pass without open tokens costs a block nothing more."""
        if self.language_gate is not None and record.open_T is None:
            self._open(self._gate_logit(u_BSD.flatten(0, 1), record), record)
        if record.open_token is None:
            raise UnsupportedModelError(
                f"block {self.index} needs the language gate's value, and the block that decides it did not run here: "
                "serve without stages of a pipeline (no --pipeline-parallel-size in vLLM)"
            )
        if len(record.open_token) == 0:
            return r_BSD + f_BSD
        open_T, token = (t.to(u_BSD.device) for t in (record.open_T, record.open_token))
        e_OD = self._mixture(u_BSD.flatten(0, 1)[token], record, open_T)
        if self._late(record):
            e_OD = e_OD + record.late_BSD.to(e_OD.device).flatten(0, 1)[token]
        return r_BSD + f_BSD.flatten(0, 1).index_add(0, token, e_OD).view_as(f_BSD)

    def _open(self, logit_T: Tensor, record: ForwardRecord) -> None:
        record.open_T = logit_T > self.config.threshold_logit
        record.open_token = record.open_T.nonzero()[:, 0]  # on a GPU the host waits here, once a pass

    def _late(self, record: ForwardRecord) -> bool:
        """Whether differences of embeddings are added beside the experts' output of this block."""
        return self.language_gate is not None and not self.counts and record.late_BSD is not None

    def _mixture(self, u_TD: Tensor, record: ForwardRecord, open_T: Tensor | None = None) -> Tensor:
        return self.experts(u_TD, *self._route(u_TD, record, open_T))

    def _route(self, u_TD: Tensor, record: ForwardRecord, open_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = record.blocks.get(self.index)  # set: this is the block's recomputation in backward
        indices_TK, weights_TK, logits_TE = self.router(u_TD, before.indices_TK if before else None)
        if not before:
            record.blocks[self.index] = BlockRecord(indices_TK, logits_TE, open_T=open_T)
        return indices_TK, weights_TK

    def _unrouted(self, u_TD: Tensor, record: ForwardRecord) -> tuple[Tensor, None]:
        return self._mixture(u_TD, record), None

    def _routed(self, u_TD: Tensor, record: ForwardRecord) -> tuple[Tensor, Tensor]:
        """The weighted sum of the chosen experts that train, 1 …, and the weight of expert 0, the frozen FFN."""
        indices_TK, weights_TK = self._route(u_TD, record)
        trains_TK = indices_TK > 0
        token, slot = trains_TK.nonzero(as_tuple=True)
        # without tokens too: every rank has to call the experts
        e_ND = self.experts(u_TD[token], indices_TK[token, slot, None] - 1, weights_TK[token, slot, None])
        e_TD = torch.zeros_like(u_TD).index_add(0, token, e_ND)
        return e_TD, weights_TK.masked_fill(trains_TK, 0).sum(-1)

    def _gate_logit(self, u_TD: Tensor, record: ForwardRecord) -> Tensor:
        if self.language_gate is None or self.counts:
            return record.gate_logit_T.to(u_TD.device)
        logit_T = _with_told(self.language_gate(u_TD, record.context_TC), record)
        if record.gate_logit_T is None:
            record.gate_logit_T = logit_T
        return logit_T


def _with_told(logit_T: Tensor, record: ForwardRecord) -> Tensor:
    """The gate's logits, and OPEN at tokens that open it by themselves."""
    return logit_T if record.told_T is None else logit_T.masked_fill(record.told_T.to(logit_T.device), OPEN)
