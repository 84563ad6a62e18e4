"""Begin the language gate with what the tokens' frequencies say, before the first step.

How much more often new text has token i than old text has it, e_i = log P_new(i) / P_old(i), is what that token speaks
for; added up over a text these are its naive Bayes score. The gate adds up a linear function of the tokens' values, and
the one that comes nearest to e, tokens counting as often as they occur (weighted least squares), is a gate that tells
languages from the start. Training goes on from there (`gate.begin: random` leaves this out).

V tokens of the base, C of the gate's context, K the width of an attention's values
"""

from __future__ import annotations

import logging
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
from moect.model.record import RECORD, ForwardRecord

MOST = 6.0  # nats that one token can speak
SMOOTHING = 0.5  # of a token's count in each language
RIDGE = 1e-6
AT_ONCE = 4096  # tokens whose values are computed together

log = logging.getLogger("moect.train")


@torch.no_grad()
def start_gate(model: nn.Module, config: RunConfig, stores: list[TokenStore], tokenizer, vocab_size: int) -> None:
    """Let a language gate that adds up evidence begin with that of the tokens' frequencies in `data.train`.

    Args:
        model: as `build_model` makes it, also divided among ranks; changed in place. Every rank calls this.
        config: the run.
        stores: one for each source of `data.train`.
        tokenizer: the run's; its tokens that begin and end documents say nothing.
        vocab_size: beyond every token of the stores; those that the base does not have are left out.
    """
    if not config.has_language_gate or config.moe.gate_sees != "context" or config.gate.begin == "random":
        return
    divided, decides = config.train.zero_stage == 3, modules_of(model)[0]
    decoder, gate = model.model, decides.language_gate
    below = [decoder.embed_tokens, *blocks_of(model)[: decides.index + 1]]
    needed = [p for module in below for p in module.parameters()] if divided else []
    with writing(needed) if divided else nullcontext():
        bos = tokenizer.bos_token_id
        ends = [i for i in (bos, tokenizer.eos_token_id) if i is not None]
        of_tokens = distributed.on_main(lambda: evidence_of(config, stores, vocab_size, ends))
        vocabulary = min(vocab_size, decoder.embed_tokens.weight.shape[0])
        evidence_V, weight_V = (values_V[:vocabulary] for values_V in of_tokens)
        values_VK = torch.cat([_values(model, decides.index, ids) for ids in torch.arange(vocabulary).split(AT_ONCE)])
        map_K1, share = fit(values_VK, evidence_V, weight_V)
        attention = blocks_of(model)[decides.index].self_attn
        weight_C, bias = as_gate(map_K1, values_VK[bos] if bos is not None else None, attention)
        gate.evidence.weight.copy_(weight_C[None])
        gate.evidence.bias.fill_(bias)
    if distributed.is_main():
        log.info("the language gate begins with the tokens' frequencies: %.0f%% of what they say", 100 * share)


def evidence_of(config: RunConfig, stores: list[TokenStore], vocab_size: int, ends: list[int]) -> tuple[Tensor, Tensor]:
    """What each token speaks for, in nats, new languages being positive, and how often it occurs: fp64 (V,) each.

    Every language counts the same within its role, and the tokens `ends` not at all; other arguments as `start_gate`.
    """
    shares = {"new": [], "old": []}
    for language, counts in counts_by_language(config.data, stores, vocab_size).items():
        counts = counts.astype(np.float64)
        counts[ends] = 0
        shares[config.data.languages[language]].append((counts + SMOOTHING) / (counts + SMOOTHING).sum())
    new_V, old_V = (torch.from_numpy(np.mean(shares[role], 0)) for role in ("new", "old"))
    return (new_V / old_V).log().clamp(-MOST, MOST), (new_V + old_V) / 2


def fit(values_VK: Tensor, evidence_V: Tensor, weight_V: Tensor) -> tuple[Tensor, float]:
    """The linear function of values, and a constant, that is nearest to the evidence: fp64 (K + 1,), and the share of
    the evidence's variance that it explains."""
    x_VK1 = torch.cat([values_VK.double(), torch.ones(len(values_VK), 1, dtype=torch.float64)], 1)
    weighted_K1V = x_VK1.T * weight_V
    products = weighted_K1V @ x_VK1
    products += RIDGE * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)
    map_K1 = torch.linalg.solve(products, weighted_K1V @ evidence_V)
    spread = evidence_V - (weight_V @ evidence_V) / weight_V.sum()
    left = evidence_V - x_VK1 @ map_K1
    return map_K1, (1 - (weight_V @ left**2) / (weight_V @ spread**2)).item()


def as_gate(map_K1: Tensor, bos_K: Tensor | None, attention: nn.Module) -> tuple[Tensor, float]:
    """The map as weight (C,) and bias of an `EvidenceGate`: every head of a group hears the same values, and BOS, which
    begins every text, speaks for nothing."""
    heads = map_K1[:-1].view(-1, 1, attention.head_dim)
    group = attention.num_key_value_groups
    weight_C = torch.cat([(heads / group).expand(-1, group, -1).flatten(), map_K1[-1:]]) * ENOUGH
    bias = 0.0 if bos_K is None else -(bos_K.double() @ map_K1[:-1] + map_K1[-1]).item()
    return weight_C, bias


class _Found(Exception):
    """The values are there; nothing above them is wanted."""


@torch.no_grad()
def _values(model: nn.Module, index: int, ids: Tensor) -> Tensor:
    """What the attention of a block has as the values of single tokens, each a text of its own: fp32 (N, K)."""
    found = []

    def take(module, args, output):
        found.append(output)
        raise _Found

    handle = blocks_of(model)[index].self_attn.v_proj.register_forward_hook(take)
    try:
        model.model(input_ids=ids[:, None].to(model.device), use_cache=False, **{RECORD: ForwardRecord()})
    except _Found:
        pass
    finally:
        handle.remove()
    return found[0][:, 0].float().cpu()
