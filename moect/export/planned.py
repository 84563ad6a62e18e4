"""Before training: which architectures the run's model can be written as, and how exactly."""

from __future__ import annotations

from torch import nn

from moect.config import RunConfig
from moect.export.targets.choice import describe
from moect.export.trained import subject_of


def planned_export(config: RunConfig, model: nn.Module) -> list[str]:
    """Lines for the plan.

    Args:
        config: the run.
        model: as `build_model` makes it; the meta device is enough.

    Raises:
        ExportError: the run's `export.target` cannot hold the model; says why, and which can.
    """
    dtype = config.train.precision if config.export.dtype == "auto" else config.export.dtype
    return describe(subject_of(model, dtype), config.export.target)
