"""Count what tokens, and pairs of neighbours, speak for: the evidence of a language gate that counts.

A text's score is the sum of log P_new / P_old over its tokens. For a token by itself P is how often the languages of a
role have it, each language counting the same. For a token behind another P is estimated in each language from that
pair's count, smoothed towards the token by itself as Witten and Bell do (method C of IEEE Trans. Inf. Theory 37(4),
1991: a token that many different ones follow tells little of the next), and the table of pairs holds what that adds.

V tokens of the vocabulary, P entries of the gate's table of pairs, N pairs
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from moect import distributed
from moect.config import RunConfig
from moect.data.tokens.store import TokenStore
from moect.data.tokens.unseen import AT_ONCE
from moect.model.append import modules_of
from moect.model.counting_gate import PAIRS, pair_entry
from moect.train.gate_start import MOST, evidence_of, shares_of

ENOUGH = 2**24  # tokens of a language that pairs are counted in
LEAST = 2  # times that a pair was seen, over all languages

log = logging.getLogger("moect.train")


@torch.no_grad()
def count_gate(model: nn.Module, config: RunConfig, stores: list[TokenStore], tokenizer, vocab_size: int) -> None:
    """Give a language gate that counts the evidence of `data.train`. Every rank calls this, and the main one counts.

    Where the run goes on from a model that learnt languages of which `data.train` has no text, what spoke for new
    languages there is kept.

    Args:
        model: as `build_model` makes it, with what it starts from; changed in place.
        config: the run.
        stores: one for each source of `data.train`.
        tokenizer: the run's; its tokens that begin and end documents say nothing.
        vocab_size: beyond every token of the stores.
    """
    if not (config.has_language_gate and config.moe.gate_sees == "pairs"):
        return
    gate = modules_of(model)[0].language_gate
    ends = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]

    def found() -> tuple[Tensor, Tensor, int]:
        evidence_V, _ = evidence_of(config, stores, vocab_size, ends)
        of_pair, pairs = pair_evidence(config, stores, vocab_size, ends, evidence_V[: len(gate.of_token)])
        return evidence_V[: len(gate.of_token)].float(), of_pair.float(), pairs

    of_token_V, of_pair_P, pairs = distributed.on_main(found)
    told = {source.lang for source in config.data.train}
    untold = [lang for lang, role in config.data.languages.items() if role == "learnt" and lang not in told]
    for mine, counted in ((gate.of_token, of_token_V), (gate.of_pair, of_pair_P)):
        counted = nn.functional.pad(counted, (0, len(mine) - len(counted))).to(mine.device)
        mine.copy_(torch.maximum(mine, counted) if untold else counted)
    if distributed.is_main():
        kept = f", and keeps what spoke for {', '.join(untold)}, of which there is no text here" if untold else ""
        log.info("the language gate counts tokens and %s pairs of them%s", f"{pairs:,}", kept)


def pair_evidence(
    config: RunConfig, stores: list[TokenStore], vocab_size: int, ends: Collection[int], of_token_V: Tensor
) -> tuple[Tensor, int]:
    """What pairs speak for beyond their second token, in nats: fp64 (P,), and how many pairs were counted.

    Pairs that share an entry have their mean there, each counting as often as it occurs.

    Args:
        config, stores, vocab_size, ends: as `evidence_of`.
        of_token_V: evidence of the base's tokens, as `evidence_of` has it; others are taken to have 0.
    """
    shares = shares_of(config, stores, vocab_size, ends)
    counted = {lang: pairs_of(lang, config, stores, vocab_size, ends) for lang in shares}
    pairs_N = np.unique(np.concatenate([pairs for pairs, _ in counted.values()]))
    counts = {lang: np.zeros(len(pairs_N)) for lang in shares}
    for lang, (pairs, times) in counted.items():
        counts[lang][np.searchsorted(pairs_N, pairs)] = times
    often_N = sum(counts.values()) >= LEAST
    first_N, second_N = np.divmod(pairs_N, vocab_size)
    conditional, weight_N = {"new": [], "old": []}, np.zeros(len(pairs_N))
    for lang, times_N in counts.items():
        of_first_V = np.bincount(first_N, times_N, vocab_size)
        kinds_V = np.bincount(first_N, times_N > 0, vocab_size).clip(1)
        share_N = (times_N + kinds_V[first_N] * shares[lang][second_N]) / (of_first_V + kinds_V)[first_N]
        conditional["old" if config.data.languages[lang] == "old" else "new"].append(share_N)
        weight_N += times_N / max(times_N.sum(), 1)
    new_N, old_N = (np.mean(conditional[role], 0) for role in ("new", "old"))
    alone_V = np.zeros(vocab_size)
    alone_V[: len(of_token_V)] = of_token_V
    adds_N = np.log(new_N / old_N).clip(-MOST, MOST) - alone_V[second_N]
    first, second = (torch.from_numpy(x_N[often_N]) for x_N in (first_N, second_N))
    entry_N = pair_entry(first, second).numpy()
    weighed_P = np.bincount(entry_N, weight_N[often_N], PAIRS)
    sum_P = np.bincount(entry_N, weight_N[often_N] * adds_N[often_N], PAIRS)
    return torch.from_numpy(np.divide(sum_P, weighed_P, where=weighed_P > 0, out=np.zeros(PAIRS))), int(often_N.sum())


def pairs_of(
    lang: str, config: RunConfig, stores: list[TokenStore], vocab_size: int, ends: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of neighbours in a language's text, first · V + second, ascending, and how often each occurs.

    Of more than ENOUGH tokens the first of each source are counted, as many as keep the sources' shares. Pairs with one
    of the tokens `ends` are left out: neighbours across documents, and what a text begins with.
    """
    mine = [store for source, store in zip(config.data.train, stores, strict=True) if source.lang == lang]
    share = min(1.0, ENOUGH / max(sum(store.n_tokens for store in mine), 1))
    found = []
    for store in mine:
        end = int(share * store.n_tokens)
        for start in range(0, end, AT_ONCE):
            tokens = np.asarray(store.tokens[start : min(start + AT_ONCE + 1, end)]).astype(np.int64)
            says = ~np.isin(tokens, list(ends))
            pairs = tokens[:-1] * vocab_size + tokens[1:]
            found.append(np.unique(pairs[says[:-1] & says[1:]], return_counts=True))
    pairs, place = np.unique(np.concatenate([p for p, _ in found]), return_inverse=True)
    return pairs, np.bincount(place, np.concatenate([c for _, c in found]), len(pairs))
