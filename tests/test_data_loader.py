"""The loader: the rows of a step on any number of ranks, resuming, and what it refuses."""

import copy
import json
import logging

import pytest
import torch
from data_helpers import WORDS, Words, run_config, write_corpus

from moect.data.loader import Loader
from moect.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "old.jsonl", 60, seed=1)
    write_corpus(tmp_path / "new.jsonl", 40, seed=2)
    return tmp_path


def loader(folder, rank=0, world_size=1, vocab_size=None, **options):
    return Loader(run_config(folder, **options), Words(), folder / "cache", rank, world_size, vocab_size)


def rows(micro_batches):
    """The rows of micro-batches, as comparable values."""
    fields = ("input_ids_BS", "labels_BS", "position_ids_BS", "role_BS")
    return [
        tuple(tuple(getattr(b, f)[i].tolist()) for f in fields) for b in micro_batches for i in range(len(b.role_BS))
    ]


def test_a_micro_batch_has_its_shapes_and_types_and_the_role_of_its_language(folder):
    data = loader(folder, replay=0.25)
    step = data.next_step()
    assert len(step) == 4
    for batch in step:
        for name in ("input_ids_BS", "labels_BS", "position_ids_BS"):
            assert getattr(batch, name).shape == (2, 16) and getattr(batch, name).dtype == torch.int64
        assert batch.role_BS.dtype == torch.int8
    roles = torch.cat([b.role_BS[:, 0] for b in step])
    assert (roles == 0).sum() == 2 and (roles == 1).sum() == 6
    assert step[0].to("meta").role_BS.device.type == "meta"


@pytest.mark.parametrize(("lang", "role"), [("en", 0), ("cy", 1)])
def test_padding_has_a_role_of_its_own(folder, lang, role):
    data = loader(folder, sources=[{"path": "old.jsonl", "lang": lang}], batch_size=1, micro_batch=1)
    (source,) = data.summary()
    tokens, rows_per_epoch = source["tokens"], source["rows_per_epoch"]
    assert tokens % 16 > 1  # so that the last row is padded
    for _ in range(2):
        epoch = [batch for _ in range(rows_per_epoch) for batch in data.next_step()]
        roles = torch.cat([batch.role_BS for batch in epoch])
        assert (roles == role).sum() == tokens and (roles[:-1] == role).all()
        assert (roles == -1).sum() == rows_per_epoch * 16 - tokens > 0
        last = epoch[-1]
        assert (last.labels_BS[last.role_BS == -1] == -100).all()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_the_rows_of_a_step_do_not_depend_on_ranks_or_micro_batches(folder, world_size, micro_batch):
    alone = loader(folder, replay=0.3)
    ranks = [loader(folder, r, world_size, micro_batch=micro_batch, replay=0.3) for r in range(world_size)]
    for _ in range(30):  # several epochs
        expected = rows(alone.next_step())
        steps = [rank.next_step() for rank in ranks]
        assert {len(b.role_BS) for step in steps for b in step} == {micro_batch}
        # micro-batch m of rank r is number m * world_size + r
        got = [row for m in range(len(steps[0])) for step in steps for row in rows([step[m]])]
        assert got == expected
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


@pytest.mark.parametrize("after", [0, 1, 13])
@pytest.mark.parametrize("world_size", [1, 2])
def test_going_on_from_a_state_equals_never_having_stopped(folder, after, world_size):
    whole = loader(folder)
    steps = [rows(whole.next_step()) for _ in range(20)]
    first = loader(folder)
    for _ in range(after):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["rows"] == after * 8 == sum(state["drawn"].values())
    ranks = [loader(folder, r, world_size, micro_batch=4) for r in range(world_size)]
    for rank in ranks:
        rank.load_state_dict(state)
    for expected in steps[after:]:
        assert sorted(row for rank in ranks for row in rows(rank.next_step())) == sorted(expected)


def test_an_epoch_of_the_loader_shows_every_label_of_a_source_once(folder):
    one = [{"path": "old.jsonl", "lang": "en"}]
    data = loader(folder, sources=one, batch_size=1, micro_batch=1)
    (source,) = data.summary()
    labels = sum(int((b.labels_BS != -100).sum()) for _ in range(source["rows_per_epoch"]) for b in data.next_step())
    assert labels == source["tokens"] - source["documents"]


