"""Several runs in one file: what each stage becomes, what it builds on, and going on in the middle."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import assert_same_bits, events, launch, losses, tensors

from moect.config import config_to_yaml, load_config
from moect.data.batches.loader import Loader
from moect.errors import CheckpointError, ConfigError, DataError
from moect.stages import as_planned, load_stages, run_stages

SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def write(place, stages, **common) -> Path:
    """A file of stages on the small texts of `place`."""
    values = place.values("whole")
    del values["model"]
    values.update({"stages": stages, **common})
    path = place.output / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def base_then_extension(place) -> list[dict]:
    model = {"from_config": SHAPE, "tokenizer": str(place.output / "tokenizer"), "train_tokenizer": 300}
    return [
        {"name": "base", "method": "full", "model": model, "train": {"steps": 4}},
        {"name": "extend", "model": {"base": "stage:base"}, "monitor": {"enabled": True}},
    ]


def learn_then_review(place) -> list[dict]:
    model = {"base": str(place.inputs / "base")}
    train = {"steps": 2, "warmup": 0}
    return [
        {"name": "learn", "model": model},
        {"name": "review", "model": {**model, "start": "stage:learn"}, "data": {"replay": 0.5}, "train": train},
    ]


def test_a_stage_has_its_own_keys_over_the_shared_ones(place):
    stages = [
        {"name": "one", "model": {"base": "b"}, "train": {"steps": 9}},
        {"name": "two", "model": {"base": "b"}, "data": {"train": [{"path": "x.jsonl", "lang": "cy"}], "replay": None}},
    ]
    one, two = load_stages(write(place, stages))
    assert (one.train.steps, one.train.batch_size, one.data.replay) == (9, 8, 0.25)
    assert (two.train.steps, two.data.replay, [s.path for s in two.data.train]) == (6, None, ["x.jsonl"])
    assert [c.folder for c in (one, two)] == [place.output / "whole" / "one", place.output / "whole" / "two"]


def test_a_file_without_stages_is_one_run(place):
    path = place.write(place.config("alone"))
    assert load_stages(path, ["train.steps=7"]) == [load_config(path, ["train.steps=7"])]
    with pytest.raises(ConfigError, match="has no `stages`"):
        load_stages(path, ["stages.one.seed=1"])


def test_overrides_are_for_all_stages_or_for_the_one_they_name(place):
    path = write(place, base_then_extension(place))
    overrides = ["train.lr=0.5", "stages.extend.train.lr=0.25", "stages.base.seed=3", "name=other", "resume=auto"]
    base, extend = load_stages(path, overrides)
    assert (base.train.lr, extend.train.lr, base.seed, extend.seed) == (0.5, 0.25, 3, 5)
    assert base.folder == place.output / "other" / "base" and (base.resume, extend.resume) == ("auto", "auto")
    assert extend.model.base == str(base.folder / "export")


@pytest.mark.parametrize(
    ("stages", "overrides", "words"),
    [
        ([], [], "list of mappings"),
        ({"one": {}}, [], "list of mappings"),
        ([{"train": {}}], [], "`stages\\[0\\]` has no `name`"),
        ([{"name": "a", "model": {"base": "b"}}, {"name": "a"}], [], "two stages are called 'a'"),
        ([{"name": "a", "output": "x"}], [], "stage a: `output` is for all stages"),
        ([{"name": "a", "model": {"base": "stage:b"}}], [], "stage a: `model.base` is 'stage:b'.*before it come: none"),
        ([{"name": "a", "model": {"base": "b"}, "trane": {}}], [], "stage a: unknown key `trane`"),
        ([{"name": "a", "model": {"base": "b"}}], ["stages.b.seed=1"], "no stage 'b'; the stages are a"),
        ([{"name": "a/b", "model": {"base": "b"}}], [], "plain folder name"),
        ([{"name": "a.b", "model": {"base": "b"}}], [], "a dot in the name"),
        ([{"name": "a", "model": {"base": "b"}}], ["stages.a=3"], "write stages.NAME.section.key=value"),
        ([{"name": "a", "model": {"base": "b"}}], ["stages.a=0.5"], "write stages.NAME.section.key=value"),
        ([{"name": "a", "model": {"base": "b"}}], ["stages.a.output=x"], "that key is for all stages"),
        ([{"name": "a", "model": {"base": "b"}}], ["name=../x"], "`name` is '../x'"),
        (
            [{"name": "a", "model": {"base": "b"}}, {"name": "c", "model": {"base": "stage:a"}}],
            [],
            "stage c: its base, stage a, has an appended module already",
        ),
        (
            [{"name": "a", "model": {"base": "b"}}, {"name": "c", "model": {"base": "x", "start": "stage:a"}}],
            [],
            "stage c: goes on from stage a, which has `model.base` 'b', and not 'x'",
        ),
    ],
)
def test_stages_that_cannot_be_meant_are_refused_by_name(place, stages, overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_stages(write(place, stages), overrides)


def test_a_file_of_stages_is_not_taken_for_one_run(place):
    with pytest.raises(ConfigError, match="several runs"):
        load_config(write(place, base_then_extension(place)))


def test_a_base_is_trained_and_extended_by_one_command_and_again_costs_nothing(place):
    path = write(place, base_then_extension(place))
    out, _ = launch(path, 2)
    base, extend = (place.output / "whole" / name for name in ("base", "extend"))
    assert "stage 1 of 2: base" in out and "stage 2 of 2: extend" in out
    for run in (base, extend):
        assert events(run)[-1]["event"] == "end" and (run / "report.md").is_file()
    # the extension's frozen part is the base as exported, and the base as exported is what was trained
    trained = tensors(base, 4, "module")
    exported = load_file(base / "export" / "model.safetensors")
    assert exported and all(torch.equal(tensor.clone(), trained[f"module:{n}"]) for n, tensor in exported.items())
    assert json.loads((base / "export" / "config.json").read_text())["hidden_size"] == SHAPE["hidden_size"]
    assert not (extend / "export").exists()  # nothing is built on it
    before = {file: file.read_bytes() for run in (base, extend) for file in run.rglob("*.json*")}
    out, _ = launch(path, 2, "resume=auto", "stages.extend.data.replay=0.4")
    assert out.count("finished before") == 2 and out.count("not used: data.replay: ") == 1
    assert before == {file: file.read_bytes() for run in (base, extend) for file in run.rglob("*.json*")}


@pytest.mark.slow
def test_interrupted_in_either_stage_it_ends_with_the_bits_of_an_uninterrupted_one(place):
    path = write(place, base_then_extension(place))
    run_stages(load_stages(path, ["name=straight"]))
    for stop in ("stages.base.train.stop_after=3", "stages.extend.train.stop_after=4"):
        run_stages(load_stages(path, ["resume=auto", stop]))
        assert events(place.output / "whole" / stop.split(".")[1])[-1]["event"] == "stop"
    assert not (place.output / "whole" / "extend" / "checkpoints" / "step-6").exists()
    run_stages(load_stages(path, ["resume=auto"]))
    for stage, step in (("base", 4), ("extend", 6)):
        assert_same_bits(place.output / "whole" / stage, place.output / "straight" / stage, step)


def test_a_stage_that_was_interrupted_keeps_the_later_ones_waiting(place):
    run_stages(load_stages(write(place, base_then_extension(place)), ["stages.base.train.stop_after=2"]))
    assert not (place.output / "whole" / "extend").exists()
    assert not (place.output / "whole" / "base" / "export").exists()


def test_a_finished_stage_with_other_settings_is_not_skipped(place):
    path = write(place, learn_then_review(place)[:1])
    run_stages(load_stages(path))
    with pytest.raises(CheckpointError, match=r"moe.experts: 4, the configuration says 3"):
        run_stages(load_stages(path, ["resume=auto", "moe.experts=3"]))
    run_stages(load_stages(path, ["resume=auto", "train.steps=8"]))
    assert len(losses(place.output / "whole" / "learn")) == 8


def test_a_base_that_later_stages_were_built_on_is_not_changed_under_them(place):
    path = write(place, base_then_extension(place))
    run_stages(load_stages(path))
    with pytest.raises(ConfigError, match=r"base/export: is there, but its stage is not finished with"):
        run_stages(load_stages(path, ["resume=auto", "stages.base.train.steps=5"]))
    assert losses(place.output / "whole" / "base")[4:] == []
    with pytest.raises(ConfigError, match=r"whole/base exists: go on from it with resume=auto"):
        run_stages(load_stages(path))
    # what decides nothing about the result leaves a finished stage finished
    run_stages(load_stages(path, ["resume=auto", "train.micro_batch=2", "train.log_every=3", "monitor.batch_size=4"]))
    assert events(place.output / "whole" / "base")[-1] == {"event": "end", "step": 4}


def test_a_stage_that_another_went_on_from_is_not_trained_further_in_silence(place):
    path = write(place, learn_then_review(place))
    run_stages(load_stages(path))
    with pytest.raises(CheckpointError, match=r"began from another state of .*learn than its newest checkpoint"):
        run_stages(load_stages(path, ["resume=auto", "stages.learn.train.steps=8"]))
    assert len(losses(place.output / "whole" / "learn")) == 8 and len(losses(place.output / "whole" / "review")) == 2


def test_a_line_that_a_crash_cut_off_does_not_keep_later_stages_waiting(place):
    path = write(place, learn_then_review(place))
    run_stages(load_stages(path, ["stages.learn.train.stop_after=3"]))
    with (place.output / "whole" / "learn" / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run_stages(load_stages(path, ["resume=auto"]))
    assert (place.output / "whole" / "review" / "checkpoints" / "step-2").is_dir()


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 2), ("bf16", 0), ("bf16", 3)])
def test_a_review_begins_with_what_was_learnt_and_without_its_momentum(place, precision, zero_stage):
    train = {"precision": precision, "zero_stage": zero_stage}
    # at this learning rate a step changes nothing, so that the first checkpoint shows the start
    stages = learn_then_review(place)
    stages[1]["train"] = {"steps": 1, "lr": 1e-30, "warmup": 0}
    stages = [{**stage, "train": {**train, **stage.get("train", {})}} for stage in stages]
    run_stages(load_stages(write(place, stages)))
    learn, review = (place.output / "whole" / name for name in ("learn", "review"))
    learnt, begun = tensors(learn, 6, "module"), tensors(review, 1, "module")
    assert learnt.keys() == begun.keys()
    assert all(torch.allclose(learnt[n].float(), begun[n].float(), rtol=0, atol=1e-7) for n in learnt)
    # one step of AdamW: the second moment is (1 - beta2) g², whatever was learnt before
    squares = {n: t for n, t in tensors(review, 1, "optimizer").items() if "exp_avg_sq" in n}
    firsts = {n.replace("exp_avg_sq", "exp_avg"): t / 0.05 for n, t in squares.items()}
    moments = tensors(review, 1, "optimizer")
    assert all(torch.allclose((moments[n] / 0.1) ** 2, square, rtol=1e-3) for n, square in firsts.items())
    assert any(square.any() for square in firsts.values())


def test_a_review_is_measured_against_the_base_and_reads_each_corpus_on(place):
    path = write(place, learn_then_review(place), monitor={"enabled": True})
    run_stages(load_stages(path))
    learn, review = (place.output / "whole" / name for name in ("learn", "review"))
    rows = lambda run: [json.loads(s) for s in (run / "monitor" / "forgetting.jsonl").read_text().splitlines()]  # noqa: E731
    last = [(r["base_bits_per_byte"], r["bits_per_byte"]) for r in rows(learn) if r["step"] == 6]
    first = [(r["base_bits_per_byte"], r["bits_per_byte"]) for r in rows(review) if r["step"] == 0]
    assert last == first and all(base != model for base, model in first)
    position = json.loads((review / "checkpoints" / "step-2" / "checkpoint.json").read_text())["data"]
    before = json.loads((learn / "checkpoints" / "step-6" / "checkpoint.json").read_text())["data"]
    assert position["skipped"] == before["drawn"] and sum(position["drawn"].values()) == 16


def test_two_runs_one_after_the_other_read_an_epoch_without_repetition(place):
    config = place.config(train={"batch_size": 4, "micro_batch": 4}, data={"replay": None})
    from moect.data.vocabulary.tokenizer import load_tokenizer

    make = lambda: Loader(config, load_tokenizer(config.model), place.output / "cache")  # noqa: E731
    first, second, whole = make(), make(), make()
    seen = [row for _ in range(5) for batch in first.next_step() for row in batch.input_ids_BS.tolist()]
    second.go_on_after(first.state_dict())
    seen += [row for _ in range(5) for batch in second.next_step() for row in batch.input_ids_BS.tolist()]
    rows = [corpus.row(i).input_ids_S.tolist() for corpus in whole.packed for i in range(corpus.rows_per_epoch)]
    assert len(seen) == len({tuple(row) for row in seen}) == 40 and all(row in rows for row in seen)


@pytest.mark.parametrize(
    "changes",
    [{"corpora": None}, {"drawn": []}, {"drawn": {"en.train.jsonl": -1}}, {"skipped": {"cy.train.jsonl": "1"}}],
)
def test_a_damaged_position_is_not_read_on_from(place, changes):
    from moect.data.vocabulary.tokenizer import load_tokenizer

    config = place.config()
    loader = Loader(config, load_tokenizer(config.model), place.output / "cache")
    for state in (None, {}, loader.state_dict() | changes):
        with pytest.raises(CheckpointError, match="data position is (damaged|incomplete); start from another"):
            loader.go_on_after(state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": {"experts": 3, "top_k": 2}}, r"moe.experts: 4 and the configuration says 3"),
        ({"method": "full"}, r"method: 'moe-ct' and the configuration says 'full'"),
    ],
)
def test_a_start_of_another_shape_is_refused_before_anything_is_trained(place, changes, words):
    learn, review = learn_then_review(place)
    with pytest.raises(CheckpointError, match=words):
        load_stages(write(place, [learn, {**review, **changes}]))


def test_a_start_that_is_a_run_of_another_file_is_checked_before_a_folder_is_made(place):
    learn, review = learn_then_review(place)
    run_stages(load_stages(write(place, [learn])))
    review["model"] = {**review["model"], "start": str(place.output / "whole" / "learn")}
    with pytest.raises(CheckpointError, match="moe.top_k: 2 and the configuration says 1"):
        run_stages(load_stages(write(place, [{**review, "moe": {"top_k": 1}}])))
    assert not (place.output / "whole" / "review").exists()


def test_a_corpus_that_only_a_later_stage_needs_is_missed_before_the_first(place):
    learn, review = learn_then_review(place)
    review["data"] = {"train": [{"path": "gone.jsonl", "lang": "cy"}, {"path": "en.train.jsonl", "lang": "en"}]}
    with pytest.raises(DataError, match=r"gone.jsonl: no file matches"):
        run_stages(load_stages(write(place, [learn, review])))
    assert not (place.output / "whole").exists()


def test_a_stage_is_planned_with_the_shape_of_the_base_that_is_still_to_come(place):
    stages = load_stages(write(place, base_then_extension(place)))
    planned = as_planned(stages[1], stages)
    assert planned.model.from_config == SHAPE and planned.model.tokenizer == stages[0].model.tokenizer
    assert planned.method == "moe-ct" and as_planned(stages[0], stages) == stages[0]
    (place.output / "whole" / "base" / "export").mkdir(parents=True)
    assert as_planned(stages[1], stages) == stages[1]


def test_a_tokenizer_of_another_origin_is_not_overwritten(place):
    path = write(place, base_then_extension(place)[:1])
    run_stages(load_stages(path))
    files = {file: file.read_bytes() for file in (place.output / "tokenizer").iterdir()}
    with pytest.raises(DataError, match="holds something other than a tokenizer of 290 tokens"):
        run_stages(load_stages(path, ["name=again", "model.train_tokenizer=290"]))
    run_stages(load_stages(path, ["name=third"]))  # the same: taken as it is
    assert files == {file: file.read_bytes() for file in (place.output / "tokenizer").iterdir()}


def test_a_stage_config_is_a_run_config_of_its_own(place):
    base, _ = load_stages(write(place, base_then_extension(place)))
    path = place.output / "one.yaml"
    path.write_text(config_to_yaml(base))
    assert load_config(path) == base
