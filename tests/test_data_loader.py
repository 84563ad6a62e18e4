"""The loader: the rows of a step on any number of ranks, resuming, and what it refuses."""

import copy
import json
import logging

import pytest
import torch
from data_helpers import WORDS, Words, run_config, write_corpus

from moect.data.batches.loader import Loader
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
    fields = ("input_ids_BS", "labels_BS", "position_ids_BS", "role_BS", "language_BS")
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
        assert (batch.role_BS.dtype, batch.language_BS.dtype) == (torch.int8, torch.int16)
        assert torch.equal(batch.language_BS, 1 - batch.role_BS.short())  # sorted, `cy` of role new comes before `en`
        assert len(batch.fragments) == 2
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
        assert torch.equal(last.role_BS == -1, last.language_BS == -1)


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
    first, second = ([c.row(i).input_ids_S.tolist() for i in range(c.rows_per_epoch)] for c in data.packed)
    assert first != second


def test_the_summary_says_what_each_source_gives(folder):
    data = loader(folder, replay=0.25)
    old, new = data.summary()
    assert [old[k] for k in ("source", "lang", "role", "documents", "weight")] == ["old.jsonl", "en", "old", 60, 0.25]
    assert new["bytes"] == sum(len(json.loads(s)["text"]) for s in (folder / "new.jsonl").read_text().splitlines())
    assert new["rows_per_epoch"] == -(-(new["tokens"] - 1) // 16)
    assert new["epochs"] == pytest.approx(0.75 * 80 / new["rows_per_epoch"])
    padding = old["rows_per_epoch"] * 16 - old["tokens"]
    assert old["padding"] == pytest.approx(padding / (old["rows_per_epoch"] * 16)) and padding > 0
    assert new["cut"] == data.packed[1].share_cut() > 0 and new["corpus"] == "new.jsonl"
    assert new["tokens_drawn"] == pytest.approx(0.75 * 80 * 16 * (1 - new["padding"]), abs=1)
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


def test_sources_of_a_language_share_its_rows_by_tokens_and_its_weight_is_of_all_their_tokens(folder):
    write_corpus(folder / "more.jsonl", 70, seed=5)
    sources = [{"path": f"{name}.jsonl", "lang": lang} for name, lang in (("old", "en"), ("new", "cy"), ("more", "cy"))]
    data = loader(folder, sources=sources, temperature=2.0)
    old, new, more = data.summary()
    assert [c.key for c in data.corpora] == ["old.jsonl", "cy (2 sources)"]
    root = lambda *records: sum(r["tokens"] for r in records) ** 0.5  # noqa: E731
    assert new["weight"] + more["weight"] == pytest.approx(root(new, more) / (root(new, more) + root(old)))
    assert new["weight"] / more["weight"] == pytest.approx(new["tokens"] / more["tokens"])
    assert new["epochs"] == more["epochs"] and new["corpus"] == more["corpus"] == "cy (2 sources)"


def test_unimax_shares_equally_until_a_language_has_been_read_as_often_as_it_may(folder):
    data = loader(folder, sampling="unimax", max_epochs=2, steps=10)
    old, new = (p.rows_per_epoch for p in data.packed)
    assert 40 < 2 * old and 2 * new > 40  # of 80 rows
    assert [r["weight"] for r in data.summary()] == [0.5, 0.5]
    data = loader(folder, sampling="unimax", max_epochs=2, steps=25)
    assert 2 * new < 100
    assert [r["epochs"] for r in data.summary()] == pytest.approx([(200 - 2 * new) / old, 2])
    for _ in range(25):
        data.next_step()
    assert data.mixture.drawn == [200 - 2 * new, 2 * new]


def test_a_limit_that_cannot_be_kept_is_told_once_and_both_exceed_it_alike(folder, caplog):
    with caplog.at_level(logging.WARNING, "moect.data"):
        data = loader(folder, max_epochs=0.5, steps=20)
    old, new = data.summary()
    assert old["epochs"] == pytest.approx(new["epochs"]) and old["epochs"] > 0.5
    assert caplog.text.count("each is read more often than 0.5 times") == 1


@pytest.mark.parametrize("packing", ["concatenate", "best-fit"])
def test_tokens_seen_are_those_of_all_ranks_batches_by_language(folder, packing):
    ranks = [loader(folder, r, 2, replay=0.3, packing=packing) for r in range(2)]
    seen = torch.zeros(2, dtype=torch.int64)
    for _ in range(30):
        for rank in ranks:
            for batch in rank.next_step():
                seen += torch.stack([(batch.language_BS == i).sum() for i in range(2)])
    assert ranks[0].tokens_seen() == ranks[1].tokens_seen() == {"en": seen[1].item(), "cy": seen[0].item()}
    later = loader(folder, replay=0.3, packing=packing)
    later.load_state_dict(ranks[0].state_dict())
    assert later.tokens_seen() == ranks[0].tokens_seen()
    next_run = loader(folder, replay=0.3, packing=packing)
    next_run.go_on_after(ranks[0].state_dict())
    assert next_run.tokens_seen() == {"en": 0, "cy": 0} and next_run.skipped == ranks[0].mixture.drawn


def test_a_sample_shows_where_documents_begin_and_end(folder):
    (folder / "old.jsonl").write_text(json.dumps({"text": " ".join(["w1"] * 40)}) + "\n")
    (folder / "new.jsonl").write_text("".join(json.dumps({"text": f"w{i} w{i}"}) + "\n" for i in range(5)))
    old, new = loader(folder, batch_size=2, micro_batch=1).samples(Words())
    assert (old["lang"], old["documents"], old["padding"]) == ("en", 1, 0.0)
    assert old["text"] == ["⟦<s> " + " ".join(["w1"] * 16)]  # goes on in the next row
    assert new["documents"] == 4 and len(new["text"]) == 3
    assert all(text.startswith("⟦<s> w") and text.endswith(" </s>⟧") for text in new["text"])
    data = loader(folder, batch_size=2, micro_batch=1, packing="best-fit")
    old, new = data.samples(Words())
    assert data.packed[0].row(0).fragments_F4[0, 2] == 16  # the middle of its document
    assert old["text"] == [" ".join(["w1"] * 17)]
    assert new["documents"] == 5 and new["padding"] == 1 / 16


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


def test_a_source_more_or_less_of_a_language_is_refused_and_so_is_another_weight_that_parts_sources(folder):
    write_corpus(folder / "more.jsonl", 20, seed=5)
    both = [{"path": "new.jsonl", "lang": "cy"}, {"path": "more.jsonl", "lang": "cy"}]
    data, alone = loader(folder, sources=both), loader(folder, sources=both[:1])
    with pytest.raises(CheckpointError, match="`more.jsonl` is no longer in `data.train`"):
        alone.load_state_dict(data.state_dict())
    with pytest.raises(CheckpointError, match="`more.jsonl` is new in `data.train`"):
        data.load_state_dict(alone.state_dict())
    parted = loader(folder, sources=[both[0], {**both[1], "weight": 2}])
    for one, other in ((parted, data), (data, parted)):
        with pytest.raises(CheckpointError, match="was not the same corpus; .* unless they have a `weight`"):
            one.load_state_dict(other.state_dict())


def test_other_shares_hold_from_the_resume_on_and_only_then(folder):
    first = loader(folder, replay=0.5)
    for _ in range(5):
        first.next_step()
    assert first.change is None
    state = json.loads(json.dumps(first.state_dict()))
    data = loader(folder, replay=0.1)
    data.load_state_dict(state)
    assert data.change == {"before": {"old.jsonl": 0.5, "new.jsonl": 0.5}, "now": {"old.jsonl": 0.1, "new.jsonl": 0.9}}
    again = loader(folder, replay=0.1)
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))  # as the trainer does it, before the first step
    assert again.state_dict() == data.state_dict() and again.change == data.change
    for _ in range(5):
        data.next_step()
    assert data.mixture.drawn == [20 + 4, 20 + 36] and data.change is None
    assert [s["row"] for s in data.state_dict()["segments"]] == [0, 40]
    same = loader(folder, replay=0.1)
    same.load_state_dict(data.state_dict())
    assert same.change is None and rows(same.next_step()) == rows(data.next_step())


