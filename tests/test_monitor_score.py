"""Scores against slow and obviously right ones: a token at a time, in fp64; and against generate()."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monitor_texts import SENTENCES, documents, make_tokenizer
from tiny import disturb, tiny_model

from moect.data.reading.evaluation import EvaluationDocument
from moect.errors import DataError
from moect.model import MoeConfig, append_moe
from moect.monitor.measuring import score as score_module
from moect.monitor.measuring.score import score
from moect.monitor.measuring.windows import TokenisedDocument, cut_windows, tokenise

WINDOW, STRIDE = 16, 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer_without_bos(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer-without-bos"), bos=False)


def make_model(family="qwen3", appended=True):
    model = tiny_model(family, vocab_size=300, initializer_range=0.2)
    if appended:
        append_moe(model, MoeConfig(experts=3, top_k=2, width=16), seed=0)
        disturb(model)
    return model.eval()


@torch.no_grad()
def naive_nll(model, ids: list[int], first: int, last: int, window: int, stride: int) -> float:
    """Nats of tokens first … last - 1, each from one forward pass of its own."""
    total = 0.0
    for position in range(first, last):
        moves = max(0, -((position - window) // -stride))
        context = torch.tensor([ids[moves * stride : position]])
        logits_V = model(context, use_cache=False).logits[0, -1]
        total -= logits_V.double().log_softmax(-1)[ids[position]].item()
    return total


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_nll_is_that_of_a_naive_loop_over_single_tokens_in_fp64(tokenizer, family):
    model = make_model(family)
    exact = copy.deepcopy(model).double()
    tokenised = tokenise(tokenizer, documents())
    assert max(len(d.ids) for d in tokenised) > 2 * WINDOW  # several windows
    for document, result in zip(tokenised, score(model, tokenised, WINDOW, STRIDE, batch_size=4), strict=True):
        expected = naive_nll(exact, document.ids, 1, len(document.ids), WINDOW, STRIDE)
        assert result.nll == pytest.approx(expected, rel=1e-6)


def test_with_bos_every_byte_is_counted(tokenizer):
    for text, document in zip(SENTENCES, tokenise(tokenizer, documents()), strict=True):
        assert document.ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in document.ids
        assert (document.first, document.last) == (1, len(document.ids))
        assert document.n_bytes == len(text.encode())


def test_without_bos_the_first_token_is_left_out_of_nats_and_bytes(tokenizer_without_bos):
    model = make_model()
    exact = copy.deepcopy(model).double()
    tokenised = tokenise(tokenizer_without_bos, documents())
    results = score(model, tokenised, WINDOW, STRIDE, batch_size=4)
    for text, document, result in zip(SENTENCES, tokenised, results, strict=True):
        left_out = tokenizer_without_bos.decode(document.ids[: document.first])
        assert text.startswith(left_out)
        assert result.n_bytes == len(text.encode()) - len(left_out.encode())
        expected = naive_nll(exact, document.ids, document.first, len(document.ids), WINDOW, STRIDE)
        assert result.nll == pytest.approx(expected, rel=1e-6)
    firsts = {text: document.first for text, document in zip(SENTENCES, tokenised, strict=True)}
    assert firsts["one hundred and nineteen"] == 1
    assert firsts["రెండు వందల పంతొమ్మిది"] == 3  # three tokens make the first character: none of them has its bytes
    assert firsts["é"] == 2 and results[SENTENCES.index("é")].n_bytes == 0


@pytest.mark.parametrize("window, stride", [(1, 1), (4, 4), (7, 3), (16, 1), (50, 25)])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 7, 8, 9, 40])
def test_windows_predict_every_token_once_and_stay_within_their_size(n_tokens, window, stride):
    predicted = []
    for w in cut_windows(0, n_tokens, window, stride):
        assert w.start < w.first <= w.end < n_tokens and len(w) <= window
        if w.first > 1:
            assert w.first - w.start > window - stride  # the context that the docstring promises
        predicted += range(w.first, w.end + 1)
    assert predicted == list(range(1, n_tokens))


def test_batch_size_and_padding_do_not_matter(tokenizer):
    model = make_model()
    tokenised = tokenise(tokenizer, documents())
    alone = [score(model, [d], WINDOW, STRIDE, batch_size=1)[0].nll for d in tokenised]
    for batch_size in (2, 5, 64):
        together = [s.nll for s in score(model, tokenised, WINDOW, STRIDE, batch_size)]
        assert together == pytest.approx(alone, rel=1e-6)


def test_logits_are_never_held_for_more_than_a_chunk_of_positions(tokenizer, monkeypatch):
    model = make_model()
    tokenised = tokenise(tokenizer, documents())
    whole = score(model, tokenised, WINDOW, STRIDE, batch_size=8)
    monkeypatch.setattr(score_module, "CHUNK_ELEMENTS", 300 * 10)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    chunked = score(model, tokenised, WINDOW, STRIDE, batch_size=8)
    assert max(sizes) <= 10 and len(sizes) > 8
    assert [s.nll for s in chunked] == pytest.approx([s.nll for s in whole], rel=1e-6)


def _score_on_rank(rank: int, world_size: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    model = make_model()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    tokenised = tokenise(make_tokenizer(folder / f"tokenizer-{rank}"), _prompts())
    scores = score(model, tokenised, WINDOW, STRIDE, 3, rank, world_size)
    values = {"nll": [s.nll for s in scores], "exact": [s.exact for s in scores], "calls": len(calls)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def _prompts() -> list[EvaluationDocument]:
    return documents() + [EvaluationDocument(f"{n} =", f" {n}") for n in range(7)]


def test_two_ranks_give_what_one_gives_and_make_equally_many_calls(tokenizer, tmp_path):
    tokenised = tokenise(tokenizer, _prompts())
    one = score(make_model(), tokenised, WINDOW, STRIDE, 3)
    windows = sum(len(list(cut_windows(0, len(d.ids), WINDOW, STRIDE))) for d in tokenised)
    assert -(-windows // 3) % 2 == 1  # one rank runs out of batches
    mp.spawn(_score_on_rank, (2, tmp_path), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["nll"] == pytest.approx([s.nll for s in one], rel=1e-6)
    assert ranks[0]["exact"] == [s.exact for s in one]


def overfitted(tokenizer, learned: list[EvaluationDocument]):
    """A model that knows some answers by heart."""
    model = make_model(appended=False).requires_grad_(True).train()
    batch = [torch.tensor(d.ids) for d in tokenise(tokenizer, learned)]
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(ids, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


WORDS = ["un", "dau", "tri", "pedwar", "pump", "chwech", "saith", "wyth", "naw", "deg"]


@pytest.mark.parametrize("bos", [True, False])
def test_exact_match_is_what_greedy_generation_gives(tmp_path, bos):
    tokenizer = make_tokenizer(tmp_path, bos)
    questions = [EvaluationDocument(f"<cy> {n} =", f" {word}") for n, word in enumerate(WORDS)]
    model = overfitted(tokenizer, questions[:6])
    questions.append(EvaluationDocument("<cy> 3 =", " pedwar ac un"))  # right so far, but generation has ended
    questions.append(EvaluationDocument("<cy> 5 =", " chwe"))  # right so far, but generation goes on
    tokenised = tokenise(tokenizer, questions)
    generated = []
    for document in tokenised:
        prompt, answer = document.ids[: document.answer], document.ids[document.answer :]
        eos = tokenizer.eos_token_id
        assert answer[-1] == eos
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=len(answer), eos_token_id=eos, pad_token_id=eos
            )
        generated.append(out[0, len(prompt) :].tolist() == answer)
    assert [s.exact for s in score(model, tokenised, 64, 32, batch_size=4)] == generated
    assert generated == [True] * 6 + [False] * 6


def test_exact_match_of_an_answer_over_several_windows_needs_every_one_of_its_tokens(tokenizer):
    window, stride = 5, 3
    questions = [EvaluationDocument(f"{n} =", f" {word}") for n, word in enumerate(WORDS)]
    model = overfitted(tokenizer, questions[:6])
    tokenised = tokenise(tokenizer, questions)
    expected = []
    for document in tokenised:
        right = []
        for position in range(document.answer, len(document.ids)):
            start = stride * max(0, -((position - window) // -stride))
            with torch.no_grad():
                logits_V = model(torch.tensor([document.ids[start:position]]), use_cache=False).logits[0, -1]
            right.append(logits_V.argmax().item() == document.ids[position])
        expected.append(all(right))
    assert max(len(d.ids) for d in tokenised) > window + stride
    assert [s.exact for s in score(model, tokenised, window, stride, batch_size=4)] == expected
    assert True in expected and False in expected


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_one_wrong_token_anywhere_in_the_answer_makes_it_wrong(wrong):
    model, prompt = make_model(), [0, 17, 60, 33]

    def greedy(ids):
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()

    right, missed = list(prompt), list(prompt)
    for position in range(3):
        right.append(greedy(right))
        missed.append((greedy(missed) + (position == wrong)) % 300)
    pair = [TokenisedDocument(ids, first=1, last=7, n_bytes=7, answer=4) for ids in (right, missed)]
    assert [s.exact for s in score(model, pair, 64, 32, batch_size=2)] == [True, False]


def test_eos_decides_about_the_answer_but_not_about_bits(tokenizer):
    model = make_model()
    question = EvaluationDocument("one =", " hundred")
    with_answer, plain = tokenise(tokenizer, [question, EvaluationDocument("one = hundred")])
    assert with_answer.ids == plain.ids + [tokenizer.eos_token_id]
    assert with_answer.n_bytes == plain.n_bytes == len("one = hundred")
    scores = score(model, [with_answer, plain], 64, 32, batch_size=2)
    assert scores[0].nll == pytest.approx(scores[1].nll, rel=1e-6)
    assert scores[1].exact is None


def test_the_answer_begins_where_the_prompt_ends(tokenizer):
    document = tokenise(tokenizer, [EvaluationDocument("one =", " hundred")])[0]
    assert tokenizer.decode(document.ids[1 : document.answer]) == "one ="
    assert tokenizer.decode(document.ids[document.answer : -1]) == " hundred"


def test_a_token_across_prompt_and_answer_belongs_to_the_answer(tokenizer):
    whole = tokenizer("one hundred", add_special_tokens=False)["input_ids"]
    assert len(whole) < len("one hundred")  # there are merges to cut through
    document = tokenise(tokenizer, [EvaluationDocument("one hund", "red")])[0]
    prompt = tokenizer.decode(document.ids[1 : document.answer])
    assert document.ids[1:-1] == whole
    assert "one hund".startswith(prompt) and prompt != "one hund"


def test_every_part_of_the_model_is_left_in_the_mode_it_had(tokenizer):
    model = make_model().train()
    model.model.norm.eval()
    before = [m.training for m in model.modules()]
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    score(model, tokenise(tokenizer, documents(2)), WINDOW, STRIDE, batch_size=2)
    assert seen and not any(seen)
    assert [m.training for m in model.modules()] == before


def test_a_token_outside_the_vocabulary_is_one_clear_error(tokenizer):
    model = tiny_model(vocab_size=100)
    with pytest.raises(DataError, match="the model has 100: set model.tokenizer"):
        score(model, tokenise(tokenizer, documents()), WINDOW, STRIDE, batch_size=2)
