"""The gate that a run begins with: naive Bayes by the frequencies of tokens, as far as their values can say it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import Place
from tiny import FAMILIES, tiny_model

from moect.errors import UnsupportedModelError
from moect.model import ForwardRecord, append_moe, modules_of
from moect.model.even_attention import ENOUGH
from moect.model.language_gate import LIMIT, EvidenceGate
from moect.train.gate_start import MOST, SMOOTHING, as_gate, evidence_of, fit, start_gate, values_of

V, BOS, EOS = 96, 1, 2


class Store:
    """Tokens of a corpus."""

    def __init__(self, tokens):
        self.tokens, self.n_tokens = np.array(tokens, dtype=np.uint16), len(tokens)


class Ends:
    bos_token_id, eos_token_id = BOS, EOS


@pytest.fixture
def corpora() -> list[Store]:
    """en and cy, which share some tokens: documents of 1 … 2."""
    random = np.random.default_rng(0)
    found = []
    for low, high in ((3, 60), (40, V)):
        bodies = [[BOS, *random.integers(low, high, 12), EOS] for _ in range(200)]
        found.append(Store(np.concatenate(bodies)))
    return found


def config(inputs, tmp_path, **moe):
    moe = {"fusion": "add", "experts": 2, "top_k": 1, "width": 8, "renormalise": False, "language_gate": True, **moe}
    return Place(inputs, tmp_path).config(moe=moe)


def test_evidence_is_the_logarithm_of_how_much_more_often_new_text_has_a_token(corpora, inputs, tmp_path):
    corpora[1] = Store(corpora[1].tokens[: 14 * 7])  # little of it: 7 documents beside 200
    evidence_V, weight_V = evidence_of(config(inputs, tmp_path), corpora, V, [BOS, EOS])
    sizes, drawn = (200 * 12, 7 * 12), SMOOTHING * V
    for token in (5, 50, int(corpora[1].tokens[1])):
        counts = [np.count_nonzero(store.tokens == token) for store in corpora]
        mean = sum(count / size for count, size in zip(counts, sizes, strict=True)) / 2
        en, cy = ((c + drawn * mean) / (size + drawn) for c, size in zip(counts, sizes, strict=True))
        assert evidence_V[token].item() == pytest.approx(np.clip(np.log(cy / en), -MOST, MOST))
        assert weight_V[token].item() == pytest.approx((en + cy) / 2)
    assert evidence_V[BOS] == evidence_V[EOS] == weight_V[BOS] == 0
    assert evidence_V[0] == weight_V[0] == 0, "a token that nobody has"
    only_old = [t for t in range(3, 40) if (corpora[0].tokens == t).any()]
    assert (evidence_V[only_old] < 0).all(), "however little new text there is"


def test_the_fit_is_weighted_least_squares():
    generator = torch.Generator().manual_seed(0)
    values_VK, evidence_V = torch.randn(V, 5, generator=generator), torch.randn(V, generator=generator).double()
    weight_V = torch.rand(V, generator=generator).double()
    map_K1, share = fit([values_VK[:50], values_VK[50:]], evidence_V, weight_V)
    scaled = np.sqrt(weight_V.numpy())[:, None]
    columns = np.c_[values_VK.double().numpy(), np.ones(V)]
    expected = np.linalg.lstsq(columns * scaled, evidence_V.numpy() * scaled[:, 0], rcond=None)[0]
    assert np.allclose(map_K1.numpy(), expected, atol=1e-4)
    assert 0 < share < 1
    exact = values_VK.double() @ torch.arange(5.0).double() + 2
    assert fit([values_VK], exact, weight_V)[1] == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def values_by_a_pass(model, block: int) -> torch.Tensor:
    """The values of all tokens, each a text of its own, as the model's own pass has them: (V, K)."""
    found = []
    handle = model.model.layers[block].self_attn.v_proj.register_forward_hook(lambda *a: found.append(a[2]))
    model.model(torch.arange(V)[:, None], use_cache=False)
    handle.remove()
    return found[0][:, 0]


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_adds_up_what_the_tokens_speak_for(family, block, corpora, inputs, tmp_path):
    """The logit at the t-th token is the sum of the fitted evidence up to it; BOS counts nothing."""
    model = tiny_model(family, initializer_range=0.2)
    run = config(inputs, tmp_path, layers=[block, 2])
    append_moe(model, run.moe)
    start_gate(model, run, corpora, Ends, V)
    ids = torch.tensor([[BOS, 5, 80, 50, 7, 90]])
    record = ForwardRecord()
    with torch.no_grad():
        model.model(ids, use_cache=False, moect_record=record)
    values_VK = values_by_a_pass(model, block)
    assert torch.allclose(values_of(model, block, torch.arange(V)), values_VK, atol=1e-5)
    if block:  # values there depend on what came before, too: a start, not a sum of the same numbers
        return
    evidence_V, weight_V = evidence_of(run, corpora, V, [BOS, EOS])
    map_K1, _ = fit([values_VK], evidence_V, weight_V)
    spoken_V = torch.nn.functional.pad(values_VK.double(), (0, 1), value=1.0) @ map_K1
    expected = torch.cat([torch.zeros(1), spoken_V[ids[0, 1:]].cumsum(0)])
    expected = LIMIT * torch.tanh(expected / LIMIT)
    assert torch.allclose(record.gate_logit_T.double(), expected.double(), atol=1e-3)


