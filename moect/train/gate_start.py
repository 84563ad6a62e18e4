"""Begin the language gate with what the tokens' frequencies say, before the first step.

How much more often new text has token i than old text has it, e_i = log P_new(i) / P_old(i), is what that token speaks
for; added up over a text these are its naive Bayes score. The gate adds up a linear function of the tokens' values, and
the one that comes nearest to e, tokens counting as often as they occur (weighted least squares), is a gate that tells
languages from the start. Training goes on from there (`gate.begin: random` leaves this out).

V tokens, N some of them, C of the gate's context, K the width of an attention's values
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from moect import distributed
from moect.config import RunConfig
from moect.data.tokens.store import TokenStore
from moect.data.tokens.unseen import counts_by_language
from moect.model.append import modules_of
from moect.model.even_attention import ENOUGH
from moect.model.families import blocks_of
from moect.model.partition import writing

MOST = 6.0  # nats that one token can speak
SMOOTHING = 0.5  # tokens a row of the vocabulary that each language is taken to have had of the mean of all
RIDGE = 1e-6
AT_ONCE = 4096  # tokens whose values are computed together

log = logging.getLogger("moect.train")


@torch.no_grad()
def start_gate(model: nn.Module, config: RunConfig, stores: list[TokenStore], tokenizer, vocab_size: int) -> None:
    """Let a language gate that adds up evidence begin with that of the tokens' frequencies in `data.train`.

    In the lowest block a token's value there depends on nothing else. Above it, that of a text of this token alone is
    taken for it: a start that training has more to do with.

    Args:
        model: as `build_model` makes it, also divided among ranks; changed in place. Every rank calls this, and the
            main one computes.
        config: the run.
        stores: one for each source of `data.train`.
        tokenizer: the run's; its tokens that begin and end documents say nothing.
        vocab_size: beyond every token of the stores; those that the base does not have are left out.
    """
    if not config.has_language_gate or config.moe.gate_sees != "context" or config.gate.begin == "random":
        return
    decides, decoder = modules_of(model)[0], model.model
    *below, block = blocks_of(model)[: decides.index + 1]
    needed = [decoder.embed_tokens, *below, block.input_layernorm, block.self_attn, decides.language_gate]
    divided = [p for part in needed for p in part.parameters()] if config.train.zero_stage == 3 else []
    with writing(divided) if divided else nullcontext():

        def found() -> tuple[Tensor, float, float]:
            bos = tokenizer.bos_token_id
            ends = [i for i in (bos, tokenizer.eos_token_id) if i is not None]
            evidence_V, weight_V = evidence_of(config, stores, vocab_size, ends)
            ids = (weight_V > 0).nonzero()[:, 0]
            ids = ids[ids < decoder.embed_tokens.weight.shape[0]]
            values = (values_of(model, decides.index, some) for some in ids.split(AT_ONCE))
            map_K1, share = fit(values, evidence_V[ids], weight_V[ids])
            of_bos = None if bos is None else values_of(model, decides.index, torch.tensor([bos]))[0]
            return *as_gate(map_K1, of_bos, block.self_attn), share

        weight_C, bias, share = distributed.on_main(found)
        gate = decides.language_gate.evidence
        gate.weight.copy_(weight_C[None])
        gate.bias.fill_(bias)
    if distributed.is_main():
        log.info("the language gate begins with the tokens' frequencies: %.0f%% of what they say", 100 * share)


def evidence_of(
    config: RunConfig, stores: list[TokenStore], vocab_size: int, ends: Collection[int]
) -> tuple[Tensor, Tensor]:
    """What each token speaks for, in nats, new languages being positive, and how often it occurs: fp64 (V,) each.

    Every language counts the same within its role, and the tokens `ends` not at all; other arguments as `start_gate`.
    A language with little text is drawn to the mean of all, so what nothing is known of speaks for nothing.
    """
    return evidence_from(config, shares_of(config, stores, vocab_size, ends))


def evidence_from(config: RunConfig, shares: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """The same from `shares_of`."""
    of_role = {"new": [], "old": []}
    for language, shares_V in shares.items():
        of_role["old" if config.data.languages[language] == "old" else "new"].append(shares_V)
    new_V, old_V = (np.mean(of_role[role], 0) for role in ("new", "old"))
    occurs_V = new_V > 0
    evidence_V = np.log(new_V, where=occurs_V, out=np.zeros_like(new_V))
    evidence_V -= np.log(old_V, where=occurs_V, out=np.zeros_like(old_V))
    return torch.from_numpy(evidence_V.clip(-MOST, MOST)), torch.from_numpy((new_V + old_V) / 2 * occurs_V)


def shares_of(
    config: RunConfig, stores: list[TokenStore], vocab_size: int, ends: Collection[int]
) -> dict[str, np.ndarray]:
    """How often each language's text has each token, as shares, fp64 (V,); arguments and smoothing as `evidence_of`."""
    counts = {k: c.astype(np.float64) for k, c in counts_by_language(config.data, stores, vocab_size).items()}
    for counts_V in counts.values():
        counts_V[list(ends)] = 0
    mean_V = np.mean([counts_V / max(counts_V.sum(), 1) for counts_V in counts.values()], 0)
    drawn = SMOOTHING * vocab_size
    return {k: (counts_V + drawn * mean_V) / (counts_V.sum() + drawn) for k, counts_V in counts.items()}


