"""Several runs in one file: a base and its extension, or an extension and its review, one after another.

    name: real
    data: {…}                                      what all stages share
    stages:
      - {name: base, method: full, model: {…}}     its own keys, over the shared ones
      - {name: extend, model: {base: stage:base}}  built on the export of an earlier stage

A stage is a run like any other, in the folder `output`/`name`/STAGE.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moect.config import RunConfig, config_from_dict, override_value, read_values
from moect.errors import ConfigError, DataError, ForgettingError, MoectError

log = logging.getLogger("moect.stages")

REFERENCE = "stage:"
OF_ALL = ("output", "resume", "stages")  # keys that a stage cannot have for itself


def load_stages(path: str | Path, overrides: list[str] = ()) -> list[RunConfig]:
    """The runs that a file describes, in their order; one, if it has no `stages`.

    A stage's keys are merged over the file's: mappings key by key, everything else replaced.

    Args:
        path: a YAML file.
        overrides: `section.key=value` for every stage, `stages.NAME.section.key=value` for one; the later wins.

    Raises:
        ConfigError: the file cannot be read, or something in it cannot be meant.
    """
    return stages_of(read_values(path), str(path), overrides)


def stages_of(values: dict, where: str, overrides: list[str] = ()) -> list[RunConfig]:
    """The runs that plain values describe; arguments and errors as for `load_stages`, `where` begins the messages."""
    values = copy.deepcopy(values)
    if "stages" not in values:
        if lost := [o for o in overrides if o.startswith("stages.")]:
            raise ConfigError(f"override {lost[0]!r}: {where} has no `stages`; leave the first two parts out")
        for override in overrides:
            override_value(values, override)
        return [config_from_dict(values, where)]
    stages = values.pop("stages")
    names = _names(stages, where)
    common = [o for o in overrides if o.split("=")[0] in ("name", "output", "resume")]
    for override in common:
        override_value(values, override)
    group = values.pop("name", RunConfig.name)
    if not isinstance(group, str) or not group or "/" in group or group.startswith("."):
        raise ConfigError(f"{where}: `name` is {group!r}: give a plain folder name")
    folder = Path(str(values.pop("output", RunConfig.output))) / group
    configs = []
    for number, stage in enumerate(stages):
        merged = {**merge(values, stage), "output": str(folder)}
        for override in [o for o in overrides if o not in common]:
            wanted, rest = _of_stage(override, names)
            if wanted in (None, stage["name"]):
                override_value(merged, rest)
        here = f"{where}: stage {stage['name']}"
        _resolve(merged, folder, names[:number], here)
        configs.append(config_from_dict(merged, here))
        _check_origin(configs[-1], configs[:-1], here)
    return configs


def run_stages(stages: list[RunConfig]) -> None:
    """Train each stage, or go on with it, and write its report; export those that a later stage is built on.

    Every rank calls it. With `resume: auto`, stages that are finished are skipped, and the first that is not goes on.
    A stage that stops early (`train.stop_after`) ends the sequence.

    Raises:
        ForgettingError: a stage forgot more than it may, and is to end then.
        MoectError: whatever the user can put right; a missing file, or a batch that does not divide, of any stage
            before the first.
    """
    from moect import distributed
    from moect.data.batches.loader import check_division
    from moect.train.loop import train

    _, world_size = distributed.start(stages[0].health.timeout_minutes)
    for config in stages:
        check_division(config.train.batch_size, config.train.micro_batch, world_size)
    distributed.on_main(lambda: _check_files(stages))
    for number, config in enumerate(stages):
        if len(stages) > 1 and distributed.is_main():
            print(f"\nstage {number + 1} of {len(stages)}: {config.name}", flush=True)
        later = stages[number + 1 :]
        if distributed.on_main(partial(_skips, config, later)):
            if distributed.is_main():
                print(f"{config.folder}: finished before{_changed_since(config)}", flush=True)
        else:
            try:
                train(config)
            except ForgettingError:  # what led there is in the report
                distributed.on_main(partial(_conclude, config, []))
                raise
            gc.collect()  # the engine's cycles hold the model of this stage
        if not distributed.on_main(partial(_conclude, config, later)):
            return


def plan_stages(stages: list[RunConfig], ranks: int, gpu: str | None = None, mfu: float = 0.35) -> list[dict]:
    """The plan of each run of a file, without reading weights or fetching text.

    Args:
        stages: as `load_stages` gives them.
        ranks, gpu, mfu: as `make_plan` takes them.

    Raises:
        MoectError: whatever can be known to be wrong with the configuration, the base's shape or the texts.
    """
    from moect.data.batches.loader import check_division, planned_data
    from moect.export.planned import planned_export
    from moect.model.build import build_model
    from moect.model.ready_experts import check_source
    from moect.monitor.measuring.cost import planned_lengths
    from moect.plan import make_plan
    from moect.train.meters import find_gpu
    from moect.train.token_rows import planned_rows

    if gpu:
        find_gpu(gpu)
    plans = []
    tokenizers = {}
    for config in stages:
        check_division(config.train.batch_size, config.train.micro_batch, ranks)
        planned = as_planned(config, stages)
        teacher = as_planned(_teacher(config, stages), stages)
        which = teacher.model.tokenizer or teacher.model.base
        if teacher.model.extend_tokenizer:
            which = repr([teacher.model, teacher.data.train])
        if which not in tokenizers:
            tokenizers[which] = _tokenizer(teacher)
        cache = Path(config.output) / ".cache"
        data = planned_data(planned, tokenizers[which], cache)
        known = planned_rows(planned, tokenizers[which], cache)
        model = build_model(planned, meta=True, **known)
        held_out = planned_lengths(planned, tokenizers[which], cache) if planned.monitor.enabled else None
        plan = make_plan(planned, model, data.records, ranks, gpu, mfu, data.samples, held_out)
        if plan["embeddings"] and len(known) < _unknowns(planned):
            plan["embeddings"]["at_most"] = True
        plan["export"] = planned_export(planned, model)
        if config.model.experts_from and config.model.experts_from not in map(_export, stages):
            check_source(planned)
        if planned is not config:
            plan["base"] = f"{config.model.base} (to come)"
        plans.append(plan)
    return plans


def prepare_stages(
    stages: list[RunConfig], workers: int | None = None, inspect: bool = False, sample: float = 1.0
) -> Iterator[tuple[RunConfig, list[str]]]:
    """Tokenize the corpora of each run of a file, and report on them.

    Args:
        stages: as `load_stages` gives them.
        workers: processes; None: as many as there are cores.
        inspect: look for duplicates, held-out text and other languages too.
        sample: share of the documents to inspect.

    Yields:
        Each run, with the tables to show and the files written.

    Raises:
        MoectError: whatever can be known to be wrong with the texts or the tokenizer.
    """
    from moect.data.inspection.inspect import inspect_data
    from moect.data.inspection.table import render as render_inspection
    from moect.data.tokens.prepare import prepare, render, write_report
    from moect.data.vocabulary.tokenizer import run_tokenizer

    _check_files(stages, held_out=inspect)
    for config in stages:
        teacher = _teacher(config, stages)
        planned = as_planned(teacher, stages)
        if planned is not teacher:  # the base is still to be made, but the stage that makes it has its tokenizer
            planned = dataclasses.replace(planned, model=dataclasses.replace(planned.model, train_tokenizer=None))
        tokenizer = run_tokenizer(planned)
        folder = Path(config.output) / f"{config.name}-data"
        result = prepare(config, tokenizer, workers)
        told = [render(result), f"wrote {write_report(result, folder / 'prepare.json')}"]
        if inspect:
            findings = inspect_data(config, Path(config.output) / ".cache", folder, sample, workers)
            told += [f"\n{render_inspection(findings)}", f"wrote {folder}/inspection.json and findings.jsonl"]
        yield config, told


def is_finished(config: RunConfig) -> bool:
    """Whether a run has ended at its last step, and nothing that decides about its result has changed since: neither
    the configuration, nor its base, nor the run that it went on from."""
    from moect.model.build import base_fingerprint
    from moect.train.checkpoints.reading import list_checkpoints, read_info
    from moect.train.checkpoints.same_run import check_same_run, check_same_start

    if not ended(config):
        return False
    try:
        info = read_info(list_checkpoints(config.folder / "checkpoints")[0])
        check_same_run(info, config, base_fingerprint(config.model, config.seed), str(config.folder))
        check_same_start(info, config, str(config.folder))
    except (IndexError, MoectError):  # the run itself will say what it is
        return False
    return True


def _changed_since(config: RunConfig) -> str:
    """What is different from when a finished run was made, and came too late; for its line on the screen."""
    from moect.model.build import base_fingerprint
    from moect.train.checkpoints.reading import list_checkpoints, read_info
    from moect.train.checkpoints.same_run import check_same_run

    info = read_info(list_checkpoints(config.folder / "checkpoints")[0])
    changed = check_same_run(info, config, base_fingerprint(config.model, config.seed), str(config.folder))
    return "".join(f"\n  not used: {line}" for line in changed)


def as_planned(config: RunConfig, stages: list[RunConfig]) -> RunConfig:
    """The run as it can be planned today: while the stage that makes its base is to come, with that stage's shape."""
    for earlier in stages:
        if config.model.base == _export(earlier) and not Path(config.model.base).exists():
            earlier = as_planned(earlier, stages)
            names = ("base", "from_config", "tokenizer", "train_tokenizer")
            values = {name: getattr(earlier.model, name) for name in names}
            values["tokenizer"] = config.model.tokenizer or values["tokenizer"]
            return dataclasses.replace(config, model=dataclasses.replace(config.model, **values))
    return config


