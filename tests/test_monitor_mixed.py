"""Documents that change between two languages: their parts, against passes over the whole documents by hand."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from monitor_texts import make_tokenizer
from tiny import tiny_model

from moect import ForwardRecord, MoeConfig, append_moe, base_only
from moect.data.reading.evaluation import EvaluationDocument, EvaluationText
from moect.errors import ConfigError
from moect.model.append import modules_of
from moect.monitor.measuring.mixed import KINDS, PIECE, measure_mixed, mixed_parts, render_mixed

OLD = [EvaluationDocument(f"one hundred and {word}") for word in "one two three four five six seven eight nine".split()]
NEW = [EvaluationDocument(f"రెండు cant {word}") for word in "un dau tri pedwar pump chwech saith wyth".split()]


@pytest.fixture
def gated():
    """A model whose experts do something and whose gate opens for some tokens, and not for others."""
    torch.manual_seed(0)
    model = append_moe(tiny_model("llama", vocab_size=300), MoeConfig(fusion="add", experts=3, language_gate=True))
    with torch.no_grad():
        for moe in modules_of(model):
            moe.experts.down_proj.normal_(std=0.3)
        modules_of(model)[0].language_gate.evidence.weight.normal_(std=50.0)
    return model.eval()


@pytest.mark.parametrize("bos", [True, False])
def test_parts_take_turns_and_cover_each_document_once(tmp_path, bos):
    tokenizer = make_tokenizer(tmp_path, bos)
    parts = mixed_parts(OLD, NEW, tokenizer, most=9)
    assert len(parts) == 2 * 4, "eight pieces of the shorter"
    kinds = [part.kind for part in parts]
    assert kinds[:4] == ["old first", "new after old", "old after new", "new after old"]
    assert kinds[4:] == ["new first", "old after new", "new after old", "old after new"]
    for document in (parts[:4], parts[4:]):
        whole = document[-1].document
        text = tokenizer.decode(whole.ids, skip_special_tokens=True)
        assert [p.document.ids for p in document] == [whole.ids[: p.document.last] for p in document]
        edges = [document[0].document.first, *(p.document.last for p in document)]
        assert edges[0] == 1 and edges[-1] == len(whole.ids)
        assert [p.document.first for p in document] == edges[:-1]
        unpredicted = 0 if bos else len(tokenizer.decode(whole.ids[:1]).encode())
        assert sum(p.document.n_bytes for p in document) == len(text.encode()) - unpredicted
    texts = [tokenizer.decode(p.document.ids[p.document.first : p.document.last]) for p in parts[1:4]]
    assert texts == [f" {NEW[1].text}", f" {OLD[2].text}", f" {NEW[3].text}"]


def test_pieces_end_between_words_where_they_can(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    long = [EvaluationDocument("word " * 80)] * 4
    unbroken = [EvaluationDocument("字" * 300)] * 4
    first, second = mixed_parts(long, unbroken, tokenizer, most=1)[:2]
    assert tokenizer.decode(first.document.ids, skip_special_tokens=True) == ("word " * 80)[: PIECE - 1].strip()
    assert second.document.n_bytes == 1 + 3 * PIECE


def test_parts_have_the_losses_and_gates_that_passes_over_whole_documents_give(gated, tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    texts = [EvaluationText("en", "old", "news", OLD), EvaluationText("cy", "new", "news", NEW)]
    texts.append(EvaluationText("ga", "new", "web", NEW))
    gated.moe_config.gate_threshold = 0.4
    rows = measure_mixed(gated, lambda: base_only(gated), texts, tokenizer, 50, batch_size=3)
    assert [(r["old"], r["new"], r["domain"], r["part"]) for r in rows] == [("en", "cy", "news", k) for k in KINDS]
    parts = mixed_parts(OLD, NEW, tokenizer, 50)
    for how, key in (("model", "bits_per_byte"), ("base", "base_bits_per_byte"), ("open", "all_open_bits_per_byte")):
        nats, opened = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
        for document in (parts[:4], parts[4:]):
            ids = torch.tensor([document[-1].document.ids])
            record = ForwardRecord()
            gated.moe_config.gate_threshold = 0.0 if how == "open" else 0.4
            with torch.no_grad(), base_only(gated) if how == "base" else nullcontext():
                logp_SV = gated(ids, moect_record=record, use_cache=False).logits[0].double().log_softmax(-1)
            for part in document:
                for token in range(part.document.first, part.document.last):
                    nats[part.kind] -= logp_SV[token - 1, ids[0, token]].item()
                    opened[part.kind] += how == "model" and record.open_T[token - 1].item()
        for row in rows:
            n_bytes = sum(p.document.n_bytes for p in parts if p.kind == row["part"])
            assert row[key] == pytest.approx(nats[row["part"]] / math.log(2) / n_bytes, rel=1e-4), (how, row)
            if how == "model":
                assert row["open_share"] == opened[row["part"]] / row["tokens"]
    assert 0 < sum(r["open_share"] for r in rows) < 4, "some pass"
    assert len({round(r["bits_per_byte"], 3) for r in rows}) == 4
    assert "new after old" in render_mixed(rows)


def test_without_a_gate_or_without_both_roles_there_is_nothing_to_measure(gated, tmp_path, caplog):
    tokenizer = make_tokenizer(tmp_path)
    apart = [EvaluationText("en", "old", "news", OLD), EvaluationText("cy", "new", "web", NEW)]
    short = [EvaluationText("en", "old", "news", OLD[:3]), EvaluationText("cy", "new", "news", NEW)]
    for texts in (apart, short):
        with pytest.raises(ConfigError, match="no domain with an old and a new language"):
            measure_mixed(gated, lambda: base_only(gated), texts, tokenizer, 5, 3)
    assert "left out, having fewer than 4 documents: en (news)" in caplog.text
    model = append_moe(tiny_model("llama"), MoeConfig(fusion="add"))
    with pytest.raises(ConfigError, match="this model has none"):
        measure_mixed(model, lambda: base_only(model), apart, tokenizer, 5, 3)
