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
from functools import partial
from pathlib import Path

from moect.config import RunConfig, config_from_dict, load_config, override_value, read_values
from moect.errors import ConfigError

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
    values = read_values(path)
    if "stages" not in values:
        if lost := [o for o in overrides if o.startswith("stages.")]:
            raise ConfigError(f"override {lost[0]!r}: {path} has no `stages`; leave the first two parts out")
        return [load_config(path, overrides)]
    stages = values.pop("stages")
    names = _names(stages, str(path))
    common = [o for o in overrides if o.split("=")[0] in ("name", "output", "resume")]
    for override in common:
        override_value(values, override)
    group = str(values.pop("name", RunConfig.name))
    folder = Path(str(values.pop("output", RunConfig.output))) / group
    configs = []
    for number, stage in enumerate(stages):
        merged = {**_merge(values, stage), "output": str(folder)}
        for override in [o for o in overrides if o not in common]:
            wanted, rest = _of_stage(override, names)
            if wanted in (None, stage["name"]):
                override_value(merged, rest)
        _resolve(merged, folder, names[:number], f"{path}: stage {stage['name']}")
        configs.append(config_from_dict(merged, where=f"{path}: stage {stage['name']}"))
    return configs


def run_stages(stages: list[RunConfig]) -> None:
    """Train each stage, or go on with it, and write its report; export those that a later stage is built on.

    Every rank calls it. With `resume: auto`, stages that are finished are skipped, and the first that is not goes on.
    A stage that stops early (`train.stop_after`) ends the sequence.

    Raises:
        MoectError: whatever the user can put right; what concerns corpora and batches of any stage, before the first.
    """
    from moect import distributed
    from moect.data.loader import check_division
    from moect.train.loop import train

    _, world_size = distributed.start()
    for config in stages:
        check_division(config.train.batch_size, config.train.micro_batch, world_size)
    distributed.on_main(lambda: _check_files(stages))
    for number, config in enumerate(stages):
        if len(stages) > 1 and distributed.is_main():
            print(f"\nstage {number + 1} of {len(stages)}: {config.name}", flush=True)
        later = stages[number + 1 :]
        if distributed.on_main(partial(_skips, config, later)):
            if distributed.is_main():
                print(f"{config.folder}: finished before", flush=True)
        else:
            train(config)
            gc.collect()  # the engine's cycles hold the model of this stage
        if not distributed.on_main(partial(_conclude, config, later)):
            return


def is_finished(config: RunConfig) -> bool:
    """Whether a run has ended at its last step, with the configuration that it would be run with now."""
    from moect.train.resume import differences

    try:
        events = [json.loads(line) for line in (config.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        then = load_config(config.folder / "config.yaml")
    except (OSError, ValueError, ConfigError):
        return False
    ended = events and events[-1].get("event") == "end" and events[-1]["step"] == config.train.steps
    return bool(ended) and not differences(then, config)


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


def _skips(config: RunConfig, later: list[RunConfig]) -> bool:
    """Whether there is nothing left to do in a stage.

    Raises:
        ConfigError: there is, but later stages were built on the stage as it was.
    """
    if config.resume == "auto" and is_finished(config):
        return True
    if _is_base(config, later) and Path(_export(config)).exists():
        raise ConfigError(
            f"{_export(config)}: was made before this stage changed, and later stages are built on it; remove it and "
            "their folders, or choose another name=… for all"
        )
    return False


def _is_base(config: RunConfig, later: list[RunConfig]) -> bool:
    return any(stage.model.base == _export(config) for stage in later)


def _conclude(config: RunConfig, later: list[RunConfig]) -> bool:
    """Report on a stage, and export it if it is a base; False if it is not finished."""
    from moect.export.merged import export_run
    from moect.monitor.report import write_report

    print(f"wrote {write_report(config.folder)}", flush=True)
    if not is_finished(config):
        return False
    if _is_base(config, later) and not Path(_export(config)).exists():
        print(f"wrote {export_run(config.folder)}", flush=True)
    return True


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
    name, _, rest = override.removeprefix("stages.").partition(".")
    if name not in names:
        raise ConfigError(f"override {override!r}: there is no stage {name!r}; the stages are {', '.join(names)}")
    return name, rest


def _merge(under: dict, over: dict) -> dict:
    merged = copy.deepcopy(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _resolve(values: dict, folder: Path, earlier: list[str], where: str) -> None:
    """Put folders in the place of `stage:NAME`."""
    model = values.get("model")
    for key in ("base", "start"):
        value = model.get(key) if isinstance(model, dict) else None
        if not isinstance(value, str) or not value.startswith(REFERENCE):
            continue
        name = value.removeprefix(REFERENCE)
        if name not in earlier:
            raise ConfigError(
                f"{where}: `model.{key}` is {value!r}, but no stage before this one has that name; before it come: "
                f"{', '.join(earlier) or 'none'}"
            )
        model[key] = str(folder / name / "export" if key == "base" else folder / name)


def _check_files(stages: list[RunConfig]) -> None:
    """Every corpus of every stage is there, before hours are spent on the first."""
    from moect.data.sources import resolve_files

    for config in stages:
        for source in (*config.data.train, *(config.data.evaluation if config.monitor.enabled else ())):
            if source.path:
                resolve_files(source.path, config.data.root)