def _teacher(config: RunConfig, stages: list[RunConfig]) -> RunConfig:
    """The run whose extended tokenizer this one has: a run that goes on from another has that one's."""
    for earlier in stages:
        if config.model.extend_tokenizer and config.model.start == str(earlier.folder):
            return _teacher(earlier, stages)
    return config


def _unknowns(config: RunConfig) -> int:
    """What there is to know about rows and added tokens of a run."""
    return bool(config.model.extend_tokenizer) + (config.model.train_embeddings == "unseen")


def _skips(config: RunConfig, later: list[RunConfig]) -> bool:
    """Whether there is nothing left to do in a stage.

    Raises:
        ConfigError: there is, but later stages were built on the stage as it was.
    """
    if config.resume == "never":  # then there is no such folder yet, or the run refuses
        return False
    if is_finished(config):
        return True
    if _is_base(config, later) and Path(_export(config)).exists():
        raise ConfigError(
            f"{_export(config)}: is there, but its stage is not finished with this configuration: train.steps, data or "
            "model changed, or it was exported early; change that back, move the export away, or choose another name=…"
        )
    return False


def ended(config: RunConfig) -> bool:
    """Whether the last thing that a run has logged is its last step."""
    try:
        last = json.loads((config.folder / "log.jsonl").read_bytes().rstrip().rpartition(b"\n")[2])
    except (OSError, ValueError):
        return False
    return last.get("event") == "end" and last["step"] == config.train.steps


