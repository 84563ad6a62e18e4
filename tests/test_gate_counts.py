"""What a gate that counts finds in text, against counting with dictionaries."""

from __future__ import annotations

from collections import Counter
from math import log

import numpy as np
import pytest
import torch
from test_gate_start import BOS, EOS, Ends, Store, V, config, corpora  # noqa: F401
from tiny import tiny_model

from moect.model import append_moe, modules_of
from moect.model.counting_gate import PAIRS, pair_entry
from moect.train import gate_counts
from moect.train.gate_counts import LEAST, count, count_gate, pairs_of
from moect.train.gate_start import MOST, SMOOTHING, evidence_of

COUNTS = {"gate_sees": "pairs"}


def by_hand(text: Store) -> tuple[Counter, Counter]:
    """Tokens and pairs of neighbours of a text, without BOS and EOS."""
    said = text.tokens.tolist()
    ends = (BOS, EOS)
    pairs = [(a, b) for a, b in zip(said, said[1:], strict=False) if a not in ends and b not in ends]
    return Counter(t for t in said if t not in ends), Counter(pairs)


def test_pairs_add_what_two_neighbours_say_beyond_the_second(corpora, inputs, tmp_path):  # noqa: F811
    run = config(inputs, tmp_path, **COUNTS)
    of_token_V, _ = evidence_of(run, corpora, V, [BOS, EOS])
    found = count(run, corpora, V, [BOS, EOS])
    of_pair_P = found.of_pair_P
    assert torch.equal(found.of_token_V, of_token_V)
    counted = [by_hand(text) for text in corpora]
    everywhere = Counter()
    for _, of_pairs in counted:
        everywhere += of_pairs
    assert found.pairs == found.seen == sum(times >= LEAST for times in everywhere.values())
    shares = []
    mean = {t: sum(tokens[t] / tokens.total() for tokens, _ in counted) / 2 for t in range(V)}
    for tokens, _ in counted:
        drawn = SMOOTHING * V
        shares.append({t: (tokens[t] + drawn * mean[t]) / (tokens.total() + drawn) for t in range(V)})
    expected, weights = {}, {}
    for (a, b), times in everywhere.items():
        if times < LEAST:
            continue
        chance = []
        for share, (_, of_pairs) in zip(shares, counted, strict=True):
            followers = [n for (first, _), n in of_pairs.items() if first == a]
            kinds = max(len(followers), 1)
            chance.append((of_pairs[a, b] + kinds * share[b]) / (sum(followers) + kinds))
        adds = np.clip(log(chance[1] / chance[0]), -MOST, MOST) - of_token_V[b].item()
        weight = sum(of_pairs[a, b] / of_pairs.total() for _, of_pairs in counted)
        place = pair_entry(torch.tensor(a), torch.tensor(b)).item()
        expected[place] = expected.get(place, 0) + weight * adds
        weights[place] = weights.get(place, 0) + weight
    assert len(expected) > 500
    for place, total in expected.items():
        assert of_pair_P[place].item() == pytest.approx(total / weights[place])
    nothing = torch.ones(PAIRS, dtype=torch.bool)
    nothing[list(expected)] = False
    assert not of_pair_P[nothing].any()


def test_counting_in_pieces_and_of_a_part_only(corpora, inputs, tmp_path, monkeypatch):  # noqa: F811
    run = config(inputs, tmp_path, **COUNTS)
    *whole, all_of_it = pairs_of("en", run, corpora, V, [BOS, EOS])
    assert all_of_it
    assert {divmod(int(p), V): int(n) for p, n in zip(*whole, strict=True)} == by_hand(corpora[0])[1]
    monkeypatch.setattr(gate_counts, "AT_ONCE", 37)
    *pieces, _ = pairs_of("en", run, corpora, V, [BOS, EOS])
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))
    monkeypatch.setattr(gate_counts, "ENOUGH", 140)
    first = Store(corpora[0].tokens[:140])
    *part, all_of_it = pairs_of("en", run, corpora, V, [BOS, EOS])
    assert not all_of_it
    assert part[1].sum() == by_hand(first)[1].total()


