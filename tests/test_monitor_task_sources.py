"""Which tasks `monitor.tasks` means, and what is wrong with it before anything runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from monitor_texts import make_tokenizer
from task_texts import CHOICE, WRITE, choices, make_model, tasks_config, write_lines, write_task

from moect.errors import ConfigError, DataError
from moect.monitor.tasks import sources as task_sources
from moect.monitor.tasks import tasks as tasks_module
from moect.monitor.tasks.sources import OWN, check_tasks, find_leaves
from moect.monitor.tasks.tasks import Tasks

REAL = Path(os.environ.get("MOECT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def place(tmp_path):
    """A task with questions and examples."""
    write_lines(tmp_path / "choice.jsonl", choices(4, seed=1))
    write_lines(tmp_path / "examples.jsonl", choices(4, seed=2))
    write_task(tmp_path, CHOICE)
    return tmp_path


def choice(place, **changes) -> dict:
    return {"task": str(place / "tiny_choice.yaml"), "files": {"test": "choice.jsonl"}, **changes}


def test_a_run_without_tasks_does_not_load_lm_eval(tmp_path, monkeypatch):
    for module in (task_sources, tasks_module):
        monkeypatch.setattr(module, "calm", None)
    check_tasks(tasks_config(tmp_path))
    tasks = Tasks(tasks_config(tmp_path), make_tokenizer(tmp_path))
    assert tasks.key == "" and tasks.measure(make_model(appended=False), batch_size=1) == []


def test_the_index_of_names_finds_what_lm_eval_finds():
    path = task_sources._library_tasks()["xcopa_sw"]
    assert "task: xcopa_sw\n" in path.read_text()
    assert task_sources._library_tasks()["mgsm_direct_de"].name == "mgsm_direct_de.yaml"
    assert "xcopa" not in task_sources._library_tasks()  # a group


@pytest.mark.slow
def test_groups_and_tags_of_lm_eval_are_measured_task_by_task_and_wrong_names_get_the_nearest(tmp_path):
    names = {}
    for group in ("xcopa", "mgsm_direct", "leaderboard_bbh"):
        leaves = find_leaves(tasks_config(tmp_path, {"task": group}))
        names[group] = [leaf.name for leaf in leaves]
    assert {"xcopa_sw", "xcopa_ta", "xcopa_zh"} < set(names["xcopa"]) and len(names["xcopa"]) == 11
    assert "mgsm_direct_sw" in names["mgsm_direct"]
    assert {leaf.changes["num_fewshot"] for leaf in leaves} == {3}
    with pytest.raises(ConfigError, match=r"tasks\[0\].*no task 'xcopa_swa'; did you mean 'xcopa_sw'"):
        check_tasks(tasks_config(tmp_path, {"task": "xcopa_swa"}))


def test_a_wrong_name_is_told_with_the_nearest_right_one(tmp_path, monkeypatch):
    monkeypatch.setattr(task_sources, "_library_index", lambda: {"xcopa_sw": None})
    with pytest.raises(ConfigError, match="no task 'moect_mgsm_ed'; did you mean 'moect_mgsm_[a-z]*'"):
        check_tasks(tasks_config(tmp_path, {"task": "moect_mgsm_ed"}))
    with pytest.raises(ConfigError, match="no task 'qqqqqq'; `lm_eval ls tasks`"):
        check_tasks(tasks_config(tmp_path, {"task": "qqqqqq"}))
    with pytest.raises(ConfigError, match="there is no such file"):
        check_tasks(tasks_config(tmp_path, {"task": str(tmp_path / "no.yaml")}))


def test_a_group_of_ones_own_names_tasks_beside_it_and_in_its_place(place):
    data = {"data_files": {"test": str(place / "choice.jsonl"), "validation": str(place / "examples.jsonl")}}
    write_task(place, CHOICE, dataset_kwargs=data)
    inline = {**CHOICE, "task": "inline", "dataset_kwargs": data, "num_fewshot": 2}
    group = {"group": "mine", "task": ["tiny_choice", {"group": "inner", "task": [inline]}], "num_fewshot": 1}
    (place / "mine.yaml").write_text(yaml.safe_dump(group))
    leaves = find_leaves(tasks_config(place, {"task": str(place / "mine.yaml")}))
    assert {leaf.name: leaf.changes["num_fewshot"] for leaf in leaves} == {"tiny_choice": 1, "inline": 2}
    with pytest.raises(ConfigError, match="is a group of 2 tasks; give `files` to each"):
        find_leaves(tasks_config(place, choice(place, task=str(place / "mine.yaml"))))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"files": {"test": "missing.jsonl"}}, "split 'test': .*missing.jsonl: no file matches"),
        ({"files": {"validation": "examples.jsonl"}}, "its questions are of split 'test'; give `files` for that one"),
        ({"files": {"test": "choice.jsonl", "tset": "choice.jsonl"}}, "has no split 'tset', but 'test', 'validation'"),
        ({"files": {"test": "tiny_choice.yaml"}}, "unknown kind of file"),
        ({"files": {"test": "choice.txt"}}, "is no file of JSON lines"),
        ({"files": {}}, "tiny_choice has no text of its own"),
        ({"shots": 1}, "its 1 examples would come from the questions themselves"),
    ],
    ids=str,
)
def test_wrong_files_and_shots_are_told_before_anything_runs(place, changes, message):
    (place / "choice.txt").write_text("one\n")
    with pytest.raises(ConfigError, match=message) as told:
        check_tasks(tasks_config(place, choice(place, **changes)))
    assert "monitor.tasks[0], task" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"doc_to_image": "picture"}, "shows images or sound"),
        ({"num_fewshot": 0}, "is always asked without examples; leave `shots` out"),
        ({"test_split": None, "validation_split": None}, "names no `test_split`"),
        ({"include": "nothing.yaml"}, "cannot be used: FileNotFoundError"),
    ],
    ids=str,
)
def test_descriptions_that_cannot_be_used_are_told_before_anything_runs(place, changes, message):
    task = write_task(place, CHOICE, **changes)
    with pytest.raises(ConfigError, match=message):
        check_tasks(tasks_config(place, choice(place, task=task, shots=2)))


def test_damaged_yaml_and_functions_that_are_not_there_are_told(place):
    for text, message in (("task: [", "ParserError"), ("task: x\nprocess_docs: !function nowhere.f", "ImportError")):
        (place / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=f"bad.yaml cannot be used: {message}"):
            check_tasks(tasks_config(place, choice(place, task=str(place / "bad.yaml"))))
    (place / "bad.yaml").write_text("dataset_path: json")
    with pytest.raises(ConfigError, match="names neither a task nor a group"):
        check_tasks(tasks_config(place, choice(place, task=str(place / "bad.yaml"))))


def test_code_from_the_hub_is_never_run(place):
    task = write_task(place, WRITE, metric_list=[{"metric": "rouge_of_the_hub"}])
    with pytest.raises(ConfigError, match="its metric 'rouge_of_the_hub' would be code from the hub"):
        check_tasks(tasks_config(place, choice(place, task=task)))
    (place / "evil.py").write_text("import evaluate\nscore = evaluate.load('code_eval')\n")
    (place / "evil.yaml").write_text("task: evil\ntest_split: test\nprocess_results: !function evil.score\n")
    with pytest.raises(ConfigError, match="the metric 'code_eval' would be code from the hub, which is never run"):
        check_tasks(tasks_config(place, {"task": str(place / "evil.yaml"), "files": {"test": "write.jsonl"}}))


def test_the_same_task_twice_for_a_language_is_refused(place):
    with pytest.raises(ConfigError, match=r"tasks\[1\].*monitor.tasks\[0\].* measures 'tiny_choice' too"):
        check_tasks(tasks_config(place, choice(place), choice(place, limit=2)))
    check_tasks(tasks_config(place, choice(place), choice(place, lang="cy")))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}\n[1]\n", ":2: is no JSON object"),
        ("{}\n\n{'a'}\n", ":3: is not JSON"),
        ("", "has no lines"),
        ('{"prompt": "a"}\n{"prompt": ["b"]}\n', "do not make a table"),
        ('{"question": "a"}\n', "its questions cannot be made .*check that the dataset is there and has the fields"),
    ],
)
def test_files_that_are_no_questions_of_the_task_are_told(place, text, message):
    (place / "choice.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as told:
        Tasks(tasks_config(place, choice(place)), make_tokenizer(place / "tokenizer"))
    assert "\n" not in str(told.value)


def test_a_dataset_that_is_not_here_and_cannot_be_fetched_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    task = write_task(tmp_path, CHOICE, dataset_path="nobody/no-such-questions")
    with pytest.raises(DataError, match="its questions cannot be made"):
        Tasks(tasks_config(tmp_path, {"task": task}), make_tokenizer(tmp_path))


LINES = {
    "mgsm": {"question": "1 + 2 = ?", "answer": "3"},
    "xquad": {"context": "A and B.", "question": "Who?", "answers": ["A"], "answer_start": [0]},
}


@pytest.mark.parametrize("task", sorted(path.stem for path in OWN.glob("*.yaml")))
def test_our_own_tasks_ask_as_those_of_lm_eval_do(task, tmp_path):
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    _, family, lang = task.split("_")
    line = LINES[family]
    write_lines(tmp_path / "lines.jsonl", [line])
    asked = Tasks(tasks_config(tmp_path, {"task": task, "files": {"test": "lines.jsonl"}}), make_tokenizer(tmp_path))
    (request,) = asked._asked[0].requests
    library = task_sources._library_tasks()[{"mgsm": "mgsm_direct", "xquad": "xquad"}[family] + f"_{lang}"]
    theirs = load_yaml(library, resolve_func=False)
    if family == "mgsm":
        fields, target = {**line, "answer": None, "answer_number": 3}, "3"
    else:
        fields, target = {**line, "answers": {"text": line["answers"]}}, "A"
    own = load_yaml(OWN / f"{task}.yaml", resolve_func=False)
    assert request.args[0] == apply_template(theirs["doc_to_text"], fields)
    assert request.args[1] == own["generation_kwargs"] == theirs["generation_kwargs"]
    assert asked._asked[0].task.doc_to_target(request.doc) == apply_template(theirs["doc_to_target"], fields) == target
    assert own.get("filter_list") == theirs.get("filter_list")
    assert own.get("target_delimiter", " ") == theirs["target_delimiter"]


@pytest.mark.skipif(not (REAL / "eval").is_dir(), reason="needs published test sets: set MOECT_DATA")
def test_the_published_sets_are_asked_from_their_files(tmp_path):
    entries = [
        {"task": "xcopa_sw", "files": {"test": "eval/xcopa/sw.test.jsonl.gz"}},
        {
            "task": "xcopa_zh",
            "files": {"test": "eval/xcopa/zh.test.jsonl.gz", "validation": "eval/xcopa/zh.val.jsonl.gz"},
            "shots": 1,
        },
        {"task": "moect_mgsm_sw", "files": {"test": "eval/mgsm/sw.test.jsonl.gz"}},
        {"task": "moect_xquad_de", "files": {"test": "eval/xquad/de.test.jsonl.gz"}},
    ]
    tasks = Tasks(tasks_config(REAL, *({**entry, "limit": 4} for entry in entries)), make_tokenizer(tmp_path))
    model = make_model()
    model.config.max_position_embeddings = 4096
    model.generate = lambda input_ids, **kwargs: input_ids  # writes nothing: what it would is no matter here
    results = tasks.measure(model, batch_size=4)
    metrics = ["acc", "acc", "exact_match,flexible-extract", "f1"]
    assert [result.metric for result in results] == metrics
    assert all(result.questions == len(result.per_question) == 4 for result in results)
    kept = json.loads(json.dumps(results[0].per_question))
    assert set(kept) <= {0.0, 1.0}
