"""Measure a checkpoint of a run once more: on other texts or tasks, with other settings, on other machines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moect.config import RunConfig, load_config
from moect.errors import ConfigError
from moect.monitor.rows import Row

MAY_DIFFER = (
    *("monitor", "gate", "moe.gate_threshold", "data.evaluation", "data.calibration"),
    *("data.root", "model.base", "model.attention"),
)


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        checkpoint: whose model it was.
        rows: of its texts; see `moect.monitor.rows`.
        folder: where they were written, RUN/monitor.
    """

    checkpoint: Path
    rows: list[Row]
    folder: Path


def evaluate_run(run_folder: Path, checkpoint: str | None = None, overrides: list[str] = ()) -> Evaluation:
    """Measure a checkpoint as the training would have, and keep the results beside the run's.

    What the training measured stays: its verdicts, and those of a run that resumes it, rest on it.

    Every rank calls it; texts and tasks are divided among the ranks of a launcher, the model is whole on each.

    Args:
        run_folder: the run's folder.
        checkpoint: `step-N`; None: the one that would be exported.
        overrides: `section.key=value` over the run's configuration, of what is measured only.

    Raises:
        MoectError: whatever the user can put right.
    """
    from moect import distributed
    from moect.data.reading.evaluation import load_calibration, load_evaluation
    from moect.data.vocabulary.extended_tokenizer import extension_of
    from moect.data.vocabulary.tokenizer import kept_tokenizer, load_tokenizer
    from moect.export.checkpoint_choice import choose_checkpoint
    from moect.model.build import base_fingerprint, build_model
    from moect.monitor.forgetting import ForgettingMonitor
    from moect.monitor.measuring.base import base_of
    from moect.monitor.threshold import calibrated
    from moect.train.checkpoints.reading import load_module, read_info
    from moect.train.checkpoints.same_run import check_same_run
    from moect.train.token_rows import check_extension, kept_rows

    folder = Path(run_folder)
    config = _configuration(folder, overrides)
    rank, world_size = distributed.start(config.health.timeout_minutes)
    path = distributed.on_main(lambda: choose_checkpoint(folder, load_config(folder / "config.yaml"), checkpoint))
    info = read_info(path)
    cache = Path(config.output) / ".cache"
    fingerprint = base_fingerprint(config.model, config.seed)
    check_same_run(info, config, fingerprint, str(path))
    calibration = []
    if not any(o.startswith("moe.gate_threshold=") for o in overrides):  # else it is not to be found
        calibration = distributed.main_first(lambda: load_calibration(config, cache))
        config = config if calibration else calibrated(config, folder, info["step"])
    tokenizer = kept_tokenizer(config, folder)
    extension = extension_of(tokenizer)
    check_extension(info, extension, str(path))
    texts = distributed.main_first(lambda: load_evaluation(config.data, cache))
    if not texts:
        raise ConfigError(f"{folder}: data.evaluation is empty, there is nothing to measure; add held-out text to it")
    monitor = ForgettingMonitor(
        config,
        texts,
        tokenizer,
        folder / "monitor",
        rank,
        world_size,
        fingerprint,
        base_tokenizer=load_tokenizer(config.model) if extension else None,
        cache_folder=cache,
        apart=True,
        calibration=calibration,
    )
    model = build_model(config, rows=kept_rows(path), extension=extension).eval()
    load_module(model, path)
    model.to(distributed.device())
    with base_of(model, config, wanted=bool(monitor.compared) or not monitor.has_base()) as base:
        if base and not monitor.has_base():
            with base() as base_model:
                monitor.measure_base(base_model)
        rows = monitor.measure(model, info["step"], base)
    return Evaluation(path, rows, folder / "monitor")


def _configuration(folder: Path, overrides: list[str]) -> RunConfig:
    """The run's configuration; its model whole on each rank, whatever ZeRO stage it trained with."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: is not the folder of a run, it has no config.yaml; give RUN as `output`/`name`")
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in MAY_DIFFER):
            raise ConfigError(
                f"override {override!r}: only what is measured can differ from the run: {', '.join(MAY_DIFFER)}"
            )
    return load_config(folder / "config.yaml", [*overrides, "monitor.enabled=true", "train.zero_stage=0"])
