"""Whether a checkpoint belongs to a run's configuration, and what may differ."""

from __future__ import annotations

import dataclasses

from moect.config import RunConfig, config_from_dict
from moect.errors import CheckpointError, MoectError
from moect.model.ready_experts import source_digest
from moect.train.checkpoints.reading import newest_module_digest

# what decides the meaning of the saved tensors or the order of a corpus: a difference is refused. The shares of the
# corpora may change: the loader keeps the history of the mixture.
FIXED = (
    "seed",
    "method",
    "model.from_config",
    "model.extend_tokenizer",
    "model.train_embeddings",
    "moe",
    "lora",
    "expansion",
    "data.languages",
    "data.train",
    "data.sequence_length",
    "data.packing",
    "gate.telling_tokens",
    "train.batch_size",
    "train.parts",
)
# what may change: how fast, where, how often
FREE = (
    "name",
    "output",
    "resume",
    "model.base",
    "model.tokenizer",
    "model.start",
    "model.experts_from",
    "data.root",
    "train.stop_after",
    "export",
)
FREE_MOE = ("dispatch", "gate_threshold")
# what decides which tensors train: another run can begin with them only where these are equal
SHAPE = (
    "method",
    "model.extend_tokenizer",
    "model.train_embeddings",
    "moe",
    "lora",
    "expansion",
    "gate.telling_tokens",
)


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
        CheckpointError: another base or start, or a difference that cannot be resumed across.
    """
    then = _config_then(info, config, fingerprint, where)
    changed = _differences(then, config)
    if key := _refused(changed, FIXED):
        was, now = changed[key]
        raise CheckpointError(
            f"{where}: made with {key}: {was!r}, the configuration says {now!r}; "
            "change it back, or start a new run with name=…"
        )
    return [f"{key}: {was!r} -> {now!r}" for key, (was, now) in changed.items()]


def check_same_start(info: dict, config: RunConfig, where: str) -> None:
    """Whether a run that began from `model.start`, or with `model.experts_from`, did so from what is there by now.

    Raises:
        CheckpointError: that run has gone on since, or that model is another.
    """
    now = newest_module_digest(config.model.start) if config.model.start else None
    if now and now != info.get("began_from"):
        raise CheckpointError(
            f"{where}: began from another state of {config.model.start} than its newest checkpoint; to go on as it "
            "began, set model.start=null, else start a new run with name=…"
        )
    now = source_digest(config)
    if now and now != info.get("experts_from"):
        raise CheckpointError(
            f"{where}: its experts did not begin as those of {config.model.experts_from} are now; to go on as it "
            "began, set model.experts_from=null, else start a new run with name=…"
        )


def check_start(info: dict, config: RunConfig, fingerprint: str, where: str) -> None:
    """Whether what trains can begin as a checkpoint of another run has it; arguments as for `check_same_run`.

    Raises:
        CheckpointError: another base, method or module.
    """
    check_shape(_config_then(info, config, fingerprint, where), config, where)


def check_shape(then: RunConfig, config: RunConfig, where: str) -> None:
    """CheckpointError unless what trains has the same names and shapes under both configurations."""
    changed = _differences(then, config)
    if key := _refused(changed, SHAPE):
        was, now = changed[key]
        raise CheckpointError(
            f"{where}: cannot be the start of this run, it has {key}: {was!r} and the configuration says {now!r}; "
            "make them equal, or take another `model.start`"
        )


def _refused(changed: dict, keys: tuple[str, ...]) -> str | None:
    """The first of the changed keys that lies under `keys` and may not change."""
    allowed = {f"moe.{name}" for name in FREE_MOE}
    return next((key for key in changed if _under(key, keys) and key not in allowed), None)


def _differences(then: RunConfig, now: RunConfig) -> dict[str, tuple]:
    """Keys that differ between two configurations, names and places left out, with both values."""
    was, is_ = _flat(then), _flat(now)
    return {key: (was[key], is_[key]) for key in is_ if was[key] != is_[key] and not _under(key, FREE)}


def _config_then(info: dict, config: RunConfig, fingerprint: str, where: str) -> RunConfig:
    """The configuration that a checkpoint was made with, on the same base."""
    if info["base_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{where}: made with another base (fingerprint {info['base_fingerprint'][:12]}…, "
            f"{config.model.base or 'model.from_config'} has {fingerprint[:12]}…); set model.base to that one"
        )
    values = info["config"]
    if isinstance(values.get("moe"), dict):  # of before there was a choice
        values = values | {"moe": {"gate_sees": "token"} | values["moe"]}
    try:
        return config_from_dict(values, where)
    except MoectError as error:
        raise CheckpointError(f"{where}: its configuration cannot be read: {error}") from error


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == p or key.startswith(p + ".") for p in prefixes)


def _flat(config: RunConfig) -> dict:
    """Values by `section.key`; what is a mapping itself stays whole, and the weights of sources are apart."""
    flat = {}

    def walk(values: dict, prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and prefix == "" and dataclasses.is_dataclass(getattr(config, key)):
                walk(value, f"{key}.")
            else:
                flat[prefix + key] = value

    walk(dataclasses.asdict(config), "")
    flat["weights of data.train"] = [source.pop("weight") for source in flat["data.train"]]
    return flat
