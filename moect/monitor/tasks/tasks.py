"""Tasks of lm-eval on the live model, at every checkpoint: XCOPA, MGSM and whatever else `monitor.tasks` names.

Prompts, scoring and aggregation are the library's, and so is the number: what the `lm_eval` command gives for the
exported model. Which questions are asked, and with which examples, is settled once and for all models and ranks.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moect.config import RunConfig
from moect.distributed import together
from moect.errors import ConfigError, DataError, MoectError
from moect.monitor.measuring.score import evaluation_mode
from moect.monitor.rows import Row
from moect.monitor.tasks.documents import local_dataset, questions_among_examples
from moect.monitor.tasks.live_model import live_lm
from moect.monitor.tasks.manners import calm, own_seeds
from moect.monitor.tasks.sources import OWN, Leaf, check_tasks, find_leaves, one_line

__all__ = ["TaskResult", "Tasks", "check_tasks", "task_rows"]

log = logging.getLogger("moect.monitor")

VERSION = 1  # of what is kept of a base's results
METRICS = ("acc", "acc_norm", "f1", "exact_match")  # the first of these that a task has
FILTERS = ("flexible-extract", "strict-match", "none")  # ways to read an answer out of what was written; likewise
Metric = tuple[str, str]  # name and filter
Answers = dict[int, dict[Metric, Any]]  # by question


@dataclass
class TaskResult:
    """A task under one model.

    Attributes:
        task, lang: which.
        metric: the task's main metric, the first it has of accuracy, length-normalised accuracy, F1 and exact match,
            else its first; where answers are filtered, followed by the filter: `exact_match,flexible-extract`.
        value: over all questions.
        stderr: standard error of a mean; None with one question, or a metric that is no mean.
        per_question: the metric of each question, in their order, so that two models can be paired; empty for a metric
            that is no mean, or that not every question has.
        questions: their number.
    """

    task: str
    lang: str
    metric: str
    value: float
    stderr: float | None
    per_question: list[float]
    questions: int


@dataclass
class _Asked:
    """A task with its questions: requests of lm-eval, each with its prompt, in the order of the questions."""

    leaf: Leaf
    task: Any
    requests: list


class Tasks:
    """The tasks of a run. Every rank makes one, with all questions.

    Args:
        config: the run's.
        tokenizer: the run's; it is copied.
        base_tokenizer: the base's, where tokens were added to it for the run; None: it has the same.

    Raises:
        ConfigError: see `check_tasks`.
        DataError: a dataset that cannot be loaded, or questions that the task cannot put.
    """

    def __init__(self, config: RunConfig, tokenizer, base_tokenizer=None):
        self.tokenizer = copy.deepcopy(tokenizer)
        self.base_tokenizer = copy.deepcopy(base_tokenizer) if base_tokenizer else self.tokenizer
        self._asked: list[_Asked] = []
        self.key = ""
        if leaves := find_leaves(config):
            with calm(tell=False):
                self._asked = [_ask(leaf) for leaf in leaves]
                self.key = self._key()

    def measure(
        self,
        model: nn.Module,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        divided: bool = False,
        base: bool = False,
    ) -> list[TaskResult]:
        """Ask a model all questions. All ranks call this; first each works by itself, then they share what they found.

        Nothing of the model, and no generator of random numbers, is different afterwards. A task that samples what it
        writes has its own seed; its result depends on the number of ranks.

        Args:
            model: a causal LM of transformers, extended or not.
            batch_size: requests a rank takes at once; it makes no difference but for ties.
            rank, world_size: of this process; above 1 the default process group must be there.
            divided: the weights are shared out among the ranks (ZeRO-3), so that all make the same calls: each asks
                all questions. Else each asks some.
            base: the model is the base, and reads with the base's tokenizer.

        Returns:
            One result a task, the same on every rank.

        Raises:
            ConfigError: a task writes more than the model has room for.
            TrainingError: another rank failed.
            RankLost: this one failed while `divided`.
        """
        if not self._asked:
            return []
        part = (0, 1) if divided else (rank, world_size)
        synced = divided and world_size > 1
        found = together(lambda: self._answers(model, batch_size, part, synced, base), divided)
        parts = [found] if divided else _shared(found, world_size)
        return [
            _result(asked, dict(sorted((n, v) for answers in parts for n, v in answers[index].items())))
            for index, asked in enumerate(self._asked)
        ]

    def _answers(self, model, batch_size: int, part: tuple[int, int], synced: bool, base: bool) -> list[Answers]:
        """Of each task, the metrics of the questions that fall to this part of the ranks."""
        tokenizer = self.base_tokenizer if base else self.tokenizer
        with evaluation_mode(model):
            with calm(tell=False):
                lm = live_lm(model, tokenizer, batch_size, synced)
            with calm(tell=True), own_seeds():
                return [_answers(asked, lm, part) for asked in self._asked]

    def _key(self) -> str:
        """sha256 over all that a base's results depend on, but for the base."""
        import lm_eval
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        tokenizer = self.base_tokenizer
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # settings of earlier calls, which do not matter here
        backend.no_padding()
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        settings = [VERSION, lm_eval.__version__, DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED, METRICS, FILTERS]
        whole = hashlib.sha256()
        for part in (settings, [backend.to_str(), special], *(_identity(asked) for asked in self._asked)):
            text = json.dumps(part, sort_keys=True, default=str)
            whole.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return whole.hexdigest()


