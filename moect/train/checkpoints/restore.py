"""What a run begins with: its own last checkpoint, another run's, or nothing; and a checkpoint's way to the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moect import distributed
from moect.config import RunConfig
from moect.config_check import NEVER_LEARNT
from moect.data.batches.loader import Loader
from moect.data.vocabulary.extended_tokenizer import Extension
from moect.errors import CheckpointError, ConfigError
from moect.model.partition import full_shape
from moect.train import state
from moect.train.checkpoints import reading
from moect.train.checkpoints.best import best_checkpoint
from moect.train.checkpoints.same_run import check_same_run, check_same_start, check_start
from moect.train.checkpoints.writing import clear, put_back, rotate
from moect.train.health.judge import steps_taken
from moect.train.step import Steps
from moect.train.token_rows import check_extension, widen_rows

log = logging.getLogger("moect.checkpoint")


@dataclass
class Origin:
    """What a run goes on from, or begins with.

    Attributes:
        checkpoint: of this run, to go on from.
        start: of the run `model.start`, to begin with, where there is none of this one.
        began_from: the digest of what trained in the checkpoint that this run began with.
        changed: keys of the configuration that differ from the checkpoint's, with both values.
        info: the plain values of `checkpoint`.
    """

    checkpoint: Path | None = None
    start: Path | None = None
    began_from: str | None = None
    changed: list[str] = field(default_factory=list)
    info: dict = field(default_factory=dict)


def find_origin(config: RunConfig, fingerprint: str, extension: Extension | None, loader: Loader) -> Origin:
    """Look for what the run begins with, and put the loader where that stands; nothing else is changed yet. Every rank
    calls it.

    Args:
        config: the run's.
        fingerprint: of the base.
        extension: tokens added to the base's, if any.
        loader: of the run.

    Raises:
        CheckpointError: what is there is of another run, base or model, or all of it is damaged.
    """
    if config.resume == "auto":
        folder = config.folder / "checkpoints"
        distributed.on_main(lambda: put_back(folder))
        if distributed.on_main(lambda: bool(reading.list_checkpoints(folder))):
            return _go_on(find_sound(config.folder), config, fingerprint, extension, loader)
    if config.model.start:
        return _begin_with(find_sound(Path(config.model.start)), config, fingerprint, extension, loader)
    if "learnt" in config.data.languages.values():
        raise ConfigError(NEVER_LEARNT)
    return Origin()


def find_sound(run_folder: Path) -> Path:
    """A run's newest undamaged checkpoint; all ranks look, each at a part of its files.

    Raises:
        CheckpointError: there is none.
    """
    folder = run_folder / "checkpoints"
    path = newest_sound(distributed.on_main(lambda: reading.list_checkpoints(folder)))
    if path is None:
        raise CheckpointError(f"{folder}: no usable checkpoint; has the run saved one yet (train.save_every)?")
    return path


def newest_sound(paths: list[Path]) -> Path | None:
    """The first undamaged one of some checkpoints, the same on all ranks; they look together, each at a part of the
    files. None: there is none."""
    world_size = dist.get_world_size()
    for path in paths:
        faults = [None] * world_size
        dist.all_gather_object(faults, reading.damage(path, dist.get_rank(), world_size))
        fault = next(filter(None, faults), None)
        if fault is None:
            return path
        if distributed.is_main():
            log.warning("%s: %s; trying the checkpoint before it", path, fault)
    return None


def finish_save(config: RunConfig, step: int) -> None:
    """Do what a kill may have left undone of a save: delete what it superseded, and its own left-overs.

    Args:
        config: the run's.
        step: of the checkpoint that was saved, and is sound. It was not measured then.
    """
    folder = config.folder / "checkpoints"
    clear(folder)
    best = best_checkpoint(config.folder, config, before=step)
    rotate(folder, config.train.keep_last, step, keep=best and best.step, keep_every=config.train.keep_every)


def begin_from(path: Path, steps: Steps) -> None:
    """Take what trains, and nothing else, from another run's checkpoint."""
    tensors = widen_rows(reading.read_module(path), dict(reading.carried_tensors(steps.objective.model)))
    trains = [name for name, _ in state.trainable_parameters(steps.engine) if name in tensors]
    moments = {f"{m}.{name}": torch.zeros_like(tensors[name]) for name in trains for m in state.MOMENTS}
    tensors |= moments
    _put(tensors, {name: t.shape for name, t in tensors.items()}, 0, path, steps)


def go_back(path: Path, steps: Steps) -> dict:
    """Take what the next step depends on from a checkpoint of this run, but the text, which goes on from where it is.

    Returns:
        Its plain values.
    """
    info = reading.read_info(path)
    tensors = reading.Tensors(path, "module", "optimizer")
    _put(tensors, tensors.shapes, steps_taken(info), path, steps)
    trainer = reading.read_tensors(path, "trainer")
    load_LE = trainer.get("load_LE")
    if load_LE is None or load_LE.shape != steps.objective.load_LE.shape:
        raise CheckpointError(f"{path}: of another model: its expert load is not there or has another shape")
    steps.objective.load_LE = load_LE.to(steps.engine.device)
    steps.judge.load(trainer, info)
    if steps.loader.mixture.segments[-1].row > info["data"]["rows"]:  # the mixture has changed since
        steps.judge.forget()
    return info


def _go_on(path: Path, config: RunConfig, fingerprint: str, extension: Extension | None, loader: Loader) -> Origin:
    info = reading.read_info(path)
    if info["step"] > config.train.steps:
        raise CheckpointError(
            f"{path}: beyond the end, train.steps is {config.train.steps}; raise it to go on from there"
        )
    changed = check_same_run(info, config, fingerprint, str(path))
    check_same_start(info, config, str(path))
    check_extension(info, extension, str(path))
    loader.load_state_dict(info.get("data"))
    return Origin(path, None, info.get("began_from"), changed, info)


def _begin_with(path: Path, config: RunConfig, fingerprint: str, extension: Extension | None, loader: Loader) -> Origin:
    info = reading.read_info(path)
    check_start(info, config, fingerprint, str(path))
    check_extension(info, extension, str(path))
    try:
        loader.go_on_after(info.get("data"))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its data position is damaged; start from another run") from error
    return Origin(None, path, reading.module_digest(info))


def _put(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], taken: int, path: Path, steps: Steps) -> None:
    """Put masters, moments and buffers into engine and model, as after `taken` optimizer steps."""
    engine, objective = steps.engine, steps.objective
    carried = {name: full_shape(t) for name, t in reading.carried_tensors(objective.model)}
    wanted = {name: full_shape(p) for name, p in state.trainable_parameters(engine)}
    wanted |= {f"{m}.{name}": shape for name, shape in wanted.items() for m in state.MOMENTS}
    wanted |= carried
    reading.check_shapes(shapes, wanted, path)
    state.scatter(engine, tensors, taken)
    state.put_carried(objective.model, tensors)