def test_after_a_change_a_limit_counts_what_was_read_before(folder):
    first = loader(folder, steps=25, replay=0.2)
    new = first.packed[1].rows_per_epoch
    for _ in range(5):
        first.next_step()
    data = loader(folder, steps=25, sampling="unimax", max_epochs=2)
    data.load_state_dict(first.state_dict())
    for _ in range(20):
        data.next_step()
    assert data.mixture.drawn == [200 - 2 * new, 2 * new]
    assert data.summary()[1]["epochs"] == pytest.approx(2)


@pytest.mark.parametrize("replay", [0.3, 0.8])
def test_a_position_of_before_mixtures_had_a_history_is_gone_on_from(folder, replay):
    first = loader(folder, replay=0.3)
    for _ in range(7):
        first.next_step()
    state = {k: v for k, v in first.state_dict().items() if k not in ("segments", "packing")}
    data = loader(folder, replay=replay)
    data.load_state_dict(state)
    if replay == 0.3:
        assert data.change is None and rows(data.next_step()) == rows(first.next_step())
    else:
        assert data.change["before"]["old.jsonl"] == pytest.approx(0.3, abs=0.02) and data.change["now"] == {
            "old.jsonl": pytest.approx(0.8),
            "new.jsonl": pytest.approx(0.2),
        }
        before = data.mixture.drawn[0]
        for _ in range(5):
            data.next_step()
        assert data.mixture.drawn[0] - before == 32


