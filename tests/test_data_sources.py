"""Reading documents: what is read, what is skipped and counted, and what stops with a message."""

import gzip
import json
import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moect.data.reading import files
from moect.data.reading.evaluation import load_evaluation
from moect.data.reading.files import BLOCK_BYTES
from moect.data.reading.records import Document
from moect.data.reading.sources import read_documents
from moect.data_config import DataConfig, EvaluationConfig, FilterConfig, SourceConfig
from moect.errors import DataError

zstd = files.zstd()


def source(path, **options):
    return SourceConfig(path=path, lang="en", **options)


def read(folder, path, max_bad_fraction=0.0, **options):
    return list(read_documents(source(path, **options), str(folder), max_bad_fraction))


def write(path, *lines):
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    pack = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))


def write_rows(path, **columns):
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_give_the_text_field_and_the_whole_object(tmp_path, name):
    write(tmp_path / name, {"body": "one", "id": 7}, b"", {"body": " two\n"})
    expected = [Document("one", {"body": "one", "id": 7}, "7"), Document(" two\n", {"body": " two\n"}, f"{name}:3")]
    assert read(tmp_path, name, text_field="body") == expected


def test_rows_of_parquet_give_the_columns_that_are_asked_for(tmp_path):
    write_rows(tmp_path / "a.parquet", text=["one", "tvö þrjú"], id=[7, 8], score=[0.5, 0.9], other=["x", "y"])
    expected = [
        Document("one", {"text": "one", "id": 7}, "7"),
        Document("tvö þrjú", {"text": "tvö þrjú", "id": 8}, "8"),
    ]
    assert read(tmp_path, "a.parquet") == expected
    best = read(tmp_path, "a.parquet", filter={"score": FilterConfig(min=0.6)}, id_field="other")
    assert best == [Document("tvö þrjú", {"text": "tvö þrjú", "other": "y", "score": 0.9}, "y")]


def test_a_parquet_file_without_the_column_or_with_damage_is_refused(tmp_path):
    write_rows(tmp_path / "a.parquet", body=["one"])
    with pytest.raises(DataError, match=r"a\.parquet: has no column `text`, but `body`; name the right one"):
        read(tmp_path, "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.parquet: damaged Parquet data after row 0 \(.*\); fetch it again"):
        read(tmp_path, "a.parquet")


def test_text_of_parquet_that_is_not_utf8_is_a_bad_document(tmp_path, caplog):
    latin1 = pa.array([b"one", b"\xe9t\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": latin1}), tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING, "moect.data"):
        assert [d.text for d in read(tmp_path, "a.parquet", max_bad_fraction=0.5)] == ["one"]
    assert "1 `text` is not UTF-8; " in caplog.text and "a.parquet, row 2" in caplog.text


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
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


BAD = [{"id": 1}, {"text": 3}, {"text": " "}, {"text": None}, {"text": "\ud800"}, {"text": ""}]


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


MALFORMED = [
    (b'{"text": "one"', r"malformed JSON \(.*column 15\)"),
    (b'["text"]', r"not a JSON object but a list"),
    (b"[" * 100_000, r"JSON beyond what can be read"),
    (b'{"n": ' + b"9" * 5000 + b"}", r"JSON beyond what can be read"),
    (b'{"text": "\xe9t\xe9"}', r"not UTF-8 \(byte 10\)"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_a_malformed_line_is_a_bad_document_named_by_file_and_line(tmp_path, caplog, line, message):
    write(tmp_path / "a.jsonl", {"text": "one"}, b"", line, {"text": "two"})
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {message}.*; 1 of 3 documents are unusable") as caught:
        read(tmp_path, "a.jsonl", max_bad_fraction=0.3)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "moect.data"):
        assert [d.text for d in read(tmp_path, "a.jsonl", max_bad_fraction=0.4)] == ["one", "two"]
    assert re.search(rf"skipped 1 of 3 documents .*a\.jsonl:3: {message}", caplog.text) and len(caplog.messages) == 1


def test_bad_documents_are_counted_by_what_is_wrong_with_them(tmp_path, caplog):
    lines = [{"text": "one"}, {"text": 3}, {"text": " "}, b"{", b"{", {"text": None}, {"id": 1}]
    write(tmp_path / "a.jsonl", *lines)
    with caplog.at_level(logging.WARNING, "moect.data"):
        read(tmp_path, "a.jsonl", max_bad_fraction=1.0)
    for count in ("2 malformed JSON", "2 `text` is not a string", "1 `text` is empty", "1 no `text`", "6 of 7"):
        assert count in caplog.text


def test_a_corpus_that_is_hopeless_stops_long_before_its_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\n" * 1500 + b"x" * (2 * BLOCK_BYTES) + b"\n" + b"\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:1: not UTF-8 .*; 1500 of 1501 documents are unusable"):
        read(tmp_path, "a.txt", max_bad_fraction=0.01)


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ({"n": {"min": 2}}, "bc"),
        ({"n": {"max": 2.5, "min": 1.5}}, "b"),
        ({"tag": {"equals": "x"}}, "ac"),
        ({"tag": {"among": ["y", "z"]}}, "bd"),
        ({"text": {"matches": "[ab]$"}}, "ab"),
        ({"text": {"min_characters": 2}}, ""),
        ({"text": {"max_characters": 1}, "n": {"max": 1}}, "a"),
    ],
)
def test_a_filter_takes_the_documents_whose_fields_are_as_it_says(tmp_path, caplog, conditions, kept):
    values = [("a", 1, "x"), ("b", 2, "y"), ("c", 3, "x")]
    documents = [{"text": text, "n": n, "tag": tag} for text, n, tag in values] + [{"text": "d", "tag": "z"}]
    write(tmp_path / "a.jsonl", *documents)
    conditions = {name: FilterConfig(**values) for name, values in conditions.items()}
    if not kept:
        with pytest.raises(DataError, match=r"a\.jsonl: the corpus is empty.*`filter` left out 4 of 4"):
            read(tmp_path, "a.jsonl", filter=conditions)
        return
    with caplog.at_level(logging.INFO, "moect.data"):
        assert "".join(d.text for d in read(tmp_path, "a.jsonl", filter=conditions)) == kept
    assert f"left out {4 - len(kept)} of 4 documents by `filter`" in caplog.text
    limited = read(tmp_path, "a.jsonl", filter=conditions, limit=1)
    assert [d.text for d in limited] == [kept[0]]  # the first that passes