def fit(values: Iterable[Tensor], evidence_V: Tensor, weight_V: Tensor) -> tuple[Tensor, float]:
    """The linear function of values, and a constant, that is nearest to the evidence.

    Args:
        values: fp32 (…, K), pieces of all tokens' values, in order.
        evidence_V, weight_V: fp64.

    Returns:
        fp64 (K + 1,), and the share of the evidence's variance that it explains.
    """
    products, with_evidence, at = 0.0, 0.0, 0
    for values_NK in values:
        x_NK1 = nn.functional.pad(values_NK.double(), (0, 1), value=1.0)
        here = slice(at, at := at + len(x_NK1))
        weighted_K1N = x_NK1.T * weight_V[here]
        products = products + weighted_K1N @ x_NK1
        with_evidence = with_evidence + weighted_K1N @ evidence_V[here]
    ridge = RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)
    map_K1 = torch.linalg.solve(products + ridge, with_evidence)
    mean = (weight_V @ evidence_V) / weight_V.sum()
    spread = weight_V @ (evidence_V - mean) ** 2
    left = weight_V @ evidence_V**2 - 2 * map_K1 @ with_evidence + map_K1 @ products @ map_K1
    return map_K1, (1 - left / spread).item()


def as_gate(map_K1: Tensor, bos_K: Tensor | None, attention: nn.Module) -> tuple[Tensor, float]:
    """The map as weight (C,) and bias of an `EvidenceGate`: every head of a group hears the same values, and BOS, which
    begins every text, speaks for nothing."""
    heads = map_K1[:-1].view(-1, 1, attention.head_dim)
    group = attention.num_key_value_groups
    weight_C = torch.cat([(heads / group).expand(-1, group, -1).flatten(), map_K1[-1:]]) * ENOUGH
    bias = 0.0 if bos_K is None else -(bos_K.double() @ map_K1[:-1] + map_K1[-1]).item()
    return weight_C, bias


def values_of(model: nn.Module, index: int, ids_N: Tensor) -> Tensor:
    """What the attention of a block has as the values of tokens, each a text of its own: fp32 (N, K), on the CPU.

    One token's attention is its value, so no kernel is needed, nor what it wants of device and dtype.
    """
    embedding_VD = model.model.embed_tokens.weight
    h_ND = nn.functional.embedding(ids_N.to(embedding_VD.device), embedding_VD)
    *below, block = blocks_of(model)[: index + 1]
    for lower in below:
        attention = lower.self_attn
        heads_NHd = attention.v_proj(lower.input_layernorm(h_ND)).unflatten(-1, (-1, attention.head_dim))
        heads_NHd = heads_NHd.repeat_interleave(attention.num_key_value_groups, 1)
        r_ND = h_ND + attention.o_proj(heads_NHd.flatten(1))
        h_ND = r_ND + lower.mlp(lower.post_attention_layernorm(r_ND))
    return block.self_attn.v_proj(block.input_layernorm(h_ND)).float().cpu()