def test_of_more_pairs_than_entries_those_that_say_most_are_kept(corpora, inputs, tmp_path, monkeypatch):  # noqa: F811
    run = config(inputs, tmp_path, **COUNTS)
    everything = count(run, corpora, V, [BOS, EOS])
    monkeypatch.setattr(gate_counts, "PAIRS", 64)  # entries are still those of the large table: none is shared
    monkeypatch.setattr(gate_counts, "pair_entry", lambda first, second: torch.arange(len(first)))
    few = count(run, corpora, V, [BOS, EOS])
    assert (few.pairs, few.seen) == (64, everything.seen)
    assert few.of_pair_P.abs().mean() > everything.of_pair_P[everything.of_pair_P != 0].abs().mean()


def test_the_gate_is_given_what_was_counted_and_tells_texts_apart_at_once(corpora, inputs, tmp_path):  # noqa: F811
    run = config(inputs, tmp_path, **COUNTS)
    model = append_moe(tiny_model("qwen3"), run.moe)
    gate = modules_of(model)[0].language_gate
    assert not gate.of_token.any() and not gate.of_pair.any()
    count_gate(model, run, corpora, Ends, V)
    of_token_V, _ = evidence_of(run, corpora, V, [BOS, EOS])
    assert torch.equal(gate.of_token, of_token_V.float())
    assert torch.equal(gate.of_pair, count(run, corpora, V, [BOS, EOS]).of_pair_P.float())
    for text, is_new in zip(corpora, (False, True), strict=True):
        ids = torch.from_numpy(text.tokens.astype(np.int64)).view(-1, 14)
        from moect.model import ForwardRecord

        record = ForwardRecord()
        with torch.no_grad():
            model.model(ids, use_cache=False, moect_record=record)
        last = record.gate_logit_T.view(-1, 14)[:, -1]
        assert ((last > 0) == is_new).float().mean() > 0.95


@pytest.mark.parametrize("sees", ["token", "context"])
def test_a_gate_that_does_not_count_is_left_alone(sees, corpora, inputs, tmp_path):  # noqa: F811
    run = config(inputs, tmp_path, gate_sees=sees)
    model = append_moe(tiny_model(), run.moe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_gate(model, run, corpora, Ends, V)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_was_counted_for_a_language_without_text_speaks_on(corpora, inputs, tmp_path, caplog):  # noqa: F811
    run = config(inputs, tmp_path, **COUNTS)
    model = append_moe(tiny_model(), run.moe)
    gate = modules_of(model)[0].language_gate
    before = (torch.arange(V) - 50.0) / 10
    gate.of_token.copy_(before)
    gate.of_pair[7] = 3.0
    run.data.languages["is"] = "learnt"
    with caplog.at_level("INFO"):
        count_gate(model, run, corpora, Ends, V)
    found = count(run, corpora, V, [BOS, EOS])
    odds = (before.exp() + found.of_token_V.float().exp()) / 2
    assert torch.allclose(gate.of_token, odds.log(), atol=1e-5)
    assert gate.of_pair[7].item() == pytest.approx(log((np.exp(3) + found.of_pair_P[7].exp().item()) / 2), abs=1e-5)
    assert "of is there is no text" in caplog.text
    gate.of_token.zero_()
    count_gate(model, run, corpora, Ends, V)
    assert gate.of_token[BOS] == gate.of_token[EOS] == 0, "what ends texts is silent"


def test_tokens_without_a_row_in_the_base_are_counted_in_pairs(corpora, inputs, tmp_path):  # noqa: F811
    corpora[1].tokens[1:3] = V + 3, 90
    corpora[1].tokens[15:17] = V + 3, 90
    run = config(inputs, tmp_path, **COUNTS)
    model = append_moe(tiny_model(), run.moe)
    count_gate(model, run, corpora, Ends, V + 4)
    gate = modules_of(model)[0].language_gate
    assert len(gate.of_token) == V
    assert gate.of_pair[pair_entry(torch.tensor(V + 3), torch.tensor(90))] != 0