def raised(data):
    """What a mixture of replay 0.25 has drawn after ten steps; then its replay is a half, with 30 steps to come."""
    for _ in range(10):
        data.next_step()
    before = list(data.mixture.drawn)
    data.set_replay(0.5, steps=30)
    return before


@pytest.mark.parametrize("workers", [0, 1])
def test_replay_that_is_raised_holds_from_the_next_step_on_and_is_kept(folder, workers):
    data = loader(folder, replay=0.25, steps=20, workers=workers)
    again = loader(folder, replay=0.25, steps=20, workers=workers)
    try:
        before = raised(data)
        state = json.loads(json.dumps(data.state_dict()))
        after = [rows(data.next_step()) for _ in range(10)]
        assert [now - then for now, then in zip(data.mixture.drawn, before, strict=True)] == [40, 40]
        assert data.replay == 0.5
        again.load_state_dict(state)
        assert again.replay == 0.5 and again.change is not None
        assert [rows(again.next_step()) for _ in range(10)] == after
        other = loader(folder, replay=0.125, steps=20)  # the configuration was changed since
        other.load_state_dict(state)
        assert other.replay == 0.125
    finally:
        data.close()
        again.close()


def test_a_run_that_went_back_reads_no_language_more_often_than_it_may(folder):
    """It has more steps before it than the configuration says."""
    write_corpus(folder / "little.jsonl", 30, seed=3)
    write_corpus(folder / "much.jsonl", 400, seed=4)
    files = {"little": "en", "much": "de", "new": "cy"}
    options = {
        "languages": {"en": "old", "de": "old", "cy": "new"},
        "sources": [{"path": f"{name}.jsonl", "lang": lang} for name, lang in files.items()],
        "replay": 0.25,
        "sampling": "unimax",
        "max_epochs": 1,
    }
    data = loader(folder, steps=20, **options)
    raised(data)
    state = json.loads(json.dumps(data.state_dict()))
    for _ in range(30):
        data.next_step()
    little, much, _ = data.mixture.drawn
    assert little <= data.packed[0].rows_per_epoch + 1 < much
    again = loader(folder, steps=20, **options)
    again.load_state_dict(state)
    assert len(again.mixture.segments) == 2  # the same shares come out
