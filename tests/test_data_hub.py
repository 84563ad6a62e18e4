"""Corpora by hub name: folders laid out like datasets, a hub on this machine, and every way in which it can fail."""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import Words, run_config, write_corpus
from hub_server import DATASET, serving
from huggingface_hub import HfApi, errors
from huggingface_hub.utils import httpx
from small_runs import DOCUMENTS, REPOSITORY, WORDS, events, launch

from moect.data.batches.loader import Loader, planned_sources
from moect.data.reading import evaluation, hub, progress
from moect.data.reading.evaluation import EvaluationDocument, load_evaluation
from moect.data.reading.files import Place
from moect.data.reading.hub import identity
from moect.data.reading.sources import read_documents
from moect.data.tokens.store import build_store, find_store
from moect.data_config import DataConfig, EvaluationConfig, SourceConfig
from moect.errors import DataError
from moect.train.checkpoints.same_run import check_same_run

CARD = """---
configs:
- config_name: a
  data_files:
  - {split: train, path: a/train-*}
  - {split: test, path: a/test-*}
- config_name: b
  data_files: b/*
---
Two subsets.
"""
COMMIT, LATER = "a" * 40, "c" * 40
A_TRAIN = ["w1 w2", "w3", "w4 w5 w6", "w7 w8"]


