"""Measure a checkpoint of a run once more: on other texts or tasks, with other settings, on other machines, or on
documents that change between two languages."""

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
    from moect.data.reading.evaluation import load_calibration
    from moect.data.vocabulary.extended_tokenizer import extension_of
    from moect.data.vocabulary.tokenizer import load_tokenizer
    from moect.monitor.forgetting import ForgettingMonitor
    from moect.monitor.measuring.base import base_of
    from moect.monitor.threshold import calibrated

    folder = Path(run_folder)
    config = _configuration(folder, overrides)
    rank, world_size = distributed.start(config.health.timeout_minutes)
    checkpoint = _Checkpoint(folder, config, checkpoint)
    cache = Path(config.output) / ".cache"
    calibration = []
    if not any(o.startswith("moe.gate_threshold=") for o in overrides):  # else it is not to be found
        calibration = distributed.main_first(lambda: load_calibration(config, cache))
        config = config if calibration else calibrated(config, folder, checkpoint.step)
    tokenizer, texts = checkpoint.tokenizer, checkpoint.texts()
    monitor = ForgettingMonitor(
        config,
        texts,
        tokenizer,
        folder / "monitor",
        rank,
        world_size,
        checkpoint.fingerprint,
        base_tokenizer=load_tokenizer(config.model) if extension_of(tokenizer) else None,
        cache_folder=cache,
        apart=True,
        calibration=calibration,
    )
    model = checkpoint.model(config)
    with base_of(model, config, wanted=bool(monitor.compared) or not monitor.has_base()) as base:
        if base and not monitor.has_base():
            with base() as base_model:
                monitor.measure_base(base_model)
        rows = monitor.measure(model, checkpoint.step, base)
    return Evaluation(checkpoint.path, rows, folder / "monitor")


def evaluate_mixed(
    run_folder: Path, checkpoint: str | None = None, overrides: list[str] = (), most: int = 50
) -> Evaluation:
    """Measure a checkpoint's language gate on documents that change between an old and a new language, made from the
    run's held-out texts, and keep the results in RUN/monitor/mixed.jsonl. For one process; arguments and errors as for
    `evaluate_run`.

    Args:
        most: documents of each pair of languages and domain.
    """
    from moect import distributed
    from moect.data.vocabulary.extended_tokenizer import extension_of
    from moect.monitor.measuring.base import base_of
    from moect.monitor.measuring.mixed import measure_mixed
    from moect.monitor.rows import MIXED, replace_rows
    from moect.monitor.threshold import calibrated

    folder = Path(run_folder)
    config = _configuration(folder, overrides)
    _, world_size = distributed.start(config.health.timeout_minutes)
    if world_size > 1:
        raise ConfigError("documents of two languages are measured by one process: leave the launcher out")
    if not config.has_language_gate:
        raise ConfigError(f"{folder}: documents of two languages are measured for a language gate, and it has none")
    checkpoint = _Checkpoint(folder, config, checkpoint)
    if not any(o.startswith("moe.gate_threshold=") for o in overrides):
        config = calibrated(config, folder, checkpoint.step)
    if extension_of(checkpoint.tokenizer):
        raise ConfigError(
            f"{folder}: tokens were added to its base's, which reads the text otherwise: its parts cannot be compared"
        )
    model = checkpoint.model(config)
    with base_of(model, config) as base:
        rows = measure_mixed(model, base, checkpoint.texts(), checkpoint.tokenizer, most, config.monitor.batch_size)
    rows = [{"step": checkpoint.step} | row | {"gate_threshold": config.moe.gate_threshold} for row in rows]
    replace_rows(folder / "monitor", rows, MIXED)
    return Evaluation(checkpoint.path, rows, folder / "monitor")


class _Checkpoint:
    """What is measured: a checkpoint of a run, found and checked.

    Attributes:
        path, step: its folder and step.
        fingerprint: of its base.
        tokenizer: the run's.
    """

    def __init__(self, folder: Path, config: RunConfig, name: str | None):
        from moect import distributed
        from moect.data.vocabulary.extended_tokenizer import extension_of
        from moect.data.vocabulary.tokenizer import kept_tokenizer
        from moect.export.checkpoint_choice import choose_checkpoint
        from moect.model.build import base_fingerprint
        from moect.train.checkpoints.reading import read_info
        from moect.train.checkpoints.same_run import check_same_run
        from moect.train.token_rows import check_extension

        self._folder, self._config = folder, config
        self.path = distributed.on_main(lambda: choose_checkpoint(folder, load_config(folder / "config.yaml"), name))
        info = read_info(self.path)
        self.step = info["step"]
        self.fingerprint = base_fingerprint(config.model, config.seed)
        check_same_run(info, config, self.fingerprint, str(self.path))
        self.tokenizer = kept_tokenizer(config, folder)
        check_extension(info, extension_of(self.tokenizer), str(self.path))

    def texts(self):
        """The held-out texts, read on the main rank first."""
        from moect import distributed
        from moect.data.reading.evaluation import load_evaluation

        cache = Path(self._config.output) / ".cache"
        texts = distributed.main_first(lambda: load_evaluation(self._config.data, cache))
        if not texts:
            raise ConfigError(
                f"{self._folder}: data.evaluation is empty, there is nothing to measure; add held-out text to it"
            )
        return texts

    def model(self, config: RunConfig):
        """The model, whole on this rank's device."""
        from moect import distributed
        from moect.data.vocabulary.extended_tokenizer import extension_of
        from moect.model.build import build_model
        from moect.train.checkpoints.reading import load_module
        from moect.train.token_rows import kept_rows

        model = build_model(config, rows=kept_rows(self.path), extension=extension_of(self.tokenizer)).eval()
        load_module(model, self.path)
        return model.to(distributed.device())


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
