"""Tasks against what lm-eval itself gives for the exported model, and against loops that are obviously right."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monitor_texts import make_tokenizer
from small_runs import VOCABULARY, Place, launch, make_inputs
from task_texts import CHOICE, WRITE, choices, make_model, tasks_config, words, write_lines, write_task
from tiny import disturb, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moect.errors import ConfigError, TrainingError
from moect.export.folder import export_model
from moect.model import MoeConfig, append_moe
from moect.model.append import base_only
from moect.model.embeddings import append_rows
from moect.monitor.tasks import tasks as tasks_module
from moect.monitor.tasks.answer_overlap import overlap_of
from moect.monitor.tasks.tasks import TaskResult, Tasks, task_rows

FILES = {"test": "choice.jsonl", "validation": "examples.jsonl"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return make_model()


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, most: int = 6) -> str:
    """What the model writes after a prompt, a token at a time, to the end of the line or EOS."""
    ids = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    while len(ids) < begin + most and "\n" not in tokenizer.decode(ids[begin:]):
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return tokenizer.decode(ids[begin:], skip_special_tokens=True).split("\n")[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer, model):
    """Two tasks with their questions; of those that are answered in writing, the model knows two thirds."""
    folder = tmp_path_factory.mktemp("tasks")
    write_lines(folder / "choice.jsonl", choices(11, seed=1))
    write_lines(folder / "examples.jsonl", choices(5, seed=2))
    rng, rows = random.Random(3), []
    for number in range(9):
        prompt = words(rng, 12)
        answer = greedy(model, tokenizer, prompt)
        rows.append({"prompt": prompt, "answer": "no" if number % 3 == 0 else answer})
    write_lines(folder / "write.jsonl", rows)
    write_task(folder, CHOICE)
    write_task(folder, WRITE)
    return folder


def both(place, **changes):
    """A run with both tasks, examples before the choices."""
    choice = {"task": str(place / "tiny_choice.yaml"), "files": FILES, "shots": 2, **changes}
    return tasks_config(place, choice, {"task": str(place / "tiny_write.yaml"), "files": {"test": "write.jsonl"}})


@pytest.fixture(scope="module")
def measured(place, tokenizer, model):
    return Tasks(both(place), tokenizer).measure(model, batch_size=4)


@pytest.fixture(scope="module")
def exported(place, tokenizer, model, tmp_path_factory):
    """The exported model, and the tasks with their files, as the command needs them."""
    folder = tmp_path_factory.mktemp("exported")
    export_model(model, folder / "model", "moect", tokenizer)
    for task, files in ((CHOICE, FILES), (WRITE, {"test": "write.jsonl"})):
        data = {split: str(place / name) for split, name in files.items()}
        shots = {"num_fewshot": 2} if task is CHOICE else {}
        write_task(folder, task, dataset_kwargs={"data_files": data, "cache_dir": str(folder / "cache")}, **shots)
    return folder


def test_the_result_is_what_lm_eval_gives_for_the_exported_model(exported, measured, place, tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported / "model"), "dtype": "float32"},
        device="cpu",
        batch_size=3,
        tasks=["tiny_choice", "tiny_write"],
        task_manager=TaskManager(include_path=str(exported), include_defaults=False),
    )
    for mine, metric in zip(measured, ("acc", "exact_match"), strict=True):
        theirs = results["results"][mine.task]
        assert (mine.metric, mine.value) == (metric, theirs[f"{metric},none"])
        assert mine.stderr == pytest.approx(theirs[f"{metric}_stderr,none"], rel=1e-12)
        assert mine.per_question == [sample[metric] for sample in results["samples"][mine.task]]
        assert 0 < mine.value < 1  # something to get wrong
    theirs = [list(prompt) for sample in results["samples"]["tiny_choice"] for prompt in sample["arguments"]]
    requests = Tasks(both(place), tokenizer)._asked[0].requests
    assert [list(request.args) for request in requests] == theirs  # with the same examples


@pytest.mark.slow
def test_the_value_is_what_the_lm_eval_command_prints(exported, measured, tmp_path):
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "tiny_choice,tiny_write"]
    command += ["--include_path", str(exported), "--device", "cpu", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={exported / 'model'},trust_remote_code=True,dtype=float32"]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--output_path", str(tmp_path / "out")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    for mine in measured:
        assert results[mine.task][f"{mine.metric},none"] == mine.value
        assert f"|{mine.value:.4f}|±  |{mine.stderr:.4f}|" in done.stdout


def test_a_model_with_rows_of_its_own_for_tokens_answers_as_its_export_does(place, tokenizer, tmp_path):
    tasks, plain = Tasks(both(place), tokenizer), make_model()
    model = make_model(appended=False)
    append_rows(append_moe(model, MoeConfig(experts=3, top_k=2, width=16)), range(5, 200))
    disturb(model, scale=0.3)
    export_model(model, tmp_path / "model", "moect", tokenizer)
    results = tasks.measure(model, batch_size=4)
    assert results == tasks.measure(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), batch_size=4)
    assert results != tasks.measure(plain, batch_size=4)
    with base_only(model):
        base = tasks.measure(model, batch_size=4)
    assert base == tasks.measure(make_model(appended=False), batch_size=4)


def test_choices_are_those_of_log_likelihoods_summed_token_by_token_in_fp64(place, tokenizer, model):
    exact = copy.deepcopy(model).double()
    expected = []
    for question in (json.loads(line) for line in (place / "choice.jsonl").read_text().splitlines()):
        sums = []
        for choice in question["choices"]:
            begin = len(tokenizer(question["prompt"])["input_ids"])
            ids = tokenizer(f"{question['prompt']} {choice}")["input_ids"]
            total = 0.0
            for position in range(begin, len(ids)):
                with torch.no_grad():
                    logits_V = exact(torch.tensor([ids[:position]]), use_cache=False).logits[0, -1]
                total += logits_V.log_softmax(-1)[ids[position]].item()
            sums.append(total)
        expected.append(float(np.argmax(sums) == question["label"]))
    result = Tasks(both(place, shots=0), tokenizer).measure(model, batch_size=4)[0]
    assert result.per_question == expected


def test_a_model_answers_in_writing_what_it_writes_by_itself(measured):
    assert measured[1].per_question == [0.0, 1.0, 1.0] * 3
    assert measured[1].questions == 9


def test_a_model_that_knows_nothing_takes_the_shortest_answer(place, tokenizer):
    model = make_model(appended=False)
    model.lm_head.weight.data.zero_()  # every token is equally likely
    rows = [
        {"prompt": "one", "choices": ["two hundred", "two", "two plus three"], "label": label} for label in (0, 1, 1, 2)
    ]
    write_lines(place / "known.jsonl", rows)
    config = tasks_config(place, {"task": str(place / "tiny_choice.yaml"), "files": {"test": "known.jsonl"}})
    result = Tasks(config, tokenizer).measure(model, batch_size=4)[0]
    assert (result.value, result.per_question) == (0.5, [0.0, 1.0, 1.0, 0.0])
    assert result.stderr == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)


def test_neither_batch_size_nor_limit_changes_an_answer(place, tokenizer, model, measured):
    tasks = Tasks(both(place), tokenizer)
    assert [tasks.measure(model, batch_size) for batch_size in (1, 7)] == [measured, measured]
    first = Tasks(both(place, limit=4), tokenizer).measure(model, batch_size=4)[0]
    assert first.per_question == measured[0].per_question[:4]


def test_the_difference_is_paired(place, tokenizer, model, measured):
    tasks = Tasks(both(place), tokenizer)
    with base_only(model):
        base = tasks.measure(model, batch_size=4, base=True)
    assert base == tasks.measure(make_model(appended=False), batch_size=4)
    rows = task_rows(7, {"en": "old"}, base, measured)
    assert [row["task"] for row in rows] == ["tiny_choice", "tiny_write"]
    for row, before, now in zip(rows, base, measured, strict=True):
        apart = np.array(now.per_question) - np.array(before.per_question)
        assert row["difference"] == pytest.approx(apart.mean())
        assert row["difference_stderr"] == pytest.approx(apart.std(ddof=1) / np.sqrt(len(apart)))
        assert (row["value"], row["base_value"]) == (now.value, before.value)
        assert (row["step"], row["lang"], row["role"], row["questions"]) == (7, "en", "old", len(apart))
    assert any(row["difference"] for row in rows)
    assert [TaskResult(**json.loads(json.dumps(dataclasses.asdict(result)))) for result in base] == base


def test_a_metric_that_is_no_mean_has_a_value_and_cannot_be_paired(place, tokenizer, model):
    import sacrebleu

    task = write_task(place, WRITE, task="tiny_bleu", metric_list=[{"metric": "bleu"}])
    config = tasks_config(place, {"task": task, "files": {"test": "write.jsonl"}})
    result = Tasks(config, tokenizer).measure(model, batch_size=4)[0]
    lines = [json.loads(line) for line in (place / "write.jsonl").read_text().splitlines()]
    written = [greedy(model, tokenizer, line["prompt"]) for line in lines]
    expected = sacrebleu.corpus_bleu(written, [[line["answer"] for line in lines]]).score
    assert (result.metric, result.value) == ("bleu", pytest.approx(expected)) and 0 < expected < 100
    assert (result.questions, result.stderr, result.per_question) == (9, None, [])
    row = task_rows(1, {"en": "old"}, [result], [result])[0]
    assert (row["questions"], row["difference"], row["difference_stderr"]) == (9, 0.0, None)


def test_one_question_has_no_standard_error():
    results = [TaskResult("t", "en", "acc", value, None, [value], 1) for value in (0.0, 1.0)]
    row = task_rows(1, {"en": "old"}, *[[result] for result in results])[0]
    assert (row["difference"], row["stderr"], row["difference_stderr"]) == (1.0, None, None)


def _measure_on_rank(rank: int, world_size: int, place, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    tokenizer, model = make_tokenizer(folder / f"tokenizer-{rank}"), make_model()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    values = {}
    tasks, few = Tasks(both(place), tokenizer), Tasks(both(place, limit=1), tokenizer)
    for name, mine, divided in (("shared", tasks, False), ("divided", tasks, True), ("few", few, False)):
        calls.clear()
        values[name] = [dataclasses.asdict(r) for r in mine.measure(model, 4, rank, world_size, divided)]
        values[f"{name} calls"] = len(calls)
    if rank == 1:
        tasks_module.live_lm = None  # whatever fails, on one rank alone
    try:
        tasks.measure(model, 4, rank, world_size)
    except (TypeError, TrainingError) as error:
        values["failure"] = f"{type(error).__name__}: {error}"
    (folder / f"rank-{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


def test_two_ranks_give_what_one_gives_and_do_not_wait_for_one_that_fails(place, tokenizer, model, measured, tmp_path):
    mp.spawn(_measure_on_rank, (2, place, tmp_path), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    few = Tasks(both(place, limit=1), tokenizer).measure(model, batch_size=4)
    for values in ranks:
        assert [TaskResult(**r) for r in values["shared"]] == measured
        assert [TaskResult(**r) for r in values["divided"]] == measured
        assert [TaskResult(**r) for r in values["few"]] == few and few[0].questions == 1
    assert ranks[0]["divided calls"] == ranks[1]["divided calls"] > ranks[0]["shared calls"]
    assert ranks[0]["failure"].startswith("TrainingError: rank 1: TypeError")
    assert ranks[1]["failure"].startswith("TypeError")


@pytest.mark.slow
@pytest.mark.parametrize("ranks, stage", [(2, 1), (2, 3)])
def test_a_run_on_several_ranks_measures_its_base_as_plain_transformers_does(place, tmp_path, ranks, stage):
    for name in ("inputs", "output"):
        (tmp_path / name).mkdir()
    inputs = make_inputs(tmp_path / "inputs")
    base = tiny_model("qwen3", vocab_size=VOCABULARY, initializer_range=0.2)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "base")
    prompts = [json.loads(line)["prompt"] for line in (place / "write.jsonl").read_text().splitlines()]
    answers = [greedy(base, tokenizer, prompt) if number % 2 else "no" for number, prompt in enumerate(prompts)]
    lines = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    write_lines(inputs / "write.jsonl", lines)
    written = {"task": str(place / "tiny_write.yaml"), "lang": "cy", "files": {"test": "write.jsonl"}}
    chosen = {"task": str(place / "tiny_choice.yaml"), "lang": "en", "files": {"test": str(place / "choice.jsonl")}}
    run = Place(inputs, tmp_path / "output")
    values = run.values()
    train = {"steps": 2, "warmup": 1, "save_every": 2, "zero_stage": stage}
    config = run.config(train={**values["train"], **train}, monitor={"enabled": True, "tasks": [written, chosen]})
    launch(run.write(config), ranks)
    rows = [json.loads(line) for line in (config.folder / "monitor" / "tasks.jsonl").read_text().splitlines()]
    assert [(row["step"], row["task"]) for row in rows] == [
        (s, t) for s in (0, 2) for t in ("tiny_write", "tiny_choice")
    ]
    expected = Tasks(config, tokenizer).measure(base, batch_size=4)
    assert expected[0].per_question == [number % 2 for number in range(9)]
    for row, result in zip(rows, expected * 2, strict=True):
        assert (row["base_value"], row["base_stderr"]) == (result.value, pytest.approx(result.stderr))


def test_examples_come_from_the_other_split(place, tokenizer):
    pool = [json.loads(line)["prompt"] for line in (place / "examples.jsonl").read_text().splitlines()]
    asked = [json.loads(line)["prompt"] for line in (place / "choice.jsonl").read_text().splitlines()]
    requests = Tasks(both(place), tokenizer)._asked[0].requests
    assert len(requests) == 3 * len(asked)
    for request in requests:
        *examples, question = request.args[0].split("\n\n")
        assert question == asked[request.doc_id]
        assert len(examples) == 2 and all(any(text.startswith(p) for p in pool) for text in examples)


def test_examples_never_come_from_the_questions(place, tokenizer, caplog):
    choice, write = str(place / "tiny_choice.yaml"), str(place / "tiny_write.yaml")
    for task, files in ((choice, {"test": "choice.jsonl"}), (write, {"test": "write.jsonl"})):
        with pytest.raises(ConfigError, match="2 examples would come from the questions themselves"):
            Tasks(tasks_config(place, {"task": task, "files": files, "shots": 2}), tokenizer)
    files = {"test": "choice.jsonl", "validation": "choice.jsonl"}
    with pytest.raises(ConfigError, match="has both the questions and the examples"):
        Tasks(tasks_config(place, {"task": choice, "files": files, "shots": 2}), tokenizer)
    write_lines(place / "mixed.jsonl", [*choices(3, seed=9), choices(11, seed=1)[4]])
    Tasks(tasks_config(place, {"task": choice, "files": {**files, "validation": "mixed.jsonl"}, "shots": 2}), tokenizer)
    assert "1 of its questions are among its examples too" in caplog.text


def test_a_task_without_examples_of_its_own_takes_them_from_a_further_file(place, tokenizer):
    write_lines(place / "train.jsonl", [{"prompt": "tri", "answer": "three"}])
    files = {"test": "write.jsonl", "train": "train.jsonl"}
    config = tasks_config(place, {"task": str(place / "tiny_write.yaml"), "files": files, "shots": 1})
    assert Tasks(config, tokenizer)._asked[0].requests[0].args[0].startswith("trithree\n\n")


def test_nothing_that_a_training_depends_on_is_different_afterwards(place, tokenizer):
    import datasets  # noqa: F401  (to import it sets its logger up)

    model = make_model().train()
    model.model.norm.eval()
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, *_: seen.append(module.training))
    names = ("", "lm_eval", "lm_eval.api.task", "datasets", "transformers")

    def everything():
        loggers = [logging.getLogger(name) for name in names]
        return {
            "tensors": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
            "modes": [module.training for module in model.modules()],
            "gradients": [parameter.requires_grad for parameter in model.parameters()],
            "attributes": sorted(vars(model)),
            "config": model.config.to_json_string(use_diff=False),
            "generation": model.generation_config.to_json_string(use_diff=False),
            "tokenizer": (tokenizer.pad_token, tokenizer.padding_side, tokenizer.backend_tokenizer.to_str()),
            "generators": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
            "environment": dict(os.environ),
            "logging": [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers],
        }

    sampled = {**WRITE["generation_kwargs"], "do_sample": True, "temperature": 1.0}
    task = write_task(place, WRITE, task="tiny_sample", generation_kwargs=sampled)
    config = both(place)
    config.monitor.tasks[1].task = task
    before = everything()
    tasks = Tasks(config, tokenizer)
    results = [tasks.measure(model, batch_size=4) for _ in range(2)]
    after = everything()
    for name in before:
        assert after[name] == before[name], name
    assert results[0] == results[1]  # the sample, too
    assert seen and not any(seen)


def test_nothing_is_printed_and_no_bar_is_shown_where_nobody_watches(place, tokenizer, model, capfd, caplog):
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        Tasks(both(place), tokenizer).measure(model, batch_size=4)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_questions_longer_than_the_model_are_told_once(place, tokenizer, caplog):
    model = make_model(appended=False)
    model.config.max_position_embeddings = 40
    config = tasks_config(place, {"task": str(place / "tiny_choice.yaml"), "files": FILES})
    tasks = Tasks(config, tokenizer)
    for _ in range(2):
        tasks.measure(model, batch_size=4)
    assert len(caplog.records) == 1 and "maximum length (40)" in caplog.text and "times)" in caplog.text


def test_answers_that_the_model_has_no_room_for_are_one_clear_error(place, tokenizer):
    model = make_model(appended=False)
    model.config.max_position_embeddings = 6
    for task, files in (("tiny_choice", FILES), ("tiny_write", {"test": "write.jsonl"})):
        tasks = Tasks(tasks_config(place, {"task": str(place / f"{task}.yaml"), "files": files}), tokenizer)
        with pytest.raises(ConfigError, match=f"{task} does not fit into the 6 tokens that the model has room for"):
            tasks.measure(model, batch_size=4)


def test_the_key_is_of_all_that_a_result_depends_on(place, tokenizer, tmp_path):
    def key(**changes):
        return Tasks(both(place, **changes), tokenizer).key

    write_lines(place / "others.jsonl", choices(5, seed=3))
    kept = key()
    assert key() == kept
    keys = [
        kept,
        key(shots=1),
        key(limit=3),
        key(lang="cy"),
        key(files={**FILES, "validation": "others.jsonl"}, shots=1),
    ]
    keys.append(Tasks(both(place), tokenizer, make_tokenizer(tmp_path, bos=False)).key)
    changed = write_task(tmp_path, CHOICE, target_delimiter="")
    keys.append(key(task=changed))
    rows = choices(11, seed=1)
    rows[10]["label"] = (rows[10]["label"] + 1) % 3
    write_lines(place / "changed.jsonl", rows)
    keys.append(key(files={**FILES, "test": "changed.jsonl"}))
    assert len(set(keys)) == len(keys)
    same = write_task(tmp_path, CHOICE)
    assert key(task=same) == kept  # the same task, lying elsewhere


def test_answers_are_compared_as_in_squad():
    def compared(written, *answers):
        return tuple(overlap_of({"answers": list(answers)}, [written]).values())

    assert compared("The Norman army!", "norman  Army") == (1.0, 1.0)
    assert compared("in the year 1066", "1066") == (pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1)), 0.0)
    assert compared("Paris", "London", "paris") == (1.0, 1.0)
    assert compared("", "x") == compared("x", "y") == (0.0, 0.0)
    assert compared("the", "a") == (1.0, 1.0)


def test_the_table_of_tasks_has_base_model_and_paired_difference():
    from moect.monitor.reporting.table import render_tasks

    base = TaskResult("t", "cy", "acc", 0.5, 0.25, [1.0, 0.0], 2)
    now = TaskResult("t", "cy", "acc", 1.0, None, [1.0, 1.0], 2)
    (line,) = render_tasks(task_rows(3, {"cy": "new"}, [base], [now])).splitlines()[2:]
    assert line.split("  ")[-3:] == ["0.500 ± 0.250", "1.000", "+0.500 ± 0.500"]
