"""The language gate that counts: its sums against one addition after another, whatever the shape of the pass."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, disturb, logits, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from moect.errors import UnsupportedModelError
from moect.model import ForwardRecord, MoeConfig, append_moe, base_only, modules_of
from moect.model.counting_gate import (
    GRAIN,
    HIGH,
    LOW,
    NONE,
    PAIRS,
    CountingGate,
    Sums,
    Tokens,
    bounded_sums,
    pair_entry,
)
from moect.model.embeddings import append_rows
from moect.model.language_gate import OPEN

GATE = MoeConfig(fusion="add", language_gate=True, gate_sees="pairs", width=16)
V = 96


def gated(family="qwen3", **changes):
    layers = changes.pop("layers", "all")
    config = MoeConfig(**{**vars(GATE), "layers": layers})
    model = append_moe(tiny_model(family, initializer_range=0.2, **changes), config)
    disturb(model)
    return model


def gate_values(model, ids, **told):
    record = ForwardRecord()
    with torch.no_grad():
        model(ids, moect_record=record, **{"use_cache": False, **told})
    return record.gate_logit_T.view(*ids.shape)


def one_after_another(model, text):
    """The gate's values of one text, from its tables, in Python's own numbers."""
    gate, total, values, before = modules_of(model)[0].language_gate, 0.0, [], None
    for token in text.tolist():
        e = gate.of_token[token].float()
        if before is not None:
            e = e + gate.of_pair[pair_entry(torch.tensor(before), torch.tensor(token))].float()
        total = min(max(total + round(e.item() / GRAIN) * GRAIN, LOW), HIGH)
        values.append(total)
        before = token
    return torch.tensor(values)


@pytest.mark.parametrize("scale", [0.3, 4.0, 60.0])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 300])
def test_bounded_sums_are_those_of_one_after_another(length, scale):
    generator = torch.Generator().manual_seed(length)
    e_BS = (scale * torch.randn(8, length, generator=generator) / GRAIN).round() * GRAIN
    starts_BS = torch.rand(8, length, generator=generator) < 0.05
    sum_B = (torch.rand(8, generator=generator) * (HIGH - LOW) + LOW).div(GRAIN).round() * GRAIN
    expected = torch.empty_like(e_BS)
    for b in range(8):
        total = sum_B[b].item()
        for t in range(length):
            total = min(max((0.0 if starts_BS[b, t] else total) + e_BS[b, t].item(), LOW), HIGH)
            expected[b, t] = total
    assert torch.equal(bounded_sums(e_BS, starts_BS, sum_B), expected)


def test_pairs_spread_over_the_whole_table():
    first, second = torch.meshgrid(torch.arange(600), torch.arange(150_000, 150_600), indexing="ij")
    entries = pair_entry(first.flatten(), second.flatten())
    assert entries.min() >= 0 and entries.max() < PAIRS
    used = len(entries.unique()) / PAIRS
    assert used == pytest.approx(
        1 - torch.tensor(-len(entries) / PAIRS).exp().item(), abs=0.01
    )  # as if thrown at random
    assert not torch.equal(pair_entry(first, second), pair_entry(second, first))


@pytest.mark.parametrize("layers", ["all", [1, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_adds_up_what_the_tables_say(family, layers):
    model, ids = gated(family, layers=layers), tokens(3, 40)
    got = gate_values(model, ids)
    assert torch.equal(got, torch.stack([one_after_another(model, text) for text in ids]))
    assert 0 < (got > 0).sum() < got.numel()


def test_packed_and_padded_texts_are_counted_alone_to_the_bit():
    model, ids = gated(), tokens(1, 12)
    alone = torch.cat([gate_values(model, part) for part in (ids[:, :7], ids[:, 7:])], 1)
    packed = gate_values(model, ids, position_ids=torch.cat([torch.arange(7), torch.arange(5)])[None])
    assert torch.equal(packed, alone)
    mask = (torch.arange(12) >= 7).long()[None]
    for told in ({}, {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}):
        assert torch.equal(gate_values(model, ids, attention_mask=mask, **told)[:, 7:], alone[:, 7:])


@pytest.mark.parametrize("layers", ["all", [1, 2]], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_a_cache_gives_the_values_of_the_whole_text_to_the_bit(known, layers):
    model, ids = gated(layers=layers), tokens(2, 10)
    whole, parts = gate_values(model, ids), []
    cache = DynamicCache(config=model.config) if known else DynamicCache()
    for part in ids.split([4, 1, 1, 3, 1], 1):
        parts.append(gate_values(model, part, past_key_values=cache, use_cache=True))
    assert torch.equal(torch.cat(parts, 1), whole)
    assert len(cache.layers) == 4 and isinstance(cache.layers[-1], Sums) and cache.get_seq_length() == 10
    again = copy.deepcopy(cache)
    again.crop(-3)
    assert torch.equal(gate_values(model, ids[:, 7:], past_key_values=again, use_cache=True), whole[:, 7:])


def test_every_way_of_generating_gives_what_no_cache_gives():
    model = gated()
    ids, lengths = tokens(3, 12), (12, 5, 8)
    mask = torch.stack([(torch.arange(12) >= 12 - n).long() for n in lengths])
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    opened = []
    for text, n in zip(ids, lengths, strict=True):
        text = text[None, -n:]
        plain = model.generate(text, use_cache=False, **options)
        assert torch.equal(model.generate(text, **options), plain)
        assert torch.equal(model.generate(text, cache_implementation="static", **options), plain)
        assert torch.equal(model.generate(text, prompt_lookup_num_tokens=3, **options), plain)
        beams = model.generate(text, num_beams=3, use_cache=False, **options)
        assert torch.equal(model.generate(text, num_beams=3, **options), beams)
        opened.append((plain[0, n:], gate_values(model, plain) > 0))
    for kind in (None, "static"):
        batch = model.generate(ids * mask, attention_mask=mask, cache_implementation=kind, **options)
        for row, (alone, _) in zip(batch, opened, strict=True):
            assert torch.equal(row[12:], alone)
    opened_T = torch.cat([o.flatten() for _, o in opened])
    assert 0 < opened_T.sum() < len(opened_T)


def test_a_static_cache_of_ones_own_is_gone_on_with():
    model, ids = gated(), tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [gate_values(model, part, past_key_values=cache, use_cache=True) for part in ids.split([6, 1, 2], 1)]
    assert torch.equal(torch.cat(parts, 1), gate_values(model, ids))


def test_a_cache_that_the_gate_did_not_see_filled_is_refused():
    model, ids = gated(), tokens(1, 8)
    cache = DynamicCache(config=model.config)
    with base_only(model):
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="holds 8 tokens and the language gate saw 0"):
        model(ids, past_key_values=cache, use_cache=True)


def test_embeddings_without_tokens_are_refused():
    model = gated()
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_tokens_beyond_the_vocabulary_speak_in_pairs_only():
    gate = CountingGate(V)
    gate.of_token.fill_(2.0)
    gate.of_pair.fill_(0.5)
    logit = gate(Tokens(torch.tensor([[5, V + 3, 7]])), torch.arange(3)[None])
    assert logit.tolist() == [2.0, 2.5, 5.0]
    assert gate.evidence(torch.tensor([V]), torch.tensor([NONE])).item() == 0


def test_a_token_that_says_nothing_is_silent_in_pairs_too():
    gate = CountingGate(V)
    gate.of_token.fill_(2.0)
    gate.of_token[1] = 0  # begins texts
    gate.of_pair.fill_(0.5)
    assert gate(Tokens(torch.tensor([[1, 5, 1, 7, 8]])), torch.arange(5)[None]).tolist() == [0.0, 2.0, 2.0, 4.0, 6.5]


def test_padding_inside_a_text_changes_nothing():
    model, ids = gated(), tokens(1, 10)
    whole = gate_values(model, ids)
    gap = torch.cat([ids[:, :5], torch.zeros(1, 2, dtype=torch.int64), ids[:, 5:]], 1)
    mask = torch.tensor([[1] * 5 + [0] * 2 + [1] * 5])
    got = gate_values(model, gap, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1))
    assert torch.equal(got[mask.bool()], whole[0])
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 6), (6, 9), (9, 12)):
        told = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
        parts.append(gate_values(model, gap[:, start:end], **told))
    assert torch.equal(torch.cat(parts, 1)[mask.bool()], whole[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_converted_adds_up_in_fp32_all_the_same(dtype):
    model, ids = gated().to(dtype), tokens(2, 30)
    whole, cache = gate_values(model, ids), DynamicCache(config=model.config)
    parts = [gate_values(model, part, past_key_values=cache, use_cache=True) for part in ids.split([20, 1, 9], 1)]
    assert whole.dtype == torch.float32 and torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(whole, torch.stack([one_after_another(model, text) for text in ids]))


def test_arguments_by_place_of_any_integer_type_and_masks_longer_than_the_text():
    model, ids = gated(), tokens(2, 10)
    mask = torch.tensor([[0] * 3 + [1] * 7, [1] * 10])
    expected = gate_values(model, ids, attention_mask=mask)
    for call in (
        lambda r: model.model(ids, mask, use_cache=False, moect_record=r),
        lambda r: model.model(ids.int(), mask.bool(), use_cache=False, moect_record=r),
    ):
        record = ForwardRecord()
        with torch.no_grad():
            call(record)
        assert torch.equal(record.gate_logit_T.view(2, 10), expected)
    cache = StaticCache(config=model.config, max_cache_len=16)
    longer = torch.cat([mask, torch.zeros(2, 6, dtype=torch.int64)], 1)
    told = {"past_key_values": cache, "use_cache": True}
    first = gate_values(model, ids[:, :6], attention_mask=longer, **told)
    second = gate_values(model, ids[:, 6:], attention_mask=longer, **told)
    assert torch.equal(torch.cat([first, second], 1), expected)


def test_a_paged_cache_is_refused():
    model = gated()
    block = model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="paged cache"):
        block(torch.zeros(1, 2, 32), moect_record=ForwardRecord(), cache=object(), position_ids=torch.arange(2)[None])


def test_an_offloaded_cache_still_fetches_its_first_layer():
    model, ids = gated(), tokens(1, 4)
    cache = DynamicCache(config=model.config)
    gate_values(model, ids, past_key_values=cache, use_cache=True)
    fetched = []
    cache.layers[0].prefetch = lambda: fetched.append(0)
    cache.layers[-1].prefetch()
    assert fetched == [0]


def test_a_closed_text_is_the_bases_bit_for_bit_and_an_open_token_has_its_row_from_the_embedding_on():
    model = gated()
    append_rows(model, list(range(3, V)), opening=[90])
    rows = model.model.embed_tokens.rows
    with torch.no_grad():
        rows.delta.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    ids = tokens(40, 6, vocab=90)
    with base_only(model):
        expected = logits(model, ids)
    got, values = logits(model, ids), gate_values(model, ids)
    closed_B = (values <= 0).all(1)
    assert 0 < closed_B.sum() < 40
    assert torch.equal(got[closed_B], expected[closed_B])
    assert not torch.equal(got[~closed_B], expected[~closed_B])
    heard = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    logits(model, ids)
    plain = torch.nn.functional.embedding(ids, model.model.embed_tokens.weight)
    own = plain + rows.delta[ids - 3]
    assert torch.equal(heard[0], torch.where((values > 0)[..., None], own, plain))
    ids[0, 2] = 90
    assert gate_values(model, ids)[0, 2] == OPEN


def test_training_moves_rows_and_experts_through_a_soft_gate_and_not_the_tables():
    model = gated().train()
    append_rows(model, list(range(3, V)))
    ids, gate = tokens(2, 9), modules_of(model)[0].language_gate
    before = [gate.of_token.clone(), gate.of_pair.clone()]
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.embed_tokens.rows.delta.grad.abs().sum() > 0
    assert modules_of(model)[0].experts.down_proj.grad.abs().sum() > 0
    assert [*gate.parameters()] == []
    assert torch.equal(gate.of_token, before[0]) and torch.equal(gate.of_pair, before[1])