def test_a_document_is_called_by_its_own_name_or_by_file_and_line(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "one", "name": "x"}, {"text": "two", "id": 3}, {"text": "three", "id": None})
    assert [d.id for d in read(tmp_path, "a.jsonl")] == ["a.jsonl:1", "3", "a.jsonl:3"]
    assert [d.id for d in read(tmp_path, "a.jsonl", id_field="name", max_bad_fraction=0.7)] == ["x"]


def test_latin1_plain_text_is_refused_with_its_line(tmp_path):
    write(tmp_path / "a.txt", b"one", b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8 \(byte 0\)"):
        read(tmp_path, "a.txt")


def test_a_folder_gives_all_its_files_of_known_kinds_and_says_what_it_leaves(tmp_path, caplog):
    (tmp_path / "web" / "deep").mkdir(parents=True)
    write(tmp_path / "web" / "b.txt", b"two")
    write(tmp_path / "web" / "a.jsonl.zst", {"text": "one"})
    write_rows(tmp_path / "web" / "deep" / "c.parquet", text=["three"])
    (tmp_path / "web" / "README.md").write_text("about")
    with caplog.at_level(logging.WARNING, "moect.data"):
        assert [d.text for d in read(tmp_path, "web")] == ["one", "two", "three"]
    assert "1 of 4 files are of other kinds and are not read" in caplog.text
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: the folder holds no file of a kind that can be read"):
        read(tmp_path, "none")


def test_linked_folders_are_read_and_links_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "b.txt", b"two")
    write(tmp_path / "web" / "a.txt", b"one")
    (tmp_path / "web" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "web")
    (tmp_path / "web" / "again").symlink_to(tmp_path / "elsewhere")
    assert [d.text for d in read(tmp_path, "web")] == ["one", "two"]
    (tmp_path / "web" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"gone\.txt: is a link to a file that is not there"):
        read(tmp_path, "web")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "txt.zst"])
def test_a_file_of_no_bytes_among_others_holds_no_document(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_bytes(b"")
    write(tmp_path / "b.txt", b"one")
    assert [d.text for d in read(tmp_path, "*")] == ["one"]


def test_a_root_may_hold_characters_of_globs(tmp_path):
    (tmp_path / "a[1]").mkdir()
    write(tmp_path / "a[1]" / "x.txt", b"one")
    assert [d.text for d in read(tmp_path / "a[1]", "*.txt")] == ["one"]


def test_names_that_cannot_be_text_do_not_matter_unless_they_are_asked_for(tmp_path):
    write_rows(tmp_path / "a.parquet", text=["one", "two"], id=[b"\xff\x00", b"k"])
    assert [d.id for d in read(tmp_path, "a.parquet")] == ["a.parquet:1", "k"]
    with pytest.raises(DataError, match="`id` is not UTF-8"):
        read(tmp_path, "a.parquet", id_field="id")
    write(tmp_path / "a.jsonl", {"text": "one", "id": "\ud800"})
    assert [d.id.encode() for d in read(tmp_path, "a.jsonl")] == [b"?"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.parquet"])
def test_reading_goes_on_from_any_block_on_as_if_it_had_never_stopped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "BLOCK_BYTES", 300)
    monkeypatch.setattr(files, "BLOCK_ROWS", 7)
    texts = [f"{i} þrjú {'x' * (i % 40)}" for i in range(100)]
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": texts}), path, row_group_size=30)
        else:
            write(path, *[t.encode() if "txt" in name else {"text": t} for t in texts])
    paths = sorted(tmp_path.rglob(name))
    blocks = list(files.file_blocks(paths, ["text"], ["id"], files.Place()))
    assert len(blocks) > 10
    assert [b.bytes_read for b in blocks] == sorted(b.bytes_read for b in blocks)
    assert blocks[-1].bytes_read == sum(path.stat().st_size for path in paths)
    for number, block in enumerate(blocks):
        rest = list(files.file_blocks(paths, ["text"], ["id"], block.after))
        assert rest == blocks[number + 1 :]


def test_a_missing_file_a_folder_and_an_unknown_kind_are_refused(tmp_path):
    write(tmp_path / "a.csv", b"one")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match=r"b\.txt: no file matches; check .*data\.root"):
        read(tmp_path, "b.txt")
    with pytest.raises(DataError, match=r"\*\.txt: no file matches"):
        read(tmp_path, "*.txt")
    with pytest.raises(DataError, match=r"s\*: no file matches"):
        read(tmp_path, "s*")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file; .*\.jsonl\.gz"):
        read(tmp_path, "a.*")


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_a_damaged_compressed_file_is_refused_with_its_place(tmp_path, damage, packing):
    path = tmp_path / f"a.jsonl.{packing}"
    write(path, *[{"text": f"document {i * i}"} for i in range(2000)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    else:
        data = b'{"text": "one"}\n'
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.jsonl\.{packing}:\d+: (damaged {packing} data|malformed JSON|not UTF-8)"):
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
