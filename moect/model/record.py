"""What one forward pass leaves behind for losses and measurements. It never outlives the pass.

The record travels through the blocks as a keyword argument, so the model keeps no state between calls. It also makes
activation checkpointing safe: a block recomputed in backward finds its own entry and routes as it did before.

T tokens, E experts, K experts per token, B batch, S sequence
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moect.model.counting_gate import Tokens

RECORD = "moect_record"  # keyword under which the record travels through the base's own forward


@dataclass
class BlockRecord:
    """What one block's module did.

    Attributes:
        indices_TK: int64, the chosen experts.
        logits_TE: fp32, raw router logits; with gradient in training.
        frozen_share_T: fp32, the fusion's weight p on the frozen FFN (without gradient); None for fusions without one.
        open_T: bool, the tokens that a hard gate let through; the three above hold these only. None: all of them.
    """

    indices_TK: Tensor
    logits_TE: Tensor
    frozen_share_T: Tensor | None = None
    open_T: Tensor | None = None


@dataclass
class ForwardRecord:
    """What one forward pass did.

    Attributes:
        blocks: by block index; a block whose tokens were all held back by the gate has no entry.
        gate_logit_T: fp32, the language gate before its sigmoid; with gradient in training, unless it counts. None
            without a gate.
        open_T: bool, the tokens that a hard gate lets through; None in training, and without a gate.
        open_token: int64, their places in T, decided once so that no block looks for them again; None as open_T is.
        tokens: of a language gate that counts them.
        late_BSD: differences of the tokens' embeddings, for the block where the gate decides; None where none train.
        told_T: bool, the tokens that open the gate by themselves; None where no token has a row of its own.
        heard_BSHd: what the deciding block's attention read evenly, on its way to `context_TC`.
        context_TC: fp32, of a language gate that sees it.
    """

    blocks: dict[int, BlockRecord] = field(default_factory=dict)
    gate_logit_T: Tensor | None = None
    open_T: Tensor | None = None
    open_token: Tensor | None = None
    tokens: Tokens | None = None
    late_BSD: Tensor | None = None
    told_T: Tensor | None = None
    heard_BSHd: Tensor | None = None
    context_TC: Tensor | None = None
