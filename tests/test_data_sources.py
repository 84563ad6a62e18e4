"""Reading documents: what is read, what is skipped and counted, and what stops with a message."""

import gzip
import json
import logging

import pytest

from moect.data.evaluation import load_evaluation
from moect.data.sources import Document, read_documents
from moect.data_config import DataConfig, EvaluationConfig, SourceConfig
from moect.errors import DataError


def source(path, **options):
    return SourceConfig(path=path, lang="en", **options)


def read(folder, path, max_bad_fraction=0.0, **options):
    return list(read_documents(source(path, **options), str(folder), max_bad_fraction))


def write(path, *lines):
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_give_the_text_field_and_the_whole_object(tmp_path, name):
    write(tmp_path / name, {"body": "one", "id": 7}, b"", {"body": " two\n"})
    expected = [Document("one", {"body": "one", "id": 7}), Document(" two\n", {"body": " two\n"})]
    assert read(tmp_path, name, text_field="body") == expected


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_is_a_document_a_line(tmp_path, name):
    write(tmp_path / name, b"\xef\xbb\xbfone\r", b" ", "tvö þrjú".encode(), b"")
    assert [d.text for d in read(tmp_path, name)] == ["one", "tvö þrjú"]


def test_a_glob_is_read_in_the_order_of_file_names_up_to_the_limit(tmp_path):
    for name in ("b", "c", "a"):
        write(tmp_path / f"{name}.txt", name.encode() + b"1", name.encode() + b"2")
    assert [d.text for d in read(tmp_path, "?.txt")] == ["a1", "a2", "b1", "b2", "c1", "c2"]
    assert [d.text for d in read(tmp_path, "?.txt", limit=3)] == ["a1", "a2", "b1"]


def test_a_file_name_with_glob_characters_is_found(tmp_path):
    write(tmp_path / "a[1].txt", b"one")
    assert [d.text for d in read(tmp_path, "a[1].txt")] == ["one"]


def test_an_absolute_path_does_not_start_from_the_root(tmp_path):
    write(tmp_path / "a.txt", b"one")
    assert len(read("/nowhere", str(tmp_path / "a.txt"))) == 1


BAD = [{"id": 1}, {"text": 3}, {"text": " "}, {"text": None}, {"text": "\ud800"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_an_unusable_document_is_skipped_counted_and_logged_once(tmp_path, caplog, bad):
    write(tmp_path / "a.jsonl", {"text": "one"}, bad, bad, {"text": "two"})
    with caplog.at_level(logging.WARNING, "moect.data"):
        assert [d.text for d in read(tmp_path, "a.jsonl", max_bad_fraction=0.5)] == ["one", "two"]
    assert len(caplog.messages) == 1
    assert "skipped 2 of 4 documents" in caplog.text and "a.jsonl:2" in caplog.text


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_too_many_unusable_documents_stop_with_the_first_and_the_count(tmp_path, bad):
    write(tmp_path / "a.jsonl", {"text": "one"}, bad, bad, {"text": "two"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*`text`.*; 2 of 4 documents .*max_bad_fraction"):
        read(tmp_path, "a.jsonl", max_bad_fraction=0.49)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "one"', r"a\.jsonl:3: malformed JSON \(.*column 15\); mend"),
        (b'["text"]', r"a\.jsonl:3: holds a JSON list, not an object; write"),
        (b"[" * 100_000, r"a\.jsonl:3: JSON beyond what can be read"),
        (b'{"n": ' + b"9" * 5000 + b"}", r"a\.jsonl:3: JSON beyond what can be read"),
        (b'{"text": "\xe9t\xe9"}', r"a\.jsonl:3: byte 10 is not UTF-8; save"),
    ],
)
def test_a_line_that_shows_a_damaged_file_always_stops_with_its_number(tmp_path, line, message):
    write(tmp_path / "a.jsonl", {"text": "one"}, b"", line, {"text": "two"})
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, "a.jsonl", max_bad_fraction=1.0)
    assert "\n" not in str(caught.value)


def test_latin1_plain_text_is_refused_with_its_line(tmp_path):
    write(tmp_path / "a.txt", b"one", b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"a\.txt:2: byte 0 is not UTF-8"):
        read(tmp_path, "a.txt")


def test_a_missing_file_a_folder_and_an_unknown_kind_are_refused(tmp_path):
    write(tmp_path / "a.csv", b"one")
    (tmp_path / "sub.jsonl").mkdir()
    with pytest.raises(DataError, match=r"b\.txt: no file matches; check .*data\.root"):
        read(tmp_path, "b.txt")
    with pytest.raises(DataError, match=r"\*\.txt: no file matches"):
        read(tmp_path, "*.txt")
    with pytest.raises(DataError, match=r"sub\.jsonl: is a folder; name its files"):
        read(tmp_path, "sub.jsonl")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file; .*\.jsonl\.gz"):
        read(tmp_path, "a.*")


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_a_damaged_gzip_file_is_refused_with_its_place(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    write(path, *[{"text": f"document {i * i}"} for i in range(2000)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = b'{"text": "one"}\n'
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: (damaged gzip data|malformed JSON|byte \d+ is not UTF-8)"):
        read(tmp_path, path.name)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", b"one")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Permission denied\); check"):
        read(tmp_path, "a.txt")


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": ""}\n'])
def test_an_empty_corpus_is_refused(tmp_path, content):
    write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError, match=r"a\.jsonl: the corpus is empty"):
        read(tmp_path, "a.jsonl", max_bad_fraction=1.0)


def evaluation(folder, **options):
    entry = EvaluationConfig(path="e.jsonl", lang="cy", domain="numbers", **options)
    return DataConfig(root=str(folder), languages={"cy": "new"}, evaluation=[entry], max_bad_fraction=0.5)


def test_evaluation_keeps_prompts_and_answers_apart_and_joins_them_for_scoring(tmp_path):
    write(tmp_path / "e.jsonl", {"text": "2 = ", "answer": "dau"}, {"text": "3 = ", "answer": " "})
    (text,) = load_evaluation(evaluation(tmp_path, answer_field="answer"))
    assert (text.lang, text.role, text.domain) == ("cy", "new", "numbers")
    assert [(d.text, d.answer, d.full_text) for d in text.documents] == [("2 = ", "dau", "2 = dau")]


def test_evaluation_without_answers_is_plain_text(tmp_path):
    write(tmp_path / "e.jsonl", {"text": "2 = ", "answer": "dau"})
    (text,) = load_evaluation(evaluation(tmp_path))
    assert [(d.text, d.answer, d.full_text) for d in text.documents] == [("2 = ", None, "2 = ")]


def test_evaluation_stops_when_answers_are_missing(tmp_path):
    write(tmp_path / "e.jsonl", {"text": "2 = "}, {"text": "3 = ", "answer": 3})
    with pytest.raises(DataError, match=r"e\.jsonl:1: no `answer`; 2 of 2"):
        load_evaluation(evaluation(tmp_path, answer_field="answer"))
