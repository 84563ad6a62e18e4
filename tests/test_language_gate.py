"""What the language gate costs a pass: it is asked once, and a text that it holds back costs a block nothing more."""

from collections import Counter

import pytest
import torch
from tiny import disturb, logits, open_by_half, tiny_model, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moect.model import ForwardRecord, MoeConfig, append_moe, base_only, language_gate, modules_of
from moect.model.language_gate import TokenGate


class Operators(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def gated(blocks, logit, dtype=torch.float32):
    """A model whose gate says the same for every token, or where `logit` is None what it says."""
    model = append_moe(
        tiny_model(num_hidden_layers=blocks, dtype=dtype), MoeConfig(fusion="add", language_gate=True, width=16)
    )
    disturb(model)
    if logit is None:
        open_by_half(model, tokens())
    else:
        nn.init.constant_(modules_of(model)[0].language_gate.evidence.bias, logit)
    return model


def beyond_the_base(model) -> Counter:
    """Operators of a pass that the base alone does not call."""
    logits(model, tokens())
    with Operators() as ours:
        logits(model, tokens())
    with Operators() as of_base, base_only(model):
        logits(model, tokens())
    assert not of_base.names - ours.names
    return ours.names - of_base.names


def test_a_closed_text_costs_the_gate_once_whatever_the_number_of_blocks():
    few, many = (beyond_the_base(gated(blocks, -1e4)) for blocks in (2, 7))
    assert few == many
    assert few["nonzero"] == few["gt"] == few["addmm"] == 1
    assert few.keys().isdisjoint({"topk", "index_add", "cpu_experts"})


@pytest.mark.parametrize("logit", [None, 1e4], ids=["some open", "all open"])
def test_an_open_text_is_sorted_out_once_and_passes_the_experts_of_every_block(logit):
    called = beyond_the_base(gated(5, logit))
    assert called["nonzero"] == 1 and called["index_add"] == called["topk"] == 5


@pytest.mark.parametrize("logit", [-1e4, None, 1e4], ids=["closed", "some", "open"])
def test_the_record_says_which_tokens_were_let_through(logit):
    model, record = gated(3, logit), ForwardRecord()
    logits(model, tokens(), moect_record=record)
    expected = record.gate_logit_T.double().sigmoid() > 0.5
    assert torch.equal(record.open_T, expected)
    assert record.open_token.tolist() == [t for t, is_open in enumerate(expected.tolist()) if is_open]
    assert len(record.blocks) == (3 if expected.any() else 0)
    assert all(torch.equal(block.open_T, expected) for block in record.blocks.values())
    assert 0 < expected.sum() < len(expected) or logit is not None


def test_in_training_no_token_is_held_back():
    model, record = gated(3, -1.0).train(), ForwardRecord()
    model(tokens(), use_cache=False, moect_record=record)
    assert record.open_T is record.open_token is None and len(record.blocks) == 3


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_weights_converted_in_pieces_give_the_gate_that_is_written_down(rows, monkeypatch):
    gate = TokenGate(64)
    gate.reset(torch.Generator().manual_seed(0))
    gate.to(torch.bfloat16)
    u_TD = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    first, second = gate.in_proj, gate.out_proj
    hidden_TD = torch.tanh(u_TD.double() @ first.weight.double().T + first.bias.double())
    expected = (hidden_TD @ second.weight.double().T + second.bias.double())[:, 0]
    whole = gate(u_TD)
    monkeypatch.setattr(language_gate, "PIECE", rows * 64)
    with torch.no_grad(), Operators() as called:
        got = gate(u_TD)
    assert called.names["addmm"] == -(-64 // rows) + 1
    assert got.dtype == torch.float32
    for logit_T in (got, whole):
        assert torch.allclose(logit_T.double(), expected, atol=1e-6)
    assert gate(u_TD).requires_grad  # pieces are for inference alone