def parquet(path, texts, column="text"):
    """A file of texts and of a column that nobody asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path)


def lay_out(folder):
    """A dataset of two subsets; the first has two files of `train`, and a `test`."""
    parquet(folder / "a" / "train-0.parquet", A_TRAIN[:2])
    parquet(folder / "a" / "train-1.parquet", A_TRAIN[2:])
    parquet(folder / "a" / "test-0.parquet", ["w9 w10"])
    parquet(folder / "b" / "all.parquet", ["w11 w12", "w13"])
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def folder(tmp_path):
    lay_out(tmp_path / "words")
    return tmp_path


def source(dataset="words", **options):
    return SourceConfig(dataset=dataset, lang="en", **options)


def read(folder, max_bad_fraction=0.0, cache=None, **options):
    return [d.text for d in read_documents(source(**options), str(folder), max_bad_fraction, cache)]


def refusal(call, *arguments, **options) -> str:
    """The one line of a DataError."""
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_dataset_gives_the_documents_of_its_subset_and_split_in_the_order_of_its_files(folder):
    assert read(folder, subset="a") == A_TRAIN
    assert read(folder, subset="a", limit=3) == A_TRAIN[:3]
    assert read(folder, subset="a", split="test") == ["w9 w10"]
    assert read("/nowhere", dataset=str(folder / "words"), subset="b") == ["w11 w12", "w13"]


def test_a_dataset_that_is_fetched_whole_gives_the_same_blocks_from_any_place_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BLOCK_ROWS", 2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "fetched"))
    for subset in ("a", "b"):
        whole, streamed = (
            list(hub.dataset_blocks(source(subset=subset, streaming=s), str(folder), None, ["text"], ["id"], Place()))
            for s in (False, True)
        )
        assert [(b.first, b.records) for b in whole] == [(b.first, b.records) for b in streamed] and whole
        for number, block in enumerate(whole):
            of = source(subset=subset, streaming=False)
            rest = hub.dataset_blocks(of, str(folder), None, ["text"], ["id"], block.after)
            assert [b.records for b in rest] == [b.records for b in whole[number + 1 :]]


def test_a_folder_of_json_lines_without_a_card_is_a_dataset_too(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.jsonl").write_text('{"body": "w1"}\n{"body": "w2", "id": 3}\n')
    assert read(tmp_path, text_field="body") == ["w1", "w2"]


def test_the_files_of_one_subset_without_the_card_are_a_dataset_with_its_splits(tmp_path):
    parquet(tmp_path / "data" / "swh_Latn" / "train" / "0.parquet", ["w1"])
    parquet(tmp_path / "data" / "swh_Latn" / "test" / "0.parquet", ["w2"])
    assert read(tmp_path, dataset="data/swh_Latn", split="test") == ["w2"]


def test_unusable_documents_of_a_dataset_are_skipped_and_counted_as_those_of_files(folder, caplog):
    parquet(folder / "words" / "b" / "all.parquet", ["w1", None, " ", "w2"])
    with caplog.at_level(logging.WARNING, "moect.data"):
        assert read(folder, 0.5, subset="b") == ["w1", "w2"]
    (line,) = [m for m in caplog.messages if "skipped" in m]
    kinds = "1 `text` is not a string, 1 `text` is empty"
    assert line == f"words/b: skipped 2 of 4 documents as unusable: {kinds}; words/b, row 2: `text` is not a string"
    assert "2 of 4 documents are unusable" in refusal(read, folder, 0.49, subset="b")
    parquet(folder / "words" / "b" / "all.parquet", [" "])
    assert refusal(read, folder, 1.0, subset="b").startswith("words/b: the corpus is empty")


def damage(folder):
    (folder / "words" / "b" / "all.parquet").write_bytes(b"PAR1 and no more")


def empty(folder):
    shutil.rmtree(folder / "words")
    (folder / "words").mkdir()


@pytest.mark.parametrize(
    ("options", "spoil", "message"),
    [
        ({"subset": "bb"}, None, r"words/bb: there is no subset 'bb', but 'b'; check `subset`"),
        ({}, None, r"words: has several subsets, 'a', 'b'; choose one with `subset`"),
        ({"subset": "a", "split": "tset"}, None, r"words/a: there is no split 'tset', but 'test'; check `split`"),
        ({"subset": "a", "split": "train[:2]"}, None, r"words/a: there is no split 'train\[:2\]', but 'train'; check"),
        ({"subset": "a", "text_field": "txt"}, None, r"words/a: has no column `txt`, but 'text'; set `text_field`"),
        ({"subset": "a", "revision": "v1"}, None, r"words: is a folder, which has no `revision`; remove"),
        ({"dataset": "./wrods"}, None, r"wrods: there is no such folder; check `dataset`, `data\.root`"),
        ({"dataset": "words/README.md"}, None, r"README\.md: is a file, no dataset; give it as `path`"),
        ({"subset": "b"}, damage, r"words/b: cannot be read, .*; check `dataset` and `subset`, or mend the files"),
        ({}, empty, r"words: cannot be read, .*doesn't contain any data files.*; check"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_dataset_folder_that_cannot_be_read_as_asked_is_one_line_with_the_remedy(folder, options, spoil, message):
    if spoil:
        spoil(folder)
    assert re.search(message, refusal(read, folder, **options))


def answer(kind, status):
    """An exception of the hub's client library, as it makes them."""
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/datasets/x/y"))
    return kind(f"{status} Client Error.\n\nmore lines", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            answer(errors.GatedRepoError, 403),
            "is gated; accept its terms on .*datasets/x/y and log in with `hf auth lo",
        ),
        (answer(errors.RepositoryNotFoundError, 401), "neither a folder nor a dataset of the hub that you may see; ch"),
        (answer(errors.RevisionNotFoundError, 404), "x/y/a: has no revision 'v1'; check `revision`"),
        (answer(errors.HfHubHTTPError, 401), "the hub does not accept your token; log in again with `hf auth login`"),
        (answer(errors.HfHubHTTPError, 500), r"the Hugging Face hub refused, 500 Client Error\. .*; try again later"),
        (
            errors.OfflineModeIsEnabled("Cannot reach"),
            "HF_HUB_OFFLINE is set; unset it, or fetch its .* `hf download x/y",
        ),
        (httpx.ConnectError("Name or service not known"), "cannot be reached, Name or service .* mend the network, or"),
        (httpx.ReadTimeout("timed out"), "cannot be reached, timed out .* mend the network, or fetch its files"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses_is_one_line_with_the_remedy(tmp_path, monkeypatch, error, message):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(HfApi, "auth_check", refuse)
    assert re.search(message, refusal(read, tmp_path, dataset="x/y", subset="a", revision="v1"))


def test_without_network_a_pinned_dataset_says_so_and_a_wrong_name_is_no_hub_name(tmp_path):
    # conftest.py sets HF_HUB_OFFLINE: these are the libraries' own exceptions
    assert "HF_HUB_OFFLINE is set" in refusal(read, tmp_path, dataset="x/y", revision=COMMIT)
    assert "neither a folder nor a dataset" in refusal(read, tmp_path, dataset="x/y/z")


def test_a_version_that_datasets_has_stored_is_taken_for_its_own_commit_and_no_other(folder, monkeypatch):
    # the library itself would take it for any revision when the hub does not answer
    cache = folder / "datasets"
    datasets.load_dataset(str(folder / "words"), "a", cache_dir=str(cache))
    (stored,) = cache.glob("*/a/0.0.0/*/")
    shutil.copytree(stored, cache / "somebody___words" / "a" / "0.0.0" / COMMIT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    assert read(folder, dataset=DATASET, subset="a", revision=COMMIT) == A_TRAIN
    assert f"commit {LATER} cannot be had" in refusal(read, folder, dataset=DATASET, subset="a", revision=LATER)


def test_tokens_of_a_dataset_are_those_of_the_same_text_in_a_file(folder):
    (folder / "same.txt").write_text("\n".join(A_TRAIN))
    data = DataConfig(root=str(folder))
    stores = [
        build_store(s, data, Words(), folder / "cache")
        for s in (source(subset="a"), SourceConfig(path="same.txt", lang="en"))
    ]
    for name in ("tokens", "offsets", "document_bytes"):
        assert getattr(stores[0], name).tolist() == getattr(stores[1], name).tolist()
    assert stores[0].n_documents == 4


def test_a_dataset_folder_is_tokenized_again_only_when_its_own_text_changes(folder, tokenized):
    tokenizer, cache = Words(), folder / "cache"

    def build(root):
        return build_store(source(subset="a"), DataConfig(root=str(root)), tokenizer, cache).n_tokens

    build(folder)
    assert tokenized.total() == 4
    shutil.copytree(folder / "words", folder / "elsewhere" / "words")
    parquet(folder / "elsewhere" / "words" / "a" / "test-0.parquet", ["w1 w2 w3"])
    build(folder / "elsewhere")
    assert tokenized.total() == 4
    parquet(folder / "elsewhere" / "words" / "a" / "train-1.parquet", ["w1 w2 w3"])
    build(folder / "elsewhere")
    assert tokenized.total() == 7


def served(monkeypatch, commits):
    """A hub that knows revisions and nothing else; returns what it is asked."""
    asked = []

    def dataset_info(self, name, *, revision, timeout):
        asked.append((name, revision))
        return HfApi.__class__("Info", (), {"sha": commits[revision]})

    monkeypatch.setattr(HfApi, "auth_check", lambda self, name, *, repo_type: None)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    return asked


def test_a_moving_revision_is_asked_for_once_and_a_commit_never(tmp_path, monkeypatch, caplog):
    commits = {"main": COMMIT, "v1": LATER}
    asked = served(monkeypatch, commits)

    def commit(cache="cache", **options):
        made_of = identity(source("x/y", **options), str(tmp_path), tmp_path / cache)
        assert made_of[:2] == ["hub", "x/y"]
        return made_of[-1]

    with caplog.at_level(logging.INFO, "moect.data"):
        assert [commit(), commit(subset="a"), commit(revision="v1")] == [COMMIT, COMMIT, LATER]
        commits["main"] = LATER
        assert [commit(), commit(revision="d" * 40), commit("other")] == [COMMIT, "d" * 40, LATER]
    assert asked == [("x/y", "main"), ("x/y", "v1"), ("x/y", "main")]
    assert [m for m in caplog.messages if "x--y@main" in m and str(tmp_path / "cache") in m] == [
        f"x/y: main is commit aaaaaaaaaaaa, as kept in {tmp_path}/cache/hub/x--y@main: remove that file to ask the "
        "hub again"
    ]
    (tmp_path / "cache" / "hub" / "x--y@main").write_text("damaged")
    assert commit() == LATER


def test_what_is_not_kept_is_not_asked_for_by_a_plan(tmp_path, monkeypatch):
    asked = served(monkeypatch, {})
    assert identity(source("x/y"), str(tmp_path), tmp_path / "cache", online=False) is None
    assert find_store(source("x/y"), DataConfig(), Words(), tmp_path / "cache") is None
    assert find_store(source("x/y", revision=COMMIT), DataConfig(), Words(), tmp_path / "cache") is None
    assert asked == []


def test_every_option_of_a_dataset_has_a_token_store_of_its_own(tmp_path):
    options = [{}, {"subset": "a"}, {"split": "test"}, {"revision": LATER}]
    found = [identity(source("x/y", **{"revision": COMMIT, **o}), str(tmp_path), None) for o in options]
    found.append(identity(source("x/z", revision=COMMIT), str(tmp_path), None))
    assert len({json.dumps(made_of) for made_of in found}) == 5


def test_keys_of_datasets_name_subset_revision_and_split(folder):
    sources = [
        {"dataset": "words", "subset": "a", "lang": "en"},
        {"dataset": "words", "subset": "a", "split": "test", "lang": "en"},
        {"dataset": "words", "subset": "a", "lang": "en", "limit": 2},
        {"dataset": "x/y", "revision": "v1", "split": "dev", "lang": "cy"},
    ]
    records = planned_sources(run_config(folder, sources=sources), None, folder / "cache")
    assert [r["source"] for r in records] == ["words/a", "words/a:test", "words/a#2", "x/y@v1:dev"]


SIZES = ("documents", "tokens", "bytes", "rows_per_epoch", "epochs", "tokens_drawn", "padding", "cut")
UNKNOWN = dict.fromkeys(SIZES)


def test_a_plan_knows_of_a_dataset_what_the_loader_has_tokenized_before(folder, tokenized):
    write_corpus(folder / "new.jsonl", 40, seed=2)
    sources = [{"dataset": "words", "subset": "a", "lang": "en"}, {"path": "new.jsonl", "lang": "cy"}]
    config = run_config(folder, sources=sources, replay=0.25)
    tokenizer = Words()
    old, new = planned_sources(config, tokenizer, folder / "cache")
    assert tokenized.total() == 40  # the file is tokenized, the dataset is not
    assert old == {"source": "words/a", "corpus": "words/a", "lang": "en", "role": "old", "weight": 0.25, **UNKNOWN}
    loader = Loader(config, tokenizer, folder / "cache")
    assert new == loader.summary()[1] and tokenized.total() == 44
    assert planned_sources(config, tokenizer, folder / "cache") == loader.summary()
    config.train.batch_size = 1000
    assert "`train.batch_size` is 1000 rows" in refusal(planned_sources, config, tokenizer, folder / "cache")


@pytest.mark.parametrize(
    ("replay", "explicit", "shares"),
    [
        (None, (None, None, None), [None, None, None]),
        (None, (1, 1, 2), [0.25, 0.25, 0.5]),
        (None, (1, 1, None), [None, None, None]),
        (0.2, (None, None, None), [0.2, None, None]),
        (0.2, (None, 1, 3), [0.2, 0.2, 0.6]),
        (0.2, (5, None, 3), [0.2, None, None]),
    ],
)
def test_a_share_is_told_only_where_it_does_not_hang_on_a_size_that_is_not_known(tmp_path, replay, explicit, shares):
    langs = ("en", "cy", "cy")
    sources = [{"dataset": f"x/{i}", "lang": langs[i], "weight": explicit[i]} for i in range(3)]
    config = run_config(tmp_path, sources=sources, replay=replay)
    assert [r["weight"] for r in planned_sources(config, Words(), tmp_path)] == pytest.approx(shares)


def test_a_plan_without_a_tokenizer_opens_no_source_and_with_one_misses_a_file(tmp_path):
    config = run_config(tmp_path)
    records = planned_sources(config, None, tmp_path)
    assert [{**r, **UNKNOWN} for r in records] == records and records[0]["weight"] is None
    assert "old.jsonl: no file matches" in refusal(planned_sources, config, Words(), tmp_path)


def held_out(folder, **options):
    entry = EvaluationConfig(lang="en", **options)
    return DataConfig(root=str(folder), languages={"en": "old"}, evaluation=[entry])


def test_held_out_documents_of_a_dataset_are_read_once_and_then_from_the_cache(folder, monkeypatch):
    columns = {"text": ["2 = ", "line\u2028break"], "answer": ["dau", "x"]}
    pq.write_table(pa.table(columns), folder / "words" / "b" / "all.parquet")
    config = held_out(folder, dataset="words", subset="b", answer_field="answer")
    expected = [EvaluationDocument("2 = ", "dau"), EvaluationDocument("line\u2028break", "x")]
    assert load_evaluation(config)[0].documents == load_evaluation(config, folder / "cache")[0].documents == expected
    read = []
    monkeypatch.setattr(evaluation, "read_documents", lambda *arguments: read.append(arguments) or [])
    assert load_evaluation(config, folder / "cache")[0].documents == expected and not read
    config.evaluation[0].limit = 1
    assert load_evaluation(config, folder / "cache")[0].documents == [] and len(read) == 1


def test_a_dataset_that_is_trained_on_and_held_out_is_named(folder, caplog):
    config = held_out(folder, dataset="words", subset="a", limit=1)
    config.train = [source(subset="a")]
    load_evaluation(config)
    assert caplog.messages == ["words/a: is in `data.train` too, so it is not held out; give another `split`"]
    config.evaluation[0].split = "test"
    load_evaluation(config)
    assert len(caplog.messages) == 1


def test_a_file_that_is_trained_on_and_held_out_is_named_in_whatever_way_it_is_given(tmp_path, caplog):
    (tmp_path / "text").mkdir()
    for name in ("train", "test"):
        write_corpus(tmp_path / "text" / f"{name}.jsonl", 5, seed=1)
    config = held_out(tmp_path, path="text/test.jsonl")
    config.train = [SourceConfig(path="text/train.jsonl", lang="en")]
    load_evaluation(config)
    assert not caplog.messages
    config.train = [SourceConfig(path="text", lang="en")]
    load_evaluation(config)
    (line,) = caplog.messages
    assert "text/test.jsonl: is in `data.train` too, so it is not held out" in line


def test_a_long_corpus_tells_how_far_it_is_and_a_short_one_nothing(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])

    def tokenize(total, seconds):
        caplog.clear()
        counted = progress.Progress("x/y", total)
        for number in range(1, 5):
            now[0] += seconds
            counted.add(1000, 2_500_000, number * 1000)
        counted.end()
        return caplog.messages

    with caplog.at_level(logging.INFO, "moect.data"):
        assert tokenize(4000, 7) == []
        assert tokenize(4000, 20) == [
            "x/y: tokenized 2,000 documents, 5.0 MB, 0.1 MB/s, 50%, ETA 1m",
            "x/y: tokenized 4,000 documents, 10.0 MB, 0.1 MB/s, 100%, ETA 0m",
            "x/y: tokenized 4,000 documents, 10.0 MB, 0.1 MB/s in 1m",
        ]
        assert tokenize(None, 3600)[3:] == [
            "x/y: tokenized 4,000 documents, 10.0 MB, 0.0 MB/s",
            "x/y: tokenized 4,000 documents, 10.0 MB, 0.0 MB/s in 4h 00m",
        ]


def test_what_was_done_before_is_no_reason_for_hope(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    counted = progress.Progress("x/y", 4000, done=3000)
    now[0] += 60
    with caplog.at_level(logging.INFO, "moect.data"):
        counted.add(100, 250_000, 3100)
    assert caplog.messages == ["x/y: tokenized 100 documents, 0.2 MB, 0.0 MB/s, 78%, ETA 9m"]


def test_a_checkpoint_from_before_there_were_datasets_can_be_gone_on_from(tmp_path):
    config = run_config(tmp_path)
    then = dataclasses.asdict(config)
    for entry in then["data"]["train"]:
        for name in ("dataset", "subset", "split", "revision"):
            del entry[name]
    info = {"base_fingerprint": "same", "config": then}
    assert check_same_run(info, config, "same", "step-1") == []


def test_a_dataset_of_the_hub_can_be_fetched_whole_and_prepared(tmp_path):
    lay_out(tmp_path / "served")
    Words().inner.save_pretrained(tmp_path / "base")
    texts = [{"dataset": DATASET, "subset": "a", "lang": "en", "streaming": False}]
    values = {"model": {"base": str(tmp_path / "base")}, "data": {"languages": {"en": "old"}, "train": texts}}
    (tmp_path / "c.yaml").write_text(json.dumps({**values, "name": "x", "output": str(tmp_path / "runs")}))
    with serving(tmp_path / "served", COMMIT) as served:
        env = {**os.environ, **served.environment(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "moect.cli", "prepare", "--config", str(tmp_path / "c.yaml")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "somebody/words/a: fetching all of it into " in done.stderr
    (record,) = json.loads((tmp_path / "runs" / "x-data" / "prepare.json").read_text())["sources"]
    assert record["documents"] == 4 and record["tokens"] == sum(len(t.split()) + 2 for t in A_TRAIN)


@pytest.mark.slow
def test_two_ranks_read_a_dataset_of_the_hub_once_and_go_on_without_network(place, monkeypatch):
    served_folder = place.output / "served"
    parquet(served_folder / "a" / "train-0.parquet", [WORDS["cy"]] * DOCUMENTS["train"])
    parquet(served_folder / "a" / "test-0.parquet", [WORDS["cy"]] * 3)
    parquet(served_folder / "b" / "all.parquet", [WORDS["cy"]])
    (served_folder / "README.md").write_text(CARD)
    shutil.copytree(served_folder, place.output / "copy")
    texts = [
        {"dataset": str(place.output / "copy"), "subset": "a", "lang": "en"},
        {"dataset": DATASET, "subset": "a", "lang": "cy"},
    ]
    path = place.write(place.config(data={"train": texts, "evaluation": []}, train={"micro_batch": 2}))
    with serving(served_folder, COMMIT) as hub:
        for name, value in hub.environment(place.output / "home").items():
            monkeypatch.setenv(name, value)
        launch(path, 2, "train.stop_after=3")
        resolved = [r for r in hub.requests if r.endswith(("/auth-check", "/revision/main"))]
        assert len(resolved) == 2
        assert not any("/b/" in r or "/test-" in r for r in hub.requests)
        hub.move_main(LATER)
        hub.requests.clear()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        launch(path, 2, "resume=auto")
        assert hub.requests == []
    run = place.output / "run"
    assert [event["event"] for event in events(run)][-1] == "end"
    old, new = json.loads((run / "plan.json").read_text())["mixture"]
    assert (old["source"], new["source"]) == (f"{place.output}/copy/a", f"{DATASET}/a")
    assert old["documents"] == new["documents"] == DOCUMENTS["train"] and old["tokens"] == new["tokens"]
