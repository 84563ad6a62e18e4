"""Expert load and gates against a count by hand: one document, one token, one expert at a time."""

from __future__ import annotations

import pytest
import torch
from monitor_texts import documents, make_tokenizer
from tiny import disturb, tiny_model

from moect.model import ForwardRecord, MoeConfig, append_moe
from moect.monitor.measuring.routing import RoutingMeter
from moect.monitor.measuring.score import score
from moect.monitor.measuring.windows import tokenise

E, K, L = 4, 2, 3
GROUPS = [0, 1, 0, 1, 1, 0, 1, 0]


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    return tokenise(make_tokenizer(tmp_path_factory.mktemp("tokenizer")), documents())


def make_model(**changes):
    model = tiny_model("qwen3", vocab_size=300, initializer_range=0.2)
    append_moe(model, MoeConfig(experts=E, top_k=K, width=16, **changes), seed=0)
    disturb(model, scale=0.3)
    return model.eval()


def measured(model, tokenised, window=128, stride=64):
    meter = RoutingMeter(model, GROUPS)
    score(model, tokenised, window, stride, batch_size=3, meter=meter)
    return meter.result()


@torch.no_grad()
def counted(model, tokenised, group: int):
    """Assignments (L, E), frozen shares and gate values of a group, from each document alone and without padding."""
    counts, shares, values = torch.zeros(L, E), [], []
    for document, of in zip(tokenised, GROUPS, strict=True):
        if of != group:
            continue
        record = ForwardRecord()
        model.model(torch.tensor([document.ids[:-1]]), use_cache=False, moect_record=record)
        for index, block in record.blocks.items():
            for expert in block.indices_TK.flatten().tolist():
                counts[index, expert] += 1
            if block.frozen_share_T is not None:
                shares += block.frozen_share_T.tolist()
        if record.gate_logit_T is not None:
            values += record.gate_logit_T.sigmoid().tolist()
    return counts, shares, values


@pytest.mark.parametrize("fusion", ["gate", "discrete", "fixed", "add"])
def test_load_and_gate_are_those_of_a_direct_count(tokenised, fusion):
    model = make_model(fusion=fusion, fixed_weight=0.25)
    for group, routing in enumerate(measured(model, tokenised)):
        counts_LE, shares, _ = counted(model, tokenised, group)
        tokens = sum(len(d.ids) - 1 for d, of in zip(tokenised, GROUPS, strict=True) if of == group)
        assert counts_LE.sum().item() == tokens * K * L
        torch.testing.assert_close(torch.tensor(routing.expert_load), counts_LE / (tokens * K))
        assert routing.open_share is None
        if fusion == "add":
            assert routing.gate is None
        else:
            assert routing.gate == pytest.approx(sum(shares) / len(shares), rel=1e-6)
    if fusion == "fixed":
        assert routing.gate == 0.25


def test_language_gate_reports_its_mean_value_and_the_tokens_it_lets_through(tokenised):
    model = make_model(fusion="add", language_gate=True, gate_threshold=0.5)
    for group, routing in enumerate(measured(model, tokenised)):
        counts_LE, _, values = counted(model, tokenised, group)
        opened = sum(v > 0.5 for v in values)
        assert 0 < opened < len(values)
        assert routing.gate == pytest.approx(sum(values) / len(values), rel=1e-6)
        assert routing.open_share == pytest.approx(opened / len(values))
        torch.testing.assert_close(torch.tensor(routing.expert_load), counts_LE / (opened * K))


def test_a_gate_that_lets_nothing_through_gives_no_load(tokenised):
    model = make_model(fusion="add", language_gate=True, gate_threshold=0.999999)
    for routing in measured(model, tokenised):
        assert routing.open_share == 0
        assert routing.expert_load == [[0.0] * E] * L


def test_context_that_windows_repeat_is_counted_once(tokenised):
    meter = RoutingMeter(model := make_model(), GROUPS)
    score(model, tokenised, window=8, stride=2, batch_size=3, meter=meter)
    tokens_G = [sum(len(d.ids) - 1 for d, of in zip(tokenised, GROUPS, strict=True) if of == g) for g in (0, 1)]
    assert meter.tokens_GL.tolist() == [[n] * L for n in tokens_G]
    assert meter.assignments_GLE.sum(-1).tolist() == [[n * K] * L for n in tokens_G]


def test_blocks_without_a_module_have_no_row_in_the_load(tokenised):
    model = make_model(layers=[1])
    assert [len(r.expert_load) for r in measured(model, tokenised)] == [1, 1]
