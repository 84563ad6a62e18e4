"""Losses beside the model: cross-entropy in chunks, balance, router z, and the language gate's.

Everything is returned as sums over tokens, so that the caller can divide by counts taken over all ranks and
accumulation steps: then neither changes the result.

T tokens, E experts, K experts per token, D width, V vocabulary, L blocks with a module
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moect.model.record import ForwardRecord

CHUNK_ELEMENTS = 2**26  # logits held at once: 256 MiB in fp32


def cross_entropy_sum(
    hidden_TD: Tensor, labels_T: Tensor, lm_head: Callable, vocab_size: int, gate_logit_T: Tensor | None = None
) -> Tensor:
    """Sum of next-token cross-entropies in fp32, never holding more than CHUNK_ELEMENTS logits.

    Args:
        hidden_TD: last hidden states, after the final norm.
        labels_T: int64, the token to predict at each position; -100: none.
        lm_head: maps (T, D), and gate_logit_T where it is given, to logits (T, V).
        vocab_size: V.
        gate_logit_T: logits of the language gate, for a head that follows it.
    """
    # as many parts as all positions would need: under ZeRO-3 every rank must call the head equally often
    parts = -(-len(labels_T) * vocab_size // CHUNK_ELEMENTS)
    scored = labels_T != -100
    inputs = [hidden_TD] if gate_logit_T is None else [hidden_TD, gate_logit_T]
    columns = [column[scored] for column in (labels_T, *inputs)]

    def chunk_sum(labels_C: Tensor, *inputs_C: Tensor) -> Tensor:
        return nn.functional.cross_entropy(lm_head(*inputs_C).float(), labels_C, reduction="sum")

    if parts <= 1:
        return chunk_sum(*columns)
    chunks = zip(*(column.tensor_split(parts) for column in columns), strict=True)
    return torch.stack([checkpoint(chunk_sum, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def base_kl_sum(
    hidden_TD: Tensor,
    of_base_TD: Tensor,
    wanted_T: Tensor,
    lm_head: Callable,
    as_base: Callable[[], AbstractContextManager],
    elements: int,
    gate_logit_T: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of KL(base || model) of the next token, in fp32; the gradient flows into the model's side only.

    Args:
        hidden_TD: last hidden states of the model, after the final norm.
        of_base_TD: those of the base, without gradient.
        wanted_T: bool, the tokens that count.
        lm_head: as in `cross_entropy_sum`; inside `as_base` it is the base's.
        as_base: makes the context in which the model is its base.
        elements: logits of the whole micro-batch, which decide into how many parts it is cut, on every rank the same.
        gate_logit_T: logits of the language gate, for a head that follows it.
    """
    parts = -(-elements // CHUNK_ELEMENTS)
    inputs = [hidden_TD] if gate_logit_T is None else [hidden_TD, gate_logit_T]
    columns = [column[wanted_T] for column in (of_base_TD, *inputs)]

    def chunk_sum(of_base_CD: Tensor, *inputs_C: Tensor) -> Tensor:
        with torch.no_grad(), as_base():
            base_CV = lm_head(of_base_CD).float().log_softmax(-1)
        model_CV = lm_head(*inputs_C).float().log_softmax(-1)[:, : base_CV.shape[-1]]  # added tokens are not the base's
        return nn.functional.kl_div(model_CV, base_CV, reduction="sum", log_target=True)

    if parts <= 1:
        return chunk_sum(*columns)
    chunks = zip(*(column.tensor_split(parts) for column in columns), strict=True)
    return torch.stack([checkpoint(chunk_sum, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def expert_counts(record: ForwardRecord, num_experts: int, valid_T: Tensor) -> Tensor:
    """Assignments of valid tokens to each expert, (L, E) fp64, blocks ascending; E of the block that has the most, the
    others have none beyond theirs."""
    counts_LE = []
    for index in sorted(record.blocks):
        block = record.blocks[index]
        valid = valid_T if block.open_T is None else valid_T[block.open_T]
        counts_LE.append(torch.bincount(block.indices_TK[valid].flatten(), minlength=num_experts).double())
    return torch.stack(counts_LE)


def score_sums(record: ForwardRecord, router: str, valid_T: Tensor, first: int = 0) -> Tensor:
    """Sum over valid tokens of each expert's score, normalised to sum 1 per token, (L, E) fp32, with gradient; E as in
    `expert_counts`.

    Args:
        record: of a pass.
        router: `softmax` or `sigmoid`.
        valid_T: bool.
        first: the experts before this one are left out, as if they were not there; their sums are 0.
    """
    sums_LE, most = [], max(block.logits_TE.shape[1] for block in record.blocks.values())
    for index in sorted(record.blocks):
        logits_TE = record.blocks[index].logits_TE[valid_T, first:]
        if router == "softmax":
            scores_TE = logits_TE.softmax(-1)
        else:
            scores_TE = logits_TE.sigmoid()
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        sums_LE.append(nn.functional.pad(scores_TE.sum(0), (first, most - first - scores_TE.shape[1])))
    return torch.stack(sums_LE)


def balance_loss(load_LE: Tensor, mean_scores_LE: Tensor, first: int = 0, experts_L: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e P_e, mean over blocks (MoE-LPR, arXiv 2408.11396; the Switch loss with Σ f_e = 1): 1 when balanced.

    Args:
        load_LE: f, share of assignments of each expert; without gradient.
        mean_scores_LE: P, mean score of each expert over tokens; the gradient flows through it.
        first: the experts before this one are left out; E and f are those of the others.
        experts_L: E of each block; None: all have as many.
    """
    experts_L = load_LE.shape[1] if experts_L is None else experts_L
    load_LE = load_LE[:, first:] / load_LE[:, first:].sum(1, keepdim=True).clamp_min(1e-9)
    return ((experts_L - first) * (load_LE * mean_scores_LE[:, first:]).sum(1)).mean()


def language_prior_sum(record: ForwardRecord, role_T: Tensor) -> Tensor:
    """Sum over old tokens of -log of the frozen FFN's share in the routing, mean over blocks (MoE-LPR, arXiv
    2408.11396: the cross-entropy of the softmax over all experts toward expert 0; once, not twice). 0 without old ones.

    Args:
        record: of a pass of a model with `fusion: routed`.
        role_T: int8, 0 old, 1 new, -1 neither (padding).
    """
    sums_L = [-block.logits_TE[role_T == 0].log_softmax(-1)[:, 0].sum() for block in record.blocks.values()]
    return torch.stack(sums_L).mean()


def z_sum(record: ForwardRecord, valid_T: Tensor) -> Tensor:
    """Sum over valid tokens of logsumexp(router logits)², mean over blocks (ST-MoE, arXiv 2202.08906, eq. 5)."""
    sums_L = [block.logits_TE[valid_T].logsumexp(-1).square().sum() for block in record.blocks.values()]
    return torch.stack(sums_L).mean()


def gate_sums(gate_logit_T: Tensor, role_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the language gate's binary cross-entropy over old (target 0) and over new tokens (target 1), fp32.

    Divided each by its own count they make the class-balanced loss: mean over old plus mean over new.

    Args:
        gate_logit_T: logits of q.
        role_T: int8, 0 old, 1 new, -1 neither (padding).
    """
    softplus = nn.functional.softplus
    return softplus(gate_logit_T[role_T == 0]).sum(), softplus(-gate_logit_T[role_T == 1]).sum()
