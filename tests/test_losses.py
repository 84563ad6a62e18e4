"""Every loss against the formula, written out by hand."""

import pytest
import torch
from tiny import tiny_model, tokens
from torch import nn

from moect.model import ForwardRecord, MoeConfig, append_moe, losses
from moect.model.record import BlockRecord


def test_chunked_cross_entropy_equals_torch_in_value_and_gradient(monkeypatch):
    head = nn.Linear(16, 50, bias=False)
    hidden = torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(0, 50, (30,))
    labels[::7] = -100
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    expected_grad = torch.autograd.grad(expected, (hidden, head.weight))
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 50 * 4)
    got = losses.cross_entropy_sum(hidden, labels, head, 50)
    assert torch.allclose(got, expected, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(got, (hidden, head.weight)), expected_grad, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_head_is_called_equally_often_whatever_is_labelled(monkeypatch):
    """Under ZeRO-3 each call gathers the head from all ranks: one call more on one rank, and all wait forever."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 50 * 4)
    calls = []
    head = nn.Linear(16, 50)
    head.register_forward_hook(lambda *_: calls.append(1))
    for labelled in (0, 1, 13, 30):
        labels = torch.full((30,), -100)
        labels[:labelled] = 7
        calls.clear()
        losses.cross_entropy_sum(torch.randn(30, 16), labels, head, 50)
        assert len(calls) == 8


def test_cross_entropy_without_any_label_is_zero_and_differentiable():
    hidden = torch.randn(4, 16, requires_grad=True)
    loss = losses.cross_entropy_sum(hidden, torch.full((4,), -100), nn.Linear(16, 50), 50)
    loss.backward()
    assert loss.item() == 0 and (hidden.grad == 0).all()


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_balance_loss_follows_its_formula_and_is_one_when_balanced(router):
    logits_TE = torch.randn(40, 4)
    record = ForwardRecord(blocks={0: BlockRecord(logits_TE.topk(2).indices, logits_TE)})
    valid = torch.arange(40) % 5 != 0
    counts = losses.expert_counts(record, 4, valid)
    scores = losses.score_sums(record, router, valid)
    got = losses.balance_loss((counts / counts.sum()).float(), scores / valid.sum())
    f, p = [0.0] * 4, [0.0] * 4
    for t in range(40):
        if t % 5 == 0:
            continue
        row = logits_TE[t].softmax(0) if router == "softmax" else logits_TE[t].sigmoid() / logits_TE[t].sigmoid().sum()
        for e in range(4):
            f[e] += (e in logits_TE[t].topk(2).indices.tolist()) / (32 * 2)
            p[e] += row[e].item() / 32
    assert got.item() == pytest.approx(4 * sum(a * b for a, b in zip(f, p, strict=True)), rel=1e-5)
    uniform = torch.full((1, 4), 0.25)
    assert losses.balance_loss(uniform, uniform).item() == pytest.approx(1.0)


def test_balance_loss_is_the_mean_over_blocks():
    load = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    assert losses.balance_loss(load, scores).item() == pytest.approx((2 * 0.9 + 2 * 0.5) / 2)


def test_z_loss_follows_its_formula():
    a, b = torch.randn(2, 6, 3)
    record = ForwardRecord(blocks={0: BlockRecord(a.topk(1).indices, a), 2: BlockRecord(b.topk(1).indices, b)})
    valid = torch.tensor([True, False, True, True, True, True])
    expected = sum(torch.log(x[t].exp().sum()) ** 2 for x in (a, b) for t in range(6) if t != 1) / 2
    assert losses.z_sum(record, valid).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gate_loss_is_class_balanced_binary_cross_entropy_without_padding():
    logit = torch.randn(9)
    role = torch.tensor([0, 0, 1, 1, 1, -1, 1, -1, 0], dtype=torch.int8)
    old, new = losses.gate_sums(logit, role)
    bce = nn.functional.binary_cross_entropy_with_logits
    assert old.item() == pytest.approx(bce(logit[role == 0], torch.zeros(3), reduction="sum").item(), rel=1e-5)
    assert new.item() == pytest.approx(bce(logit[role == 1], torch.ones(4), reduction="sum").item(), rel=1e-5)
    old, new = losses.gate_sums(logit, torch.ones(9, dtype=torch.int8))
    assert old.item() == 0 and torch.isfinite(new)  # no old token in the batch is no NaN


def test_counts_of_a_real_forward_pass_add_up():
    model = append_moe(tiny_model(), MoeConfig(experts=4, top_k=2, layers=[0, 2]))
    record = ForwardRecord()
    ids = tokens(2, 10)
    model(ids, use_cache=False, moect_record=record)
    valid = torch.ones(20, dtype=torch.bool)
    valid[-3:] = False
    counts = losses.expert_counts(record, 4, valid)
    assert counts.shape == (2, 4) and counts.sum(1).tolist() == [34.0, 34.0]