def _is_base(config: RunConfig, later: list[RunConfig]) -> bool:
    return any(_export(config) in (stage.model.base, stage.model.experts_from) for stage in later)


def _conclude(config: RunConfig, later: list[RunConfig]) -> bool:
    """Export a stage if it is a base, and report on it; False if it is not finished."""
    from moect.export.run import export_run
    from moect.monitor.reporting.page.report import write_report
    from moect.monitor.reporting.tensorboard import write_end

    finished = ended(config)
    try:
        for path in write_report(config.folder):
            print(f"wrote {path}", flush=True)
        write_end(config)
    except Exception as error:  # no reason to hold the training up, or the stages after it
        log.warning("no report: %s", error if isinstance(error, MoectError) else repr(error))
    if finished and _is_base(config, later) and not Path(_export(config)).exists():
        print(f"wrote {export_run(config.folder).folder}", flush=True)
    if not finished and later:
        print(f"{config.folder}: not finished, so {', '.join(c.name for c in later)} must wait", flush=True)
    return finished


def _tokenizer(config: RunConfig):
    """The run's tokenizer, or None where the base comes without or it is still to be made."""
    from moect.data.vocabulary.tokenizer import find_tokenizer

    model = config.model
    if model.extend_tokenizer:  # it is learned from them
        _check_files([config])
    try:
        tokenizer = find_tokenizer(config)
    except DataError as error:
        if model.tokenizer and os.path.exists(os.path.expanduser(model.tokenizer)):
            raise
        log.info("documents and tokens are not counted: %s", error)
        return None
    if tokenizer is None:
        made = "extended" if model.extend_tokenizer else "trained"
        log.info(
            "documents and tokens are not counted: the tokenizer is still to be %s; `moect prepare` does that", made
        )
    return tokenizer