def task_rows(step: int, roles: dict[str, str], base: list[TaskResult], model: list[TaskResult]) -> list[Row]:
    """Rows of tasks.jsonl: the model beside its base, question by question.

    Args:
        step: of the checkpoint.
        roles: of each language.
        base, model: of the same tasks, in the same order.
    """
    rows = []
    for before, now in zip(base, model, strict=True):
        assert (before.task, before.lang, before.metric) == (now.task, now.lang, now.metric)
        pairs = list(zip(before.per_question, now.per_question, strict=False))
        complete = len(pairs) == before.questions == now.questions
        rows.append(
            {
                "step": step,
                "task": now.task,
                "lang": now.lang,
                "role": roles[now.lang],
                "metric": now.metric,
                "questions": now.questions,
                "value": now.value,
                "stderr": now.stderr,
                "base_value": before.value,
                "base_stderr": before.stderr,
                "difference": now.value - before.value,
                "difference_stderr": _standard_error([after - early for early, after in pairs]) if complete else None,
            }
        )
    return rows


def _standard_error(values: list[float]) -> float | None:
    """Sample standard deviation / sqrt(n); None below two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _ask(leaf: Leaf) -> _Asked:
    """Load a task, and make its prompts as the command makes them for one process: the examples before a question
    depend on how many were drawn before it."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.tasks import TaskManager

    description = leaf.description(functions=True)
    if leaf.files:
        dataset = local_dataset(leaf)
        description["custom_dataset"] = lambda **_: dataset
    try:
        with own_seeds():
            loaded = TaskManager(include_defaults=False).load([description])["tasks"]
            task = next(iter(loaded.values()))
            task.set_config("num_fewshot", leaf.changes["num_fewshot"])
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            task.build_all_requests(limit=leaf.wanted.limit)
    except MoectError:
        raise
    except Exception as error:  # of the hub, the dataset, a template, or the task's own functions
        raise DataError(
            f"{leaf.where}: its questions cannot be made ({one_line(error)}); check that the dataset is there and has "
            "the fields that the task reads"
        ) from error
    if overlap := questions_among_examples(task, leaf):
        log.warning("%s: %d of its questions are among its examples too, in another split", leaf.where, overlap)
    return _Asked(leaf, task, task.instances)


