"""A checkpoint of a run opened for export: its tensors, with those of the base that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moect.config import RunConfig, load_config
from moect.data.vocabulary.extended_tokenizer import extension_of
from moect.data.vocabulary.tokenizer import kept_tokenizer
from moect.errors import ExportError
from moect.export.checkpoint_choice import choose_checkpoint
from moect.export.proof.live import live_model
from moect.export.trained import TrainedModel, of_run
from moect.model.build import base_fingerprint
from moect.monitor.threshold import calibrated
from moect.train.checkpoints.reading import read_info
from moect.train.checkpoints.same_run import check_same_run
from moect.train.token_rows import check_extension


@dataclass(frozen=True)
class Source:
    """A run's checkpoint, opened for export.

    Attributes:
        config: of the run.
        checkpoint: its folder.
        info: its plain values.
        tokenizer: of the run.
        trained: its tensors, with those of the base.
    """

    config: RunConfig
    checkpoint: Path
    info: dict
    tokenizer: object
    trained: TrainedModel

    def live(self) -> nn.Module:
        """The same model as training itself builds it: see `live_model`."""
        return live_model(self.config, self.checkpoint, self.trained.subject.dtype, extension_of(self.tokenizer))


def open_run(run_folder: Path, checkpoint: str | None = None, dtype: str | None = None) -> Source:
    """A checkpoint of a run, with the base that it was trained on.

    Args:
        run_folder: the run's folder.
        checkpoint: `step-N`; None: see `choose_checkpoint`.
        dtype: of its weights, `fp32`, `bf16` or `auto`; None: the run's `export.dtype`.

    Raises:
        ExportError: it is no run, or the base is another.
        CheckpointError, ConfigError, DataError: checkpoint, base or tokenizer cannot be read.
    """
    if not (run_folder / "config.yaml").is_file():
        raise ExportError(f"{run_folder}: no run there (no config.yaml); give the folder of a run")
    config = load_config(run_folder / "config.yaml")
    path = choose_checkpoint(run_folder, config, checkpoint)
    info = read_info(path)
    _check_base(config, info, path)
    config = calibrated(config, run_folder, info["step"])
    dtype = dtype or config.export.dtype
    tokenizer = kept_tokenizer(config, run_folder)
    extension = extension_of(tokenizer)
    check_extension(info, extension, str(path))
    trained = of_run(config, path, config.train.precision if dtype == "auto" else dtype, extension)
    return Source(config, path, info, tokenizer, trained)


def _check_base(config: RunConfig, info: dict, checkpoint: Path) -> None:
    fingerprint = base_fingerprint(config.model, config.seed)
    if fingerprint != info["base_fingerprint"]:
        raise ExportError(
            f"{checkpoint}: trained on another base (fingerprint {info['base_fingerprint'][:12]}…, "
            f"{config.model.base} has {fingerprint[:12]}…); set model.base in the run's config.yaml to that one"
        )
    check_same_run(info, config, fingerprint, str(checkpoint))  # config.yaml may have been edited since
