"""Token stores: what they hold, when they are made again, and that an interruption costs nothing."""

import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import WORDS, Words, write_corpus
from tokenizers import Tokenizer, models

from moect import processes
from moect.data.reading import files, hub
from moect.data.tokens import store_writer, tokenizing
from moect.data.tokens.store import build_store
from moect.data.vocabulary.tokenizer import train_tokenizer
from moect.data_config import DataConfig, FilterConfig, SourceConfig
from moect.errors import DataError

BOS, EOS = WORDS, WORDS + 1


def build(folder, tokenizer=None, path="c.jsonl", workers=1, cache="cache", **options):
    config = DataConfig(root=str(folder), languages={"en": "old"}, max_bad_fraction=options.pop("bad", 0.0))
    source = SourceConfig(path="" if "dataset" in options else path, lang="en", **options)
    return build_store(source, config, tokenizer or Words(), folder / cache, workers)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few documents, so that small corpora have many."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 200)
    monkeypatch.setattr(files, "BLOCK_ROWS", 5)
    monkeypatch.setattr(hub, "BLOCK_ROWS", 5)
    monkeypatch.setattr(hub, "BLOCK_BYTES", 200)
    monkeypatch.setattr(store_writer, "COMMIT_BLOCKS", 3)


def contents(store) -> dict[str, bytes]:
    """All that a store holds, file by file."""
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