def _answers(asked: _Asked, lm, part: tuple[int, int]) -> Answers:
    """The metrics of every question whose number is `part[0]` modulo `part[1]`."""
    requests = [r for r in asked.requests if r.doc_id % part[1] == part[0]]
    if not requests:
        return {}
    by_kind: dict[str, list] = {}
    for request in requests:
        request.resps, request.filtered_resps = [], {}
        by_kind.setdefault(request.request_type, []).extend([request] * (request.repeats or 1))
    for kind, asked_of in by_kind.items():
        try:
            responses = getattr(lm, kind)(asked_of)
        except AssertionError as error:  # lm-eval asserts that there is room for what is to be written or chosen
            why = str(error).rstrip(".") or "an answer is longer"
            raise ConfigError(
                f"{asked.leaf.where}: {asked.leaf.name} does not fit into the {lm.max_length} tokens that the model "
                f"has room for ({why}); leave it out, or set max_gen_toks in a YAML file of your own"
            ) from error
        for request, response in zip(asked_of, responses, strict=True):
            request.resps.append(response)
    for chain in asked.task._filters:
        chain.apply(requests)
    questions: dict[int, list] = {}
    for request in requests:
        questions.setdefault(request.doc_id, []).append(request)
    answers: Answers = {}
    for number, of_question in questions.items():
        of_question.sort(key=lambda request: request.idx)
        answers[number] = {
            (metric, chain): _plain(value)
            for chain in of_question[0].filtered_resps
            for metric, value in asked.task.process_results(
                of_question[0].doc, [request.filtered_resps[chain] for request in of_question]
            ).items()
        }
    return answers


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, (bool, int)) or hasattr(value, "dtype") and not value.shape else value


def _result(asked: _Asked, answers: Answers) -> TaskResult:
    from lm_eval.api.metrics import mean

    aggregations = asked.task.aggregation()
    aggregation_of: dict[Metric, Callable] = {}
    for metrics in answers.values():
        for name, chain in metrics:
            aggregation_of.setdefault((name, chain), aggregations.get(name, mean))
    main = min(aggregation_of, key=lambda metric: _rank(metric, aggregation_of[metric] is mean))
    values = [metrics[main] for metrics in answers.values() if main in metrics]
    is_mean = aggregation_of[main] is mean
    name, chain = main
    return TaskResult(
        task=asked.leaf.name,
        lang=asked.leaf.wanted.lang,
        metric=name if chain == "none" else f"{name},{chain}",
        value=float(aggregation_of[main](values)),
        stderr=_standard_error(values) if is_mean else None,
        per_question=values if is_mean and len(values) == len(answers) else [],
        questions=len(values),
    )


def _rank(metric: Metric, is_mean: bool) -> tuple:
    """Its place in the choice of the main metric: means first, which can be paired, then as METRICS and FILTERS say."""
    places = [
        known.index(part) if part in known else len(known)
        for part, known in zip(metric, (METRICS, FILTERS), strict=True)
    ]
    return (not is_mean, *places)


def _shared(mine: Any, world_size: int) -> list:
    """What every rank has, in their order."""
    if world_size == 1:
        return [mine]
    import torch.distributed as dist

    gathered = [None] * world_size
    dist.all_gather_object(gathered, mine)
    return gathered


def _identity(asked: _Asked) -> list:
    """What decides about a task's results, wherever its files lie: description, functions, prompts and questions."""
    import lm_eval

    leaf, library = asked.leaf, Path(lm_eval.__file__).parent
    described = json.dumps(leaf.description(functions=False), sort_keys=True, default=_named, ensure_ascii=False)
    functions = []
    if leaf.path:
        described = described.replace(str(leaf.path.parent), ".")
        if not leaf.path.is_relative_to(library) and leaf.path.parent != OWN:
            functions = [
                hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(leaf.path.parent.glob("*.py"))
            ]
    limit, shots = leaf.wanted.limit, leaf.changes["num_fewshot"]
    requests = [[r.doc_id, r.idx, r.request_type, r.repeats, r.args, r.doc] for r in asked.requests]
    return [leaf.name, leaf.wanted.lang, described, functions, limit, shots, requests]


def _named(value: Any) -> str:
    """A function in a description, without its address."""
    return getattr(value, "__qualname__", None) or str(value)
