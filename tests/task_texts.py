"""Small tasks of lm-eval, with files of questions, for the monitor's tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from monitor_texts import run_config
from tiny import disturb, tiny_model

from moect.model import MoeConfig, append_moe

WORDS = "one two three four seven hundred and nineteen plus is twenty un dau tri gant".split()
ROLES = {"en": "old", "cy": "new"}
CHOICE = {  # a question with three answers to choose from
    "task": "tiny_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WRITE = {  # a question whose answer is written
    "task": "tiny_write",
    "dataset_path": "json",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def make_model(appended: bool = True):
    """A tiny Qwen3, by default with a module that does something."""
    model = tiny_model("qwen3", vocab_size=300, initializer_range=0.2, max_position_embeddings=512)
    if appended:
        append_moe(model, MoeConfig(experts=3, top_k=2, width=16), seed=0)
        disturb(model)
    return model.eval()


def words(rng: random.Random, most: int) -> str:
    """A few words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def choices(count: int, seed: int) -> list[dict]:
    """Questions of CHOICE, prompts and answers of very different lengths."""
    rng = random.Random(seed)
    return [
        {"prompt": words(rng, 12), "choices": [words(rng, 5) for _ in range(3)], "label": rng.randrange(3)}
        for _ in range(count)
    ]


def write_lines(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, description: dict, **changes) -> str:
    """The YAML file of a task."""
    values = {**description, **changes}
    path = folder / f"{values['task']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def tasks_config(root: Path, *tasks: dict):
    """A run that measures these tasks, of English where they do not say."""
    entries = [{"lang": "en", **task} for task in tasks]
    data = {"root": str(root), "languages": ROLES, "sequence_length": 16}
    data["train"] = [{"path": f"{lang}.txt", "lang": lang} for lang in ROLES]
    return run_config(data=data, monitor={"tasks": entries})