def test_corpora_of_the_same_size_are_not_read_in_the_same_order(folder):
    (folder / "new.jsonl").write_bytes((folder / "old.jsonl").read_bytes())
    data = loader(folder)
    first, second = ([c.row(i).input_ids_S.tolist() for i in range(c.rows_per_epoch)] for c in data.corpora)
    assert first != second


def test_the_summary_says_what_each_source_gives(folder):
    old, new = loader(folder, replay=0.25).summary()
    assert [old[k] for k in ("source", "lang", "role", "documents", "weight")] == ["old.jsonl", "en", "old", 60, 0.25]
    assert new["bytes"] == sum(len(json.loads(s)["text"]) for s in (folder / "new.jsonl").read_text().splitlines())
    assert new["rows_per_epoch"] == -(-(new["tokens"] - 1) // 16)
    assert new["epochs"] == pytest.approx(0.75 * 80 / new["rows_per_epoch"])
    json.dumps([old, new])


def test_weights_on_some_sources_only_and_weight_zero_are_logged(folder, caplog):
    sources = [{"path": "old.jsonl", "lang": "en", "weight": 0}, {"path": "new.jsonl", "lang": "cy"}]
    with caplog.at_level(logging.WARNING, "moect.data"):
        loader(folder, sources=sources)
    assert "some sources of any role have a `weight`" in caplog.text
    assert "old.jsonl: has weight 0" in caplog.text


def test_the_same_file_may_be_two_sources(folder):
    sources = [{"path": "old.jsonl", "lang": "en", "limit": 30}, {"path": "old.jsonl", "lang": "cy"}]
    assert list(loader(folder, sources=sources).state_dict()["drawn"]) == ["old.jsonl", "old.jsonl#2"]


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(folder):
    with pytest.raises(ConfigError, match=r"`train\.batch_size` 8 .* 2 x 3; set it to 12"):
        loader(folder, 0, 3)


def test_a_batch_larger_than_the_corpus_is_refused(folder):
    rows_in_all = sum(s["rows_per_epoch"] for s in loader(folder).summary())
    loader(folder, batch_size=rows_in_all, micro_batch=1)
    with pytest.raises(DataError, match=rf"is {rows_in_all + 1} rows.* has {rows_in_all} rows of 16 tokens; lower"):
        loader(folder, batch_size=rows_in_all + 1, micro_batch=1)
    with pytest.raises(DataError, match="`train.batch_size`"):  # sources that are never read do not count
        loader(folder, batch_size=rows_in_all, micro_batch=1, replay=0.0)


def test_a_token_that_the_model_does_not_have_is_refused(folder):
    loader(folder, vocab_size=WORDS + 2)
    with pytest.raises(DataError, match=rf"old\.jsonl: .*token {WORDS + 1}, the model has {WORDS + 1}; set"):
        loader(folder, vocab_size=WORDS + 1)


def test_a_position_in_other_data_is_refused_with_the_difference(folder):
    data = loader(folder)
    data.next_step()
    state = data.state_dict()
    one = [{"path": "new.jsonl", "lang": "cy"}]
    with pytest.raises(CheckpointError, match="`old.jsonl` is no longer in `data.train`"):
        loader(folder, sources=one).load_state_dict(state)
    with pytest.raises(CheckpointError, match="`old.jsonl` is new in `data.train`"):
        data.load_state_dict(loader(folder, sources=one).state_dict())
    with pytest.raises(CheckpointError, match="`seed` was 3 and is 4"):
        loader(folder, seed=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="`data.sequence_length` was 16 and is 8"):
        loader(folder, sequence_length=8).load_state_dict(state)
    write_corpus(folder / "new.jsonl", 41, seed=9)
    with pytest.raises(CheckpointError, match="the text of `new.jsonl`, its options or the tokenizer changed"):
        loader(folder).load_state_dict(state)


def test_a_damaged_position_is_refused(folder):
    data = loader(folder)
    good = data.state_dict()
    for change in ({"rows": 5}, {"drawn": {"old.jsonl": -1, "new.jsonl": 1}}):
        with pytest.raises(CheckpointError, match="damaged"):
            data.load_state_dict({**copy.deepcopy(good), **change})
    with pytest.raises(CheckpointError, match="incomplete"):
        data.load_state_dict({"rows": 0})
    assert data.state_dict() == good
