"""The embedded corpus: who sees which number, and whether the words are right."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from moect.data.reading.evaluation import load_evaluation
from moect.data.reading.numbers import LANGUAGES, number_in_words, split_numbers, write_numbers
from moect.data.reading.sources import read_documents
from moect.data_config import DataConfig, EvaluationConfig, SourceConfig
from moect.errors import DataError

SMALL = {"train_numbers": 40, "test_numbers": 10, "greatest": 99}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(documents: list[dict]) -> list[int]:
    return [int(document["text"].split()[1]) for document in documents]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("data") / "numbers"
    return folder, write_numbers(folder)


def test_documents_spell_numbers_as_their_languages_do(corpus):
    folder, _ = corpus
    written = {
        document["text"] + document.get("answer", "")
        for part in ("train", "test")
        for lang in LANGUAGES
        for document in lines(folder / part / f"{lang}.jsonl")
    }
    assert len(written) == 8 * 1000
    assert {
        "<en> 219 = two hundred and nineteen",
        "<de> 365 = dreihundertfünfundsechzig",
        "<fr> 80 = quatre-vingts",
        "<es> 500 = quinientos",
        "<cy> 219 = dau gant a phedwar ar bymtheg",
        "<is> 57 = fimmtíu og sjö",
        "<te> 21 = ఇరవై ఒకటి",
        "<tg> 999 = нӯҳсаду наваду нӯҳ",
    } <= written


def test_train_and_test_numbers_are_disjoint_and_the_same_in_every_language(corpus):
    folder, manifest = corpus
    for lang in LANGUAGES:
        train, test = (numbers(lines(folder / part / f"{lang}.jsonl")) for part in ("train", "test"))
        assert (train, test) == split_numbers(seed=0, train_numbers=800, test_numbers=200, greatest=999)
        assert sorted(train + test) == list(range(1000))
        assert manifest["languages"][lang]["skipped"] == 0


def test_the_split_is_a_function_of_the_seed_and_nothing_else_that_changes():
    assert split_numbers(0, 800, 200, 999)[0][:6] == [89, 926, 391, 131, 318, 331]
    assert split_numbers(0, 800, 200, 999)[1][:6] == [61, 798, 793, 988, 341, 629]
    assert split_numbers(1, 800, 200, 999)[0][:6] == [723, 388, 65, 832, 307, 743]
    assert split_numbers(0, 800, 200, 999)[1] == split_numbers(0, 10, 200, 999)[1]


def test_the_trace_is_a_small_part_of_the_training_text_of_new_languages_only(corpus):
    folder, manifest = corpus
    assert sorted(path.stem for path in (folder / "trace").iterdir()) == ["cy", "is", "te", "tg"]
    total = 0
    for lang in ("cy", "is", "te", "tg"):
        trace, train = (lines(folder / part / f"{lang}.jsonl") for part in ("trace", "train"))
        assert len(set(numbers(trace))) == len(trace) == manifest["languages"][lang]["trace"]
        assert all(document in train for document in trace)
        total += len(trace)
    assert total == round(0.02 * 4 * 800)


def test_the_trace_shows_nearly_every_letter_of_a_language(corpus):
    folder, _ = corpus
    for lang in ("cy", "is", "te", "tg"):
        letters = {part: set((folder / part / f"{lang}.jsonl").read_text("utf-8")) for part in ("trace", "train")}
        assert len(letters["train"] - letters["trace"]) <= 1


def test_the_corpus_is_read_by_the_ordinary_readers(corpus):
    folder, _ = corpus
    [text] = load_evaluation(
        DataConfig(
            root=str(folder),
            languages={"cy": "new"},
            evaluation=[EvaluationConfig(path="test/cy.jsonl", lang="cy", answer_field="answer")],
        )
    )
    assert len(text.documents) == 200
    assert text.documents[0].full_text == f"<cy> 61 = {number_in_words(61, 'cy')}"
    assert len(list(read_documents(SourceConfig(path="train/cy.jsonl", lang="cy"), str(folder), 0.0))) == 800


def test_words_have_single_spaces_and_composed_letters():
    assert number_in_words(150, "te") == number_in_words(150, "te").strip()  # num2words leaves a space at its end
    assert number_in_words(83, "te").encode() == "ఎనభై మూడు".encode()


def test_numbers_without_words_are_left_out_of_that_language_and_counted(tmp_path, monkeypatch, caplog):
    import num2words

    real = num2words.num2words

    def patchy(number: int, lang: str) -> str | None:
        if lang == "cy" and number % 10 == 3:
            raise IndexError(number)
        if lang == "cy" and number % 10 == 4:
            return None
        if lang == "cy" and number % 10 == 5:
            return " "
        if lang == "cy" and number % 10 == 6:
            return str(number)
        return real(number, lang=lang)

    monkeypatch.setattr(num2words, "num2words", patchy)
    with caplog.at_level(logging.WARNING, logger="moect.data"):
        manifest = write_numbers(
            tmp_path / "n", {"en": "old", "cy": "new"}, train_numbers=80, test_numbers=20, greatest=99
        )
    kept = [n for part in ("train", "test") for n in numbers(lines(tmp_path / "n" / part / "cy.jsonl"))]
    assert sorted(kept) == [n for n in range(100) if n % 10 not in (3, 4, 5, 6)]
    assert manifest["languages"]["cy"]["skipped"] == 40
    assert manifest["languages"]["en"] == {"role": "old", "train": 80, "test": 20, "skipped": 0}
    assert caplog.messages == ["numbers: skipped 40 of 100 in 'cy': no words"]


def test_a_language_without_any_words_is_refused(tmp_path, monkeypatch):
    import num2words

    monkeypatch.setattr(num2words, "num2words", lambda number, lang: None)
    with pytest.raises(DataError, match="'cy': num2words has no words for the numbers 0 to 99; leave it out"):
        write_numbers(tmp_path / "n", {"cy": "new"}, **SMALL)


def test_writing_the_same_corpus_again_touches_nothing(tmp_path):
    first = write_numbers(tmp_path / "n", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "n").rglob("*")}
    assert write_numbers(tmp_path / "n", **SMALL) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "n").rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


def test_a_folder_that_holds_anything_else_is_not_overwritten(tmp_path):
    write_numbers(tmp_path / "n", **SMALL)
    before = {path: path.read_bytes() for path in (tmp_path / "n").rglob("*.json*")}
    with pytest.raises(DataError, match="holds something other than this corpus; remove it or choose another"):
        write_numbers(tmp_path / "n", seed=1, **SMALL)
    assert {path: path.read_bytes() for path in (tmp_path / "n").rglob("*.json*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": {"xx": "old"}}, "language 'xx': num2words does not have it; it has am, ar,"),
        ({"train_numbers": 91}, "are more than the 100 from 0 to 99: ask for fewer"),
        ({"test_numbers": 0}, "both must be at least 1"),
        ({"trace_share": -0.1}, "trace_share is -0.1: it is a share"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line_before_writing(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        write_numbers(tmp_path / "n", **{**SMALL, **change})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written .*; choose another folder"):
        write_numbers(tmp_path / "file" / "n", **SMALL)
