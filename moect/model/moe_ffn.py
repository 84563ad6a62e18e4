"""The appended module of one block: frozen FFN + router + dispatch + experts + fusion. The file to read first.

    r = x + attention(norm1(x))          the base's own
    u = norm2(r),  f = FFN(u)            the base's own, frozen
    e = sum_{k in top K} w_k E_k(u)      appended, trained
    h' = fusion(r, f, e)                 appended, trained

With a language gate (fusion `add` only) q scales e in training, and decides at inference: a token with q at or below
the threshold leaves the block as r + f, bit for bit what the base computes, and costs no expert any work.

B batch, S sequence, T = B·S tokens, K experts per token, E experts, D width, F expert width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moect.model.experts import Experts
from moect.model.fusion import Fusion
from moect.model.language_gate import LanguageGate
from moect.model.record import BlockRecord, ForwardRecord
from moect.model.router import Router
from moect.moe_config import MoeConfig


class MoEFFN(nn.Module):
    """The appended module of one block.

    Args:
        config: what it is made of.
        width: D of the base.
        ffn_width: width of the base's FFN.
        index: the block's index.
        decides: this block computes the language gate's value; the others read it from the record.
    """

    def __init__(self, config: MoeConfig, width: int, ffn_width: int, index: int, decides: bool):
        super().__init__()
        self.config = config
        self.index = index
        self.enabled = True
        self.copies = config.starts_as_copies(ffn_width)
        self.router = Router(config, width)
        self.experts = Experts(config.experts, width, config.width or ffn_width, config.dispatch)
        self.fusion = Fusion(config, width, around=not self.copies)
        self.language_gate = LanguageGate(width) if config.language_gate and decides else None

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

    def forward(self, r_BSD: Tensor, u_BSD: Tensor, f_BSD: Tensor, record: ForwardRecord) -> Tensor:
        """The block's output h' (B, S, D) from residual r, FFN input u and frozen FFN output f."""
        r_TD, u_TD, f_TD = (x_BSD.flatten(0, 1) for x_BSD in (r_BSD, u_BSD, f_BSD))
        if not self.config.language_gate:
            e_TD = self._mixture(u_TD, record)
            h_TD, share_T = self.fusion(r_TD, f_TD, e_TD)
            record.blocks[self.index].frozen_share_T = share_T
        else:
            logit_T = self._gate_logit(u_TD, record)
            if self.training:
                e_TD = self._mixture(u_TD, record)
                h_TD = r_TD + (f_TD + logit_T.sigmoid()[:, None].to(e_TD.dtype) * e_TD)
            else:
                h_TD = r_TD + self._add_to_open_tokens(
                    f_TD, u_TD, logit_T.sigmoid() > self.config.gate_threshold, record
                )
        return h_TD.view_as(r_BSD)

    def _mixture(self, u_TD: Tensor, record: ForwardRecord, open_T: Tensor | None = None) -> Tensor:
        before = record.blocks.get(self.index)  # set: this is the block's recomputation in backward
        indices_TK, weights_TK, logits_TE = self.router(u_TD, before.indices_TK if before else None)
        if not before:
            record.blocks[self.index] = BlockRecord(indices_TK, logits_TE, open_T=open_T)
        return self.experts(u_TD, indices_TK, weights_TK)

    def _gate_logit(self, u_TD: Tensor, record: ForwardRecord) -> Tensor:
        if self.language_gate is None:
            return record.gate_logit_T.to(u_TD.device)
        logit_T = self.language_gate(u_TD)
        if record.gate_logit_T is None:
            record.gate_logit_T = logit_T
        return logit_T

    def _add_to_open_tokens(self, f_TD: Tensor, u_TD: Tensor, open_T: Tensor, record: ForwardRecord) -> Tensor:
        token = open_T.nonzero()[:, 0]
        if len(token) == 0:
            return f_TD
        return f_TD.index_add(0, token, self._mixture(u_TD[token], record, open_T))