@pytest.mark.parametrize(("bos", "eos"), [("<s>", "</s>"), (None, "</s>"), ("<s>", None), (None, None)])
def test_a_store_holds_every_document_with_the_special_tokens_there_are(tmp_path, small_blocks, bos, eos):
    documents = write_corpus(tmp_path / "c.jsonl", 40, seed=1)
    store = build(tmp_path, Words(bos, eos))
    expected = [[BOS] * (bos is not None) + d + [EOS] * (eos is not None) for d in documents]
    got = [store.tokens[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    assert got == expected
    texts = [json.loads(line)["text"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert store.document_bytes.tolist() == [len(t.encode()) for t in texts]
    assert [store.document_id(d) for d in range(40)] == [f"c.jsonl:{n}" for n in range(1, 41)]
    assert (store.n_documents, store.n_tokens, store.lang) == (40, sum(map(len, expected)), "en")
    assert (store.n_bytes, store.max_token) == (sum(store.document_bytes), max(map(max, expected)))
    assert (store.tokens.dtype, store.offsets.dtype, store.document_bytes.dtype) == (np.uint16, np.int64, np.int64)
    assert isinstance(store.tokens, np.memmap)


def test_tokens_of_a_large_vocabulary_have_four_bytes(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 4, seed=1)
    tokenizer = Words()
    tokenizer.inner.add_tokens([f"x{i}" for i in range(2**16)])
    large, small = build(tmp_path, tokenizer, cache="large"), build(tmp_path)
    assert large.tokens.dtype == np.uint32 and np.array_equal(large.tokens, small.tokens)


def test_bytes_are_those_of_utf8_and_long_documents_are_not_truncated(tmp_path):
    (tmp_path / "c.txt").write_text("w1 þrjú 三\n" + "w2 " * 5000 + "\n", encoding="utf-8")
    tokenizer = Words()
    tokenizer.inner.model_max_length = 10
    tokenizer.inner.backend_tokenizer.enable_truncation(10)
    store = build(tmp_path, tokenizer, "c.txt")
    assert store.document_bytes.tolist() == [len("w1 þrjú 三".encode()), 15000]
    assert np.diff(store.offsets).tolist() == [5, 5002]
    assert store.counts["unknown"] == 2  # of 5 + 5002 tokens
    assert store.counts["words"] == 3  # of the first document, which is the sample


def test_a_store_is_written_once_and_rebuilt_when_anything_it_depends_on_changes(tmp_path, tokenized):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    first = build(tmp_path)
    again = build(tmp_path)
    assert tokenized.total() == 10
    assert np.array_equal(first.tokens, again.tokens) and first.fingerprint == again.fingerprint
    assert build(tmp_path, limit=4).n_documents == 4
    assert build(tmp_path, filter={"text": FilterConfig(matches="^w1")}).n_documents < 10
    assert build(tmp_path, Words(eos=None)).n_tokens == first.n_tokens - 10
    write_corpus(tmp_path / "c.jsonl", 10, seed=2)
    assert build(tmp_path).fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 5


def test_a_store_does_not_depend_on_where_the_corpus_lies_or_on_truncation_settings(tmp_path, tokenized):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    (tmp_path / "d.jsonl").write_bytes((tmp_path / "c.jsonl").read_bytes())
    tokenizer = Words()
    build(tmp_path, tokenizer)
    tokenizer.inner.backend_tokenizer.enable_truncation(5)
    build(tmp_path, tokenizer, "d.jsonl")
    assert tokenized.total() == 10


def test_a_file_is_not_read_through_again_to_know_it(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    write_corpus(path, 10, seed=1)
    os.utime(path, (1e9, 1e9))
    first = build(tmp_path)
    text = path.read_bytes()
    path.write_bytes(text.replace(b"w", b"v"))  # what nobody should do: other text with the time of the old
    os.utime(path, (1e9, 1e9))
    assert build(tmp_path).fingerprint == first.fingerprint
    os.utime(path, (2e9, 1.1e9))
    assert build(tmp_path).fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["no meta", "bad meta", "old meta", "no tokens", "short tokens", "empty offsets"])
def test_a_damaged_store_is_rebuilt_with_a_log_line(tmp_path, caplog, tokenized, damage):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    first = build(tmp_path)
    expected, folder = np.array(first.tokens), first.folder
    kind, name = damage.split()
    path = folder / {"meta": "meta.json", "tokens": "tokens.npy", "offsets": "offsets.npy"}[name]
    if kind == "no":
        path.unlink()
    else:
        path.write_bytes({"bad": b"{", "old": b"{}", "short": path.read_bytes()[:-4], "empty": b""}[kind])
    with caplog.at_level(logging.WARNING, "moect.data"):
        store = build(tmp_path)
    assert tokenized.total() == 20 and np.array_equal(store.tokens, expected)
    assert "damaged cache entry" in caplog.text
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {folder.name, "locks"}


def test_of_several_that_want_the_same_store_one_makes_it_and_the_others_wait(tmp_path, tokenized, caplog, monkeypatch):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    inside, told = threading.Event(), threading.Event()
    plain = store_writer.StoreWriter.add

    def slow(*args):
        inside.set()
        assert told.wait(60)  # until the other one has come to the lock
        plain(*args)

    monkeypatch.setattr(store_writer.StoreWriter, "add", slow)
    monkeypatch.setattr(logging.getLogger("moect.data"), "info", lambda text, *args: "waiting" in text and told.set())
    made = []
    threads = [threading.Thread(target=lambda: made.append(build(tmp_path))) for _ in range(2)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert tokenized.total() == 10 and np.array_equal(made[0].tokens, made[1].tokens)


def test_a_build_that_fails_at_the_beginning_leaves_nothing_behind(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xff\n\xff\n")
    with pytest.raises(DataError, match=r"c\.txt:1: not UTF-8"):
        build(tmp_path, path="c.txt")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["locks"]


def test_how_much_badness_is_put_up_with_is_asked_of_a_store_that_is_there_too(tmp_path, tokenized):
    (tmp_path / "c.txt").write_bytes(b"w1 w2\n\xff\n")
    with pytest.raises(DataError, match=r"c\.txt:2: not UTF-8 .*1 of 2 documents"):
        build(tmp_path, path="c.txt")
    store = build(tmp_path, path="c.txt", bad=0.5)
    assert store.n_documents == 1 and store.tally.faults == {"not UTF-8": 1} and tokenized.total() == 1
    with pytest.raises(DataError, match=r"c\.txt:2: not UTF-8 .*1 of 2 documents"):
        build(tmp_path, path="c.txt")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 3, seed=1)
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(DataError, match=r"cache.*cannot be read or written"):
        build(tmp_path)


def test_a_corpus_with_nothing_to_predict_is_refused(tmp_path):
    (tmp_path / "c.txt").write_text("w1\nw2\n")
    with pytest.raises(DataError, match=r"c\.txt: no document has two tokens"):
        build(tmp_path, Words(None, None), "c.txt")


def test_the_header_of_a_token_file_has_room_for_any_length(tmp_path):
    sizes = set()
    for n in (0, 1, 10**6, 10**15):
        with (tmp_path / "header").open("wb") as file:
            store_writer._write_header(file, np.dtype(np.uint16), n)
            sizes.add(file.tell())
    assert len(sizes) == 1


@pytest.mark.parametrize("limit", [1, 7, 39, 60])
def test_a_limit_counts_usable_documents_and_nothing_behind_the_last_one(tmp_path, small_blocks, limit):
    lines = [b"\xff" if n % 3 == 2 else f"w{n} w1".encode() for n in range(90)]
    (tmp_path / "c.txt").write_bytes(b"\n".join(lines))
    store = build(tmp_path, path="c.txt", limit=limit, bad=0.5)
    good = [n for n in range(90) if n % 3 != 2][:limit]
    assert [store.tokens[o + 1] for o in store.offsets[:-1]] == good
    assert store.tally.bad == sum(n % 3 == 2 for n in range(good[-1]))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_store_has_the_same_bytes_however_many_processes_make_it(tmp_path, monkeypatch, small_blocks, workers):
    write_corpus(tmp_path / "c.jsonl", 60, seed=1)
    alone = contents(build(tmp_path))
    monkeypatch.setattr(tokenizing, "ALONE", 1)
    together = build(tmp_path, workers=workers, cache="other", limit=1000)
    alone_limited = build(tmp_path, limit=1000)
    assert contents(together) == contents(alone_limited)
    assert {k: v for k, v in contents(together).items() if k != "meta.json"} == {
        k: v for k, v in alone.items() if k != "meta.json"
    }


@pytest.mark.skipif("MOECT_DATA" not in os.environ, reason="MOECT_DATA names no folder with real text")
def test_real_text_becomes_what_the_tokenizer_makes_of_it(tmp_path, small_blocks, monkeypatch):
    root = Path(os.environ["MOECT_DATA"])
    monkeypatch.setattr(files, "BLOCK_BYTES", 50_000)
    texts = {
        lang: [json.loads(line)["text"] for line in gzip.open(root / f"corpus/web/{lang}.valid.jsonl.gz")]
        for lang in ("zh", "is", "ta")
    }
    tokenizer = train_tokenizer((t for part in texts.values() for t in part[:200]), 1000, tmp_path / "tokenizer")
    for lang, expected in texts.items():
        data = DataConfig(root=str(root), languages={lang: "new"})
        source = SourceConfig(path=f"corpus/web/{lang}.valid.jsonl.gz", lang=lang)
        store = build_store(source, data, tokenizer, tmp_path / "cache", 1)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids = [[bos, *row, eos] for row in tokenizer(expected, add_special_tokens=False)["input_ids"]]
        assert store.tokens.tolist() == [i for row in ids for i in row]
        assert np.diff(store.offsets).tolist() == list(map(len, ids))
        assert tokenizer.decode(store.tokens[: len(ids[0])], skip_special_tokens=True) == expected[0]


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from data_helpers import Words
from test_data_store import build
from moect.data.reading import files
from moect.data.reading import hub
from moect.data.tokens import store_writer
from moect.data.tokens import tokenizing
files.BLOCK_BYTES, hub.BLOCK_BYTES, files.BLOCK_ROWS, hub.BLOCK_ROWS, store_writer.COMMIT_BLOCKS = 200, 200, 5, 5, 3
plain, added = store_writer.StoreWriter.add, 0
def add(*args):
    global added
    plain(*args)
    added += 1
    if added == {blocks}:
        args[0]._tokens.flush()  # more than what is committed has reached the disk
        os.kill(os.getpid(), signal.SIGKILL)
store_writer.StoreWriter.add = add
if __name__ == "__main__":
    build(Path({folder!r}), **{options!r})
"""


def interrupt(folder, blocks, **options):
    """Build a store in another process, which is killed after so many blocks."""
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(folder), blocks=blocks, options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("kind", ["lines", "packed", "rows", "dataset"])
def test_after_a_kill_the_rest_is_tokenized_and_the_store_is_that_of_an_undisturbed_run(
    tmp_path, small_blocks, tokenized, kind
):
    documents = write_corpus(tmp_path / "c.jsonl", 100, seed=1)
    texts = [" ".join(f"w{i}" for i in document) for document in documents]
    options = {"path": "c.jsonl"}
    if kind == "packed":
        (tmp_path / "c.txt.zst").write_bytes(files.zstd().compress("\n".join(texts).encode()))
        options = {"path": "c.txt.zst"}
    elif kind != "lines":
        (tmp_path / "rows").mkdir()
        for part in (0, 1):
            table = pa.table({"text": texts[50 * part :][:50]})
            pq.write_table(table, tmp_path / "rows" / f"{part}.parquet", row_group_size=20)
        options = {"path": "rows"} if kind == "rows" else {"dataset": str(tmp_path / "rows")}
    undisturbed = build(tmp_path, cache="other", **options)
    assert tokenized.total() == 100
    tokenized.clear()
    interrupt(tmp_path, 8, **options)
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    committed = json.loads((unfinished / "journal.jsonl").read_text().splitlines()[-1])["tally"]["good"]
    assert committed > 10
    resumed = build(tmp_path, **options)
    assert contents(resumed) == contents(undisturbed)
    assert tokenized.total() == 100 - committed and set(tokenized.values()) == {1}
    assert not unfinished.exists()


@pytest.mark.parametrize("damage", ["journal cut", "journal gone", "tokens short"])
def test_a_damaged_unfinished_store_goes_back_to_what_is_whole(tmp_path, small_blocks, damage):
    write_corpus(tmp_path / "c.jsonl", 100, seed=1)
    undisturbed = build(tmp_path, cache="other")
    interrupt(tmp_path, 11)
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    journal, tokens = unfinished / "journal.jsonl", unfinished / "tokens.npy"
    if damage == "journal cut":
        journal.write_bytes(journal.read_bytes()[:-30])
    elif damage == "journal gone":
        journal.unlink()
    else:
        first = json.loads(journal.read_text().splitlines()[0])
        os.truncate(tokens, 128 + 2 * first["n_tokens"] + 5)  # as much as the first commit, and some of the second
    assert contents(build(tmp_path)) == contents(undisturbed)


def test_a_stream_goes_on_with_what_was_fetched_whole_and_the_other_way_round(tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "fetched"))
    documents = write_corpus(tmp_path / "c.jsonl", 100, seed=1)
    (tmp_path / "rows").mkdir()
    table = pa.table({"text": [" ".join(f"w{i}" for i in document) for document in documents]})
    pq.write_table(table, tmp_path / "rows" / "0.parquet", row_group_size=20)
    undisturbed = build(tmp_path, cache="other", dataset=str(tmp_path / "rows"))
    for streaming in (False, True):
        options = {"dataset": str(tmp_path / "rows"), "cache": f"cache-{streaming}"}
        interrupt(tmp_path, 8, streaming=streaming, **options)
        assert contents(build(tmp_path, streaming=not streaming, **options)) == contents(undisturbed)


def test_what_a_killed_maker_left_in_a_finished_store_is_removed(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    store = build(tmp_path)
    before = contents(store)
    (store.folder / "documents.bin").write_bytes(b"x" * 240)
    (store.folder / "journal.jsonl").write_bytes(b"{}")
    assert contents(build(tmp_path)) == before


def test_going_back_never_leaves_a_journal_that_is_shorter_than_what_is_whole(tmp_path, small_blocks, monkeypatch):
    write_corpus(tmp_path / "c.jsonl", 100, seed=1)
    interrupt(tmp_path, 11)
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    journal = unfinished / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"half a li')
    plain, lengths = os.truncate, []

    def watched(path, size):
        plain(path, size)
        lengths.append(journal.stat().st_size)

    monkeypatch.setattr(os, "truncate", watched)
    build(tmp_path)
    assert lengths and set(lengths) == {len(whole)}


def test_long_rows_end_a_block_early_and_can_be_gone_on_from(tmp_path):
    texts = [f"{i} " + "w1 " * (100_000 if i % 3 == 0 else 10) for i in range(20)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    blocks = list(files.file_blocks([tmp_path / "a.parquet"], ["text"], [], files.Place()))
    assert max(sum(map(files.row_bytes, block.records)) for block in blocks) < 2 * files.BLOCK_BYTES and len(blocks) > 1
    assert [r["text"].decode() for block in blocks for r in block.records] == texts
    for number, block in enumerate(blocks):
        assert list(files.file_blocks([tmp_path / "a.parquet"], ["text"], [], block.after)) == blocks[number + 1 :]


def test_unknown_tokens_are_found_by_number_too_and_a_byte_that_is_a_character_is_no_piece():
    tokens = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0)]
    unigram = Tokenizer(models.Unigram(tokens, unk_id=0))
    assert tokenizing._token_kinds(unigram, json.loads(unigram.to_str())["model"]).tolist() == [1, 0, 0]
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "<0xC3>": 2, "a": 3}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    assert tokenizing._token_kinds(bpe, json.loads(bpe.to_str())["model"]).tolist() == [1, 0, 2, 0]


def test_a_killed_worker_is_one_line_and_the_same_command_goes_on(tmp_path, small_blocks, monkeypatch):
    write_corpus(tmp_path / "c.jsonl", 100, seed=1)
    undisturbed = build(tmp_path, cache="other")
    monkeypatch.setattr(tokenizing, "ALONE", 4)
    monkeypatch.setattr(processes, "_call", _die)
    with pytest.raises(DataError, match="a tokenizing process was killed, .*; the same command goes on"):
        build(tmp_path, workers=2)
    monkeypatch.undo()
    monkeypatch.setattr(files, "BLOCK_BYTES", 200)
    assert (store := build(tmp_path)).n_documents == 100
    assert np.array_equal(store.tokens, undisturbed.tokens)


def _die(block):
    os.kill(os.getpid(), signal.SIGKILL)


TWICE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_data_store import build
from moect.data.reading import files
from moect.data.tokens import store_writer, tokenizing
files.BLOCK_BYTES, tokenizing.ALONE = 200, 1
plain, added = store_writer.StoreWriter.add, 0
def add(self, *args):
    global added
    plain(self, *args)
    added += 1
    if added == 8:  # the workers are there, and have work
        print("now", flush=True)
    if added >= 8:  # and are not done before the interrupts come
        time.sleep(0.01)
store_writer.StoreWriter.add = add
build(Path({folder!r}), workers=2)
"""


def test_interrupting_twice_ends_at_once_and_tells_of_nothing_but_that(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 20_000, seed=1)
    code = TWICE.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "now\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    err = "it goes on"
    for _ in range(18):  # one that comes before the first was noticed is one with it, and then a third is the second
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, err = process.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode != 0 and err.count("Traceback") <= 2 and "spawn_main" not in err, err


ORPHANS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_data_store import build
from moect.data.reading import files
from moect.data.tokens import store_writer
from moect.data.tokens import tokenizing
files.BLOCK_BYTES, tokenizing.ALONE = 200, 1
plain = store_writer.StoreWriter.add
def add(self, *args):
    plain(self, *args)
    children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
    if len(children) > 2:  # the workers, and multiprocessing's own
        print(*children, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
store_writer.StoreWriter.add = add
build(Path({folder!r}), workers=2)  # behind no `if __name__ == "__main__"`: the processes do not run this file
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 400, seed=1)
    script = tmp_path / "main.py"
    script.write_text(ORPHANS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    pids = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and len(pids) > 2, done.stderr
    for _ in range(600):
        if not any(map(_lives, pids)):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"of {pids} {list(filter(_lives, pids))} live on without their parent")


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
