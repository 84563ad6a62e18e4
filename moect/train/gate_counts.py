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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moect import distributed
from moect.config import RunConfig
from moect.data.tokens.store import TokenStore
from moect.data.tokens.unseen import AT_ONCE
from moect.model.append import modules_of
from moect.model.counting_gate import PAIRS, pair_entry
from moect.train.gate_start import MOST, evidence_from, shares_of

ENOUGH = 2**24  # tokens of a language that pairs are counted in
LEAST = 2  # times that a pair was seen, over all languages
HALF = np.log(0.5)  # of the odds

log = logging.getLogger("moect.train")


@dataclass
class Counted:
    """What was found in text.

    Attributes:
        of_token_V, of_pair_P: fp64, nats, as in `CountingGate`.
        pairs: that have a say.
        seen: pairs that were seen LEAST times.
        partly: languages of which ENOUGH tokens were counted and not all.
    """

    of_token_V: Tensor
    of_pair_P: Tensor
    pairs: int
    seen: int
    partly: list[str]


@torch.no_grad()
def count_gate(model: nn.Module, config: RunConfig, stores: list[TokenStore], tokenizer, vocab_size: int) -> None:
    """Give a language gate that counts the evidence of `data.train`. Every rank calls this, and the main one counts.

    Where the run goes on from a model that learnt languages of which `data.train` has no text, what that model counted
    speaks as much as what is counted here: evidence is the mean of both odds, log (e^a + e^b) / 2.

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
    found = distributed.on_main(lambda: count(config, stores, vocab_size, ends))
    told = {source.lang for source in config.data.train}
    untold = [lang for lang, role in config.data.languages.items() if role == "learnt" and lang not in told]
    for mine, counted in ((gate.of_token, found.of_token_V), (gate.of_pair, found.of_pair_P)):
        counted = nn.functional.pad(counted, (0, max(len(mine) - len(counted), 0)))[: len(mine)].to(mine)
        mine.copy_(torch.logaddexp(mine, counted) + HALF if untold else counted)
    if distributed.is_main():
        parts = f"the language gate counts tokens and {found.pairs:,} pairs of them"
        if found.pairs < found.seen:
            parts += f", those that say most of {found.seen:,}"
        if found.partly:
            parts += f"; pairs in the first {ENOUGH:,} tokens of {', '.join(found.partly)}"
        if untold:
            parts += f"; of {', '.join(untold)} there is no text, and what was counted before speaks for them"
        log.info("%s", parts)


def count(config: RunConfig, stores: list[TokenStore], vocab_size: int, ends: Collection[int]) -> Counted:
    """What tokens speak for, and what pairs add to their second token.

    Pairs that share an entry have their mean there, each counting as often as it occurs. Of more pairs than entries
    those are left out that say least: evidence times how often they occur.

    Args:
        config, stores, vocab_size, ends: as `shares_of`.
    """
    shares = shares_of(config, stores, vocab_size, ends)
    of_token_V, _ = evidence_from(config, shares)
    counted = {lang: pairs_of(lang, config, stores, vocab_size, ends) for lang in shares}
    everywhere, place = np.unique(np.concatenate([pairs for pairs, _, _ in counted.values()]), return_inverse=True)
    often = np.bincount(place, np.concatenate([times for _, times, _ in counted.values()]), len(everywhere)) >= LEAST
    pairs_N = everywhere[often]
    del everywhere, place, often
    first_N, second_N = np.divmod(pairs_N, vocab_size)
    chance, weight_N = {"new": np.zeros(len(pairs_N)), "old": np.zeros(len(pairs_N))}, np.zeros(len(pairs_N))
    roles = {lang: "old" if config.data.languages[lang] == "old" else "new" for lang in shares}
    for lang, (pairs, times, _) in counted.items():
        of_first_V = np.bincount(pairs // vocab_size, times, vocab_size)
        kinds_V = np.bincount(pairs // vocab_size, minlength=vocab_size).clip(1)
        times_N = np.zeros(len(pairs_N))
        inside = np.isin(pairs, pairs_N, assume_unique=True)
        times_N[np.searchsorted(pairs_N, pairs[inside])] = times[inside]
        weight_N += times_N / max(times.sum(), 1)
        times_N += kinds_V[first_N] * shares[lang][second_N]
        times_N /= (of_first_V + kinds_V)[first_N]
        chance[roles[lang]] += times_N / list(roles.values()).count(roles[lang])
    adds_N = np.log(chance["new"] / chance["old"]).clip(-MOST, MOST) - of_token_V.numpy()[second_N]
    if (seen := len(pairs_N)) > PAIRS:
        most = np.argpartition(weight_N * np.abs(adds_N), seen - PAIRS)[seen - PAIRS :]
        first_N, second_N, weight_N, adds_N = (x_N[most] for x_N in (first_N, second_N, weight_N, adds_N))
    entry_N = pair_entry(torch.from_numpy(first_N), torch.from_numpy(second_N)).numpy()
    weight_P = np.bincount(entry_N, weight_N, PAIRS)
    sum_P = np.bincount(entry_N, weight_N * adds_N, PAIRS)
    of_pair_P = np.divide(sum_P, weight_P, where=weight_P > 0, out=np.zeros(PAIRS))
    partly = [lang for lang, (_, _, whole) in counted.items() if not whole]
    return Counted(of_token_V, torch.from_numpy(of_pair_P), len(first_N), seen, partly)


def pairs_of(
    lang: str, config: RunConfig, stores: list[TokenStore], vocab_size: int, ends: Collection[int]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The pairs of neighbours in a language's text, first · V + second, ascending, how often each occurs, and whether
    all of the text was counted.

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
    return pairs, np.bincount(place, np.concatenate([c for _, c in found]), len(pairs)), share == 1
