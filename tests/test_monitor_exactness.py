"""Which predictions have the base's very bits, and how far the others are: against counts document by document."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.distributed as dist
from monitor_texts import documents, make_tokenizer
from small_runs import free_port
from tiny import disturb, tiny_model

from moect.model import ForwardRecord, MoeConfig, append_moe, base_only
from moect.monitor.measuring.exactness import Comparison, wilson
from moect.monitor.measuring.score import add_up, score
from moect.monitor.measuring.windows import tokenise

WINDOW, STRIDE = 24, 12


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    return tokenise(make_tokenizer(tmp_path_factory.mktemp("tokenizer")), documents())


def gated_model(threshold: float, **changes):
    model = tiny_model("qwen3", vocab_size=300, initializer_range=0.2)
    moe = MoeConfig(experts=3, top_k=2, width=16, fusion="add", language_gate=True, gate_threshold=threshold, **changes)
    rows = model.model.embed_tokens.weight.data
    rows[rows.abs().sum(1) == 0] = rows[5].clone()  # of padding, here BOS: experts make nothing of nothing
    append_moe(model, moe)
    disturb(model, scale=0.3)
    return model.eval()


def compare(model, tokenised, compared=None, batch_size=3, rank=0, world_size=1, window=WINDOW, base=None):
    compared = range(len(tokenised)) if compared is None else compared
    base = base or (lambda: base_only(model))
    comparison = Comparison(base, len(tokenised), compared, torch.device("cpu"))
    args = (model, tokenised, window, STRIDE, batch_size, rank, world_size)
    sums = add_up(*args, compared=compared, comparison=comparison)
    if world_size > 1:
        comparison.reduce()
        sums.reduce()
    return comparison, sums


@torch.no_grad()
def gate_values(model, document) -> list[float]:
    """Of every token that predicts one, the document alone."""
    record = ForwardRecord()
    model.model(torch.tensor([document.ids[:-1]]), use_cache=False, moect_record=record)
    return record.gate_logit_T.sigmoid().tolist()


@torch.no_grad()
def all_logits(model, document) -> torch.Tensor:
    return model(torch.tensor([document.ids[:-1]]), use_cache=False).logits[0]


def test_the_base_beside_itself_is_the_same_in_every_bit(tokenised):
    model = gated_model(0.5)
    with base_only(model):
        result = compare(model, tokenised)[0].result(list(range(len(tokenised))), resamples=50)
    predictions = sum(len(d.ids) - 1 for d in tokenised)
    assert (result["documents"], result["identical_documents"]) == (len(tokenised), len(tokenised))
    assert (result["tokens"], result["identical_tokens"]) == (predictions, predictions)
    assert (result["top1_agreement"], result["kl"], result["max_logit_difference"]) == (1, 0, 0)
    assert (result["tokens_low"], result["tokens_high"]) == (1, 1)
    assert result["low"] < 1 == result["high"]  # so few documents do not prove that all are


@pytest.mark.parametrize("threshold", [0.55, 0.6, 0.65])
def test_a_prediction_has_the_bases_bits_exactly_while_no_token_passed_the_gate(tokenised, threshold):
    model = gated_model(threshold)
    comparison, _ = compare(model, tokenised, window=200)
    untouched = []  # predictions before the first token that passes, of each document
    for document in tokenised:
        passes = [value > threshold for value in gate_values(model, document)]
        untouched.append(passes.index(True) if any(passes) else len(passes))
    lengths = [len(d.ids) - 1 for d in tokenised]
    for i, (same, length) in enumerate(zip(untouched, lengths, strict=True)):
        result = comparison.result([i], resamples=0)
        assert (result["tokens"], result["identical_tokens"]) == (length, same)
        assert result["identical_documents"] == (same == length)
    result = comparison.result(list(range(len(tokenised))), resamples=0)
    assert result["identical_tokens"] == sum(untouched)
    assert 0 < sum(untouched) < sum(lengths)  # the thresholds lie so that both happen


def test_divergence_first_choice_and_greatest_difference_are_those_of_each_document_alone(tokenised):
    model = append_moe(tiny_model("llama", vocab_size=300, initializer_range=0.2), MoeConfig(experts=3, width=16))
    disturb(model, scale=0.3)
    model.eval()
    comparison, _ = compare(model, tokenised, window=200)
    for i, document in enumerate(tokenised):
        now_SV = all_logits(model, document).double()
        with base_only(model):
            before_SV = all_logits(model, document).double()
        p_SV, q_SV = before_SV.log_softmax(-1), now_SV.log_softmax(-1)
        kl_S = torch.nn.functional.kl_div(q_SV, p_SV, reduction="none", log_target=True).sum(-1)
        result = comparison.result([i], resamples=0)
        assert result["kl"] == pytest.approx(kl_S.mean().item() / math.log(2), rel=1e-4)
        assert result["top1_agreement"] == pytest.approx((p_SV.argmax(-1) == q_SV.argmax(-1)).double().mean().item())
        assert result["max_logit_difference"] == pytest.approx((now_SV - before_SV).abs().max().item(), rel=1e-4)
        assert result["identical_documents"] == 0 and result["kl"] > 0


def test_one_bit_in_one_logit_is_a_difference():
    base_CV = torch.randn(4, 10).bfloat16()
    now_CV = base_CV.clone()
    now_CV[2].view(torch.int16)[7] ^= 1
    comparison = Comparison(None, 2, [0, 1], torch.device("cpu"))
    comparison.add(now_CV, base_CV, torch.tensor([0, 0, 1, 1]))
    assert [comparison.result([d], 0)["identical_tokens"] for d in (0, 1)] == [2, 1]


def test_zeros_of_either_sign_are_different_bits():
    comparison = Comparison(None, 1, [0], torch.device("cpu"))
    comparison.add(torch.tensor([[-0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert comparison.result([0], 0)["identical_tokens"] == 0


def test_columns_of_added_tokens_take_probability_but_are_not_the_bases():
    base_CV = torch.tensor([[1.0, 2.0, 3.0]])
    now_CV = torch.tensor([[1.0, 2.0, 3.0, 3.5]])  # the added token is the likeliest
    comparison = Comparison(None, 1, [0], torch.device("cpu"))
    comparison.add(now_CV, base_CV, torch.tensor([0]))
    result = comparison.result([0], 0)
    p, q = base_CV.double().softmax(-1)[0], now_CV.double().softmax(-1)[0, :3]
    assert result["identical_tokens"] == 1 and result["top1_agreement"] == 0
    assert result["kl"] == pytest.approx((p * (p.log2() - q.log2())).sum().item(), rel=1e-5)


def test_only_the_documents_asked_for_are_compared_and_all_are_scored_alike(tokenised):
    model = gated_model(0.5)
    comparison, sums = compare(model, tokenised, compared=[0, 3])
    assert comparison.result([1, 2], resamples=0) is None
    assert comparison.result(list(range(8)), resamples=0)["documents"] == 2
    alone = score(model, tokenised, WINDOW, STRIDE, 3)
    assert [s.nll for s in sums.scores()] == pytest.approx([s.nll for s in alone], rel=1e-5)


def test_documents_that_are_not_compared_cost_the_base_nothing(tokenised):
    model, calls = gated_model(0.5), []
    compare(model, tokenised, compared=[3], batch_size=1, base=lambda: calls.append(1) or base_only(model))
    windows = 1 + max(0, math.ceil((len(tokenised[3].ids) - 1 - WINDOW) / STRIDE))
    assert len(calls) == 2 * windows  # for the hidden states and for the head


def test_documents_are_classed_by_their_length(tokenised):
    model = gated_model(0.5)
    comparison, _ = compare(model, tokenised, window=200)
    result = comparison.result(list(range(8)), resamples=0)
    lengths = [len(d.ids) - 1 for d in tokenised]
    for of_class in result["by_length"]:
        inside = [n for n in lengths if of_class["from"] <= n <= (of_class["to"] or math.inf)]
        assert of_class["documents"] == len(inside) > 0
        assert of_class["low"] <= of_class["identical_documents"] / len(inside) <= of_class["high"]
    assert sum(c["documents"] for c in result["by_length"]) == 8
    assert sum(c["identical_documents"] for c in result["by_length"]) == result["identical_documents"]


def _on_rank(rank, port, tokenised, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    comparison, _ = compare(gated_model(0.5), tokenised, compared=[0, 1, 2, 4, 5], rank=rank, world_size=2)
    queue.put(comparison.result(list(range(8)), resamples=20))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_find_what_one_finds(tokenised):
    context = torch.multiprocessing.get_context("spawn")
    queue, port = context.SimpleQueue(), free_port()
    processes = torch.multiprocessing.spawn(_on_rank, (port, tokenised, queue), nprocs=2, join=False)
    results = [queue.get(), queue.get()]
    while not processes.join():  # it returns at the first that ends
        pass
    alone = compare(gated_model(0.5), tokenised, compared=[0, 1, 2, 4, 5])[0].result(list(range(8)), resamples=20)
    assert results[0] == results[1]
    close = ("kl", "max_logit_difference", "top1_agreement")
    assert {k: v for k, v in results[0].items() if k not in close} == {k: v for k, v in alone.items() if k not in close}
    assert [results[0][k] for k in close] == pytest.approx([alone[k] for k in close], rel=1e-4)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (5, 10), (10, 10), (199, 200), (1, 1)])
def test_the_interval_of_a_share_is_wilsons(hits, count):
    from scipy.stats import binomtest

    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count, z=1.959963984540054) == pytest.approx((expected.low, expected.high), abs=1e-12)
