"""The order of the documents, by their names: the same on any ranks and workers, and each once an epoch."""

import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_helpers import Words, run_config, write_corpus

from moect.data.batches.loader import Loader
from moect.errors import DataError

SOURCES = [
    {"path": "en.jsonl", "lang": "en"},
    {"path": "cy1.jsonl", "lang": "cy"},
    {"path": "is.jsonl", "lang": "is", "weight": 1000.0},
    {"path": "cy2.jsonl", "lang": "cy"},
]
LANGUAGES = {"en": "old", "cy": "new", "is": "new"}
BATCH, STEPS = 12, 70
BOTH = pytest.mark.parametrize("packing", ["concatenate", "best-fit"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for seed, (name, documents) in enumerate({"en": 60, "cy1": 30, "cy2": 25, "is": 40}.items()):
        write_corpus(folder / f"{name}.jsonl", documents, seed=seed, longest=40)
    return folder


def loader(folder, rank=0, world_size=1, micro_batch=1, **options):
    config = run_config(
        folder, sources=SOURCES, languages=LANGUAGES, batch_size=BATCH, micro_batch=micro_batch, replay=0.3, **options
    )
    return Loader(config, Words(), folder / "cache", rank, world_size)


def held(ranks) -> list[list]:
    """What the rows of the next step hold, as (source, document, first, last), in the order of the step."""
    steps = [rank.next_step() for rank in ranks]
    return [row.tolist() for m in range(len(steps[0])) for step in steps for row in step[m].fragments]


def epochs(data, rows) -> list[tuple[str, list[list]]]:
    """The rows of whole epochs of each corpus, with its key."""
    of_source = {source: i for i, corpus in enumerate(data.corpora) for source in corpus.sources}
    by_corpus = [[row for row in rows if of_source[row[0][0]] == i] for i in range(len(data.corpora))]
    found = []
    for corpus, packed, its_rows in zip(data.corpora, data.packed, by_corpus, strict=True):
        n = packed.rows_per_epoch
        found += [(corpus.key, its_rows[at : at + n]) for at in range(0, len(its_rows) - n + 1, n)]
    return found


def assert_each_document_once(data, rows, at_least: int) -> None:
    """In each whole epoch of each corpus every token of every document but its first is a label once."""
    whole = epochs(data, rows)
    counted = Counter(key for key, _ in whole)
    assert set(counted) == {corpus.key for corpus in data.corpora} and min(counted.values()) >= at_least
    sources = {corpus.key: corpus.sources for corpus in data.corpora}
    for key, epoch in whole:
        labels = Counter()
        for row in epoch:
            for source, document, first, last in row:
                name = data.stores[source].document_id(document)
                labels.update((source, name, place) for place in range(first + 1, last + 1))
        expected = [
            (source, data.stores[source].document_id(document), place)
            for source in sources[key]
            for document, length in enumerate(np.diff(data.stores[source].offsets).tolist())
            for place in range(1, length)
        ]
        assert labels == Counter(expected)


@BOTH
def test_documents_come_in_the_same_order_on_any_ranks_and_each_once_an_epoch(folder, packing):
    alone = loader(folder, packing=packing)
    expected = [held([alone]) for _ in range(STEPS)]
    assert_each_document_once(alone, [row for step in expected for row in step], at_least=2)
    for world_size in (1, 2, 3, 4):
        for micro_batch in {1, 3, BATCH // world_size} if BATCH // world_size % 3 == 0 else {1, BATCH // world_size}:
            ranks = [loader(folder, r, world_size, micro_batch, packing=packing) for r in range(world_size)]
            assert [held(ranks) for _ in range(STEPS)] == expected
            assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


@BOTH
def test_resumed_in_the_middle_of_epochs_on_other_numbers_of_ranks_each_document_comes_once(folder, packing):
    alone = loader(folder, packing=packing)
    expected = [held([alone]) for _ in range(STEPS)]
    got, state = [], None
    for world_size, micro_batch, steps in ((2, 3, 3), (3, 1, 4), (1, 12, 1), (4, 3, 12), (2, 6, STEPS - 20)):
        ranks = [loader(folder, r, world_size, micro_batch, packing=packing) for r in range(world_size)]
        for rank in ranks if state else ():
            rank.load_state_dict(json.loads(state))
        got += [held(ranks) for _ in range(steps)]
        state = json.dumps(ranks[-1].state_dict())
    assert got == expected
    assert_each_document_once(alone, [row for step in got for row in step], at_least=2)


@BOTH
def test_a_change_of_the_mixture_leaves_each_document_once_an_epoch(folder, packing):
    first = loader(folder, packing=packing)
    rows = [row for _ in range(7) for row in held([first])]
    options = {"sources": [{**s, "weight": 3.0} if s["lang"] == "is" else s for s in SOURCES], "languages": LANGUAGES}
    config = run_config(folder, **options, batch_size=BATCH, micro_batch=1, replay=0.6, packing=packing, max_epochs=50)
    later = Loader(config, Words(), folder / "cache")
    later.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert later.change
    later.mixture.change(np.array([0.4, 0.3, 0.3]))  # so that all are read through
    rows += [row for _ in range(50) for row in held([later])]
    assert_each_document_once(later, rows, at_least=2)


def test_all_sources_of_a_language_are_read_through_before_any_comes_again(folder):
    data = loader(folder)
    assert [corpus.key for corpus in data.corpora] == ["en.jsonl", "cy (2 sources)", "is.jsonl"]
    rows = [row for _ in range(STEPS) for row in held([data])]
    (first, *_) = [epoch for key, epoch in epochs(data, rows) if key.startswith("cy")]
    order = [source for row in first for source, *_ in row]
    assert {1, 3} == set(order[: len(order) // 3])  # mixed, not one after the other


def fields(step):
    tensors = ("input_ids_BS", "labels_BS", "position_ids_BS", "role_BS", "language_BS")
    return [
        [getattr(batch, name).tolist() for name in tensors] + [row.tolist() for row in batch.fragments]
        for batch in step
    ]


def test_worker_processes_make_the_same_batches_and_the_position_is_that_of_what_was_taken(folder):
    plain = loader(folder, 1, 2, 2, packing="best-fit")
    expected = [fields(plain.next_step()) for _ in range(9)]
    states = []
    for workers in (1, 2):
        data = loader(folder, 1, 2, 2, packing="best-fit", workers=workers)
        try:
            assert [fields(data.next_step()) for _ in range(4)] == expected[:4]
            states.append(data.state_dict())
            data.next_step()  # as a resume does it: a step to wake the optimizer, and back
            data.load_state_dict(states[-1])
            assert [fields(data.next_step()) for _ in range(5)] == expected[4:]
            assert data.state_dict() == plain.state_dict()
            assert len(multiprocessing.active_children()) == workers
        finally:
            data.close()
        assert multiprocessing.active_children() == []
    other = loader(folder, 1, 2, 2, packing="best-fit")
    other.load_state_dict(states[0])
    assert states[0] == states[1] and fields(other.next_step()) == expected[4]


def test_a_worker_that_is_killed_interrupts_nothing_else_and_is_one_line_and_not_a_hang(folder):
    data = loader(folder, workers=1)
    try:
        data.next_step()
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        state = Path(f"/proc/{child.pid}/stat")
        while state.read_text().rpartition(")")[2].split()[0] != "Z":  # this process is told of its end meanwhile
            pass
        for _ in range(1000):
            pass
        with pytest.raises(DataError, match="a process of `data.workers` ended by itself.*resume=auto") as refusal:
            for _ in range(20):  # what was made ahead comes first
                data.next_step()
        assert "\n" not in str(refusal.value)
    finally:
        data.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("options", "digest"),
    [({}, "808f169b960d7b41"), ({"replay": 0.3}, "da9a2925e534c20e"), ({"temperature": 2.0}, "56f180b0de7e24dc")],
)
def test_the_order_of_runs_made_with_earlier_versions_is_kept(tmp_path, options, digest):
    """Of a source for each language and joined documents; the digests were taken before corpora could be joined."""
    write_corpus(tmp_path / "old.jsonl", 60, seed=1)
    write_corpus(tmp_path / "new.jsonl", 40, seed=2)
    data = Loader(run_config(tmp_path, **options), Words(), tmp_path / "cache")
    found = hashlib.sha256()
    for _ in range(30):
        for batch in data.next_step():
            for name in ("input_ids_BS", "labels_BS", "position_ids_BS", "role_BS"):
                found.update(getattr(batch, name).numpy().tobytes())
    assert found.hexdigest()[:16] == digest