def test_a_gate_that_starts_so_tells_texts_apart_that_one_at_random_does_not(corpora, inputs, tmp_path):
    model = tiny_model("qwen3", initializer_range=0.2)
    run = config(inputs, tmp_path)
    append_moe(model, run.moe)

    def right() -> float:
        found = []
        for store, is_new in zip(corpora, (False, True), strict=True):
            record = ForwardRecord()
            ids = torch.from_numpy(store.tokens.astype(np.int64)).view(-1, 14)[:50]
            with torch.no_grad():
                model.model(ids, use_cache=False, moect_record=record)
            found.append(((record.gate_logit_T.view(50, 14)[:, -1] > 0) == is_new).float().mean().item())
        return sum(found) / 2

    at_random = right()
    start_gate(model, run, corpora, Ends, V)
    assert right() > 0.8 > at_random


@pytest.mark.parametrize(("sees", "begin"), [("token", "frequencies"), ("context", "random")])
def test_a_gate_that_does_not_add_up_or_begins_at_random_is_left_alone(sees, begin, corpora, inputs, tmp_path):
    run = config(inputs, tmp_path, gate_sees=sees)
    run.gate.begin = begin
    model = append_moe(tiny_model(), run.moe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_gate(model, run, corpora, Ends, V)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tokens_that_the_base_has_no_rows_for_are_left_out(corpora, inputs, tmp_path):
    corpora[1].tokens[1] = V + 3
    run = config(inputs, tmp_path)
    model = append_moe(tiny_model(), run.moe)
    start_gate(model, run, corpora, Ends, V + 4)
    first = modules_of(model)[0].language_gate.evidence.weight.clone()
    corpora[1].tokens[1] = 90
    start_gate(model, run, corpora, Ends, V)
    second = modules_of(model)[0].language_gate.evidence.weight
    assert not torch.equal(first, second) and torch.allclose(first, second, atol=0.1 * second.abs().max().item())


def test_every_head_of_a_group_hears_the_same(corpora):
    attention = tiny_model("llama").model.layers[0].self_attn  # 4 heads, 2 of keys and values, 8 wide
    map_K1 = torch.arange(17.0, dtype=torch.float64)
    weight_C, bias = as_gate(map_K1, torch.ones(16), attention)
    gate = EvidenceGate(33)
    gate.evidence.weight.data.copy_(weight_C[None])
    gate.evidence.bias.data.fill_(bias)
    values = torch.randn(16)
    context_C = torch.cat([values.view(2, 1, 8).expand(2, 2, 8).flatten(), torch.ones(1)]) / ENOUGH
    expected = values.double() @ map_K1[:-1] + 16 - (map_K1[:-1].sum() + 16)
    expected = LIMIT * torch.tanh(expected / LIMIT)
    assert gate(None, context_C[None]).item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(UnsupportedModelError, match="only some are here"):
        gate(None, context_C[None, 16:])
