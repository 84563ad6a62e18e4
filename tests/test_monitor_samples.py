"""Samples: what is given, what really follows, and what a model writes on, against one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from monitor_texts import SENTENCES, evaluation_texts, make_tokenizer
from tiny import disturb, tiny_model

from moect.data.reading.evaluation import EvaluationDocument, EvaluationText
from moect.model import MoeConfig, append_moe
from moect.monitor.measuring.samples import BEGINNING, make_prompts, write_on


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def gated_model():
    model = tiny_model("llama", vocab_size=300, initializer_range=0.2)
    append_moe(model, MoeConfig(experts=3, width=16, fusion="add", language_gate=True))
    disturb(model, scale=0.3)
    return model.eval()


def a_text(*documents, answer=None):
    return EvaluationText("te", "new", "all", [EvaluationDocument(d, answer, f"{i}") for i, d in enumerate(documents)])


def test_prompt_and_reference_are_how_the_document_begins(tokenizer):
    for document in [*SENTENCES, SENTENCES[4] * 30]:
        prompts = make_prompts([a_text(document)], tokenizer, count=1, n_tokens=5)
        tokens = len(tokenizer(document, add_special_tokens=False)["input_ids"])
        assert len(prompts) == (tokens >= 4)
        for prompt in prompts:
            assert document.startswith(prompt.text + prompt.reference) and prompt.text and prompt.reference
            assert len(tokenizer(prompt.text, add_special_tokens=False)["input_ids"]) <= BEGINNING + 4


def test_the_first_documents_that_are_long_enough_are_taken_of_each_text(tokenizer):
    texts = [a_text("n", *SENTENCES[:3]), a_text(SENTENCES[0])]
    prompts = make_prompts(texts, tokenizer, count=2, n_tokens=5)
    assert [p.document for p in prompts] == ["1", "2", "0"]
    assert make_prompts(texts, tokenizer, count=0, n_tokens=5) == []


def test_where_there_are_answers_the_whole_prompt_is_given(tokenizer):
    prompts = make_prompts(evaluation_texts()[2:], tokenizer, count=3, n_tokens=5)
    assert [(p.text, p.reference) for p in prompts] == [("<cy> 1 =", " un"), ("<cy> 2 =", " dau"), ("<cy> 3 =", " tri")]
    odd = a_text("", "one " * 50, "one =", answer=" un")
    assert [p.document for p in make_prompts([odd], tokenizer, count=3, n_tokens=5, longest=20)] == ["2"]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_model_writes_what_it_writes_for_each_prompt_alone(tokenizer, batch_size):
    model = gated_model().train()
    texts = [a_text(SENTENCES[i]) for i in (0, 2, 4, 5)]
    prompts = make_prompts(texts, tokenizer, count=1, n_tokens=12)
    written = write_on(model, tokenizer, prompts, 12, batch_size)
    assert model.training
    model.eval()
    for prompt, text in zip(prompts, written, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt.text, add_special_tokens=False)["input_ids"]]
        start = len(ids)
        for _ in range(12):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True).rstrip("�")


def test_the_bases_own_generation_settings_do_not_count(tokenizer):
    model = gated_model()
    prompts = make_prompts([a_text(*SENTENCES)], tokenizer, 3, 12)
    plain = write_on(model, tokenizer, prompts, 12, 4)
    model.generation_config.update(repetition_penalty=5.0, num_beams=3, do_sample=True, temperature=9.0)
    settings = model.generation_config
    assert write_on(model, tokenizer, prompts, 12, 4) == plain
    assert model.generation_config is settings


def test_writing_on_leaves_generators_and_generation_settings_alone(tokenizer):
    model = gated_model()
    before = model.generation_config.to_json_string(use_diff=False), torch.get_rng_state().tolist()
    write_on(model, tokenizer, make_prompts([a_text(*SENTENCES)], tokenizer, 3, 5), 5, 4)
    assert (model.generation_config.to_json_string(use_diff=False), torch.get_rng_state().tolist()) == before