def _export(config: RunConfig) -> str:
    return str(config.folder / "export")


def _names(stages, where: str) -> list[str]:
    """The stages' names, checked."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{where}: `stages` must be a list of mappings, each with a `name` and keys of a run")
    names = []
    for number, stage in enumerate(stages):
        name = stage.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where}: `stages[{number}]` has no `name`; it becomes the folder of that run")
        if "." in name:
            raise ConfigError(f"{where}: stage {name!r}: a dot in the name would hide it from stages.NAME.key=value")
        if name in names:
            raise ConfigError(f"{where}: two stages are called {name!r}; give each a name of its own")
        for key in OF_ALL:
            if key in stage:
                raise ConfigError(f"{where}: stage {name}: `{key}` is for all stages; put it at the top of the file")
        names.append(name)
    return names


def _of_stage(override: str, names: list[str]) -> tuple[str | None, str]:
    """The stage that an override is for, None for all, and the override inside it."""
    if not override.startswith("stages."):
        return None, override
    name, dot, rest = override.removeprefix("stages.").partition(".")
    if not dot or "=" in name:
        raise ConfigError(f"override {override!r}: write stages.NAME.section.key=value")
    if rest.partition("=")[0] in (*OF_ALL, "name"):
        raise ConfigError(f"override {override!r}: that key is for all stages; leave the first two parts out")
    if name not in names:
        raise ConfigError(f"override {override!r}: there is no stage {name!r}; the stages are {', '.join(names)}")
    return name, rest


def merge(under: dict, over: dict) -> dict:
    """Plain values of `over` in the place of those of `under`: mappings key by key, everything else replaced."""
    merged = copy.deepcopy(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _resolve(values: dict, folder: Path, earlier: list[str], where: str) -> None:
    """Put folders in the place of `stage:NAME`."""
    model = values.get("model")
    for key in ("base", "start", "experts_from"):
        value = model.get(key) if isinstance(model, dict) else None
        if not isinstance(value, str) or not value.startswith(REFERENCE):
            continue
        name = value.removeprefix(REFERENCE)
        if name not in earlier:
            raise ConfigError(
                f"{where}: `model.{key}` is {value!r}, but no stage before this one has that name; before it come: "
                f"{', '.join(earlier) or 'none'}"
            )
        model[key] = str(folder / name if key == "start" else folder / name / "export")


def _check_origin(config: RunConfig, earlier: list[RunConfig], where: str) -> None:
    """What a stage builds on, or goes on from, can be that."""
    from moect.train.checkpoints.same_run import check_shape

    for stage in earlier:
        if config.model.experts_from == _export(stage) and (
            stage.method != "full" or stage.model.base != config.model.base
        ):
            raise ConfigError(
                f"{where}: its experts are to begin as those of stage {stage.name}, which has to be `method: full` on "
                f"the same `model.base`"
            )
        if config.model.base == _export(stage) and stage.method == "moe-ct":
            raise ConfigError(
                f"{where}: its base, stage {stage.name}, has an appended module already, and a second one cannot be "
                f"appended; to train that one further, give the base of {stage.name} and `model.start`"
            )
        if config.model.start == str(stage.folder):
            check_shape(stage, config, where)
            if config.model.base != stage.model.base:
                raise ConfigError(
                    f"{where}: goes on from stage {stage.name}, which has `model.base` {stage.model.base!r}, and not "
                    f"{config.model.base!r}; make them equal"
                )


def _check_files(stages: list[RunConfig], held_out: bool = False) -> None:
    """The files of every stage that is still to run are there, before hours are spent on the first; those of held-out
    text, and the tasks, where they are measured on, or wanted all the same."""
    from moect.data.reading.sources import resolve_files
    from moect.model.ready_experts import check_source
    from moect.monitor.tasks.sources import check_tasks

    for config in stages:
        if config.resume == "auto" and ended(config):
            continue
        of_monitor = (*config.data.evaluation, *config.data.calibration)
        for source in (*config.data.train, *(of_monitor if held_out or config.monitor.enabled else ())):
            if source.path:
                resolve_files(source.path, config.data.root)
        if config.monitor.enabled:
            check_tasks(config)
        if config.model.experts_from and config.model.experts_from not in map(_export, stages):
            check_source(config)
