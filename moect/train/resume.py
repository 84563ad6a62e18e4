"""Whether a checkpoint belongs to a run's configuration, and what may differ."""

from __future__ import annotations

import dataclasses

from moect.config import RunConfig, config_from_dict
from moect.errors import CheckpointError, MoectError

# what decides the meaning of the saved tensors or the order of the data: a difference is refused
FIXED = (
    "seed",
    "method",
    "model.from_config",
    "moe",
    "lora",
    "data.languages",
    "data.train",
    "data.sequence_length",
    "data.replay",
    "data.temperature",
    "train.batch_size",
)
# what may change: how fast, where, how often
FREE = ("name", "output", "resume", "model.base", "model.tokenizer", "data.root", "train.stop_after", "export")
FREE_MOE = ("dispatch", "gate_threshold")


def check_same_run(info: dict, config: RunConfig, fingerprint: str, where: str) -> list[str]:
    """Compare a checkpoint with the configuration that wants to go on from it.

    Args:
        info: the checkpoint's plain values.
        config: the run's configuration now.
        fingerprint: of the base now.
        where: begins the error messages.

    Returns:
        The allowed differences, as `key: then -> now`.

    Raises:
        CheckpointError: another base, or a difference that cannot be resumed across.
    """
    if info["base_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{where}: made with another base (fingerprint {info['base_fingerprint'][:12]}…, "
            f"{config.model.base or 'model.from_config'} has {fingerprint[:12]}…); set model.base to that one"
        )
    try:
        then = _flat(config_from_dict(info["config"], where))
    except MoectError as error:
        raise CheckpointError(f"{where}: its configuration cannot be read: {error}") from error
    now = _flat(config)
    changed = [key for key in now if now[key] != then.get(key) and not _under(key, FREE)]
    refused = [k for k in changed if _under(k, FIXED) and k not in {f"moe.{name}" for name in FREE_MOE}]
    if refused:
        key = refused[0]
        raise CheckpointError(
            f"{where}: made with {key}: {then.get(key)!r}, the configuration says {now[key]!r}; "
            "change it back, or start a new run with name=…"
        )
    return [f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in changed]


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == p or key.startswith(p + ".") for p in prefixes)


def _flat(config: RunConfig) -> dict:
    """Values by `section.key`; what is a mapping itself stays whole."""
    flat = {}

    def walk(values: dict, prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and prefix == "" and dataclasses.is_dataclass(getattr(config, key)):
                walk(value, f"{key}.")
            else:
                flat[prefix + key] = value

    walk(dataclasses.asdict(config), "")
    return flat
