"""What no single field of the configuration can know: combinations that cannot be meant, each with its reason."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moect.data_config import check_data
from moect.gate_config import check_gate
from moect.health_config import check_health
from moect.monitor_config import check_monitor

if TYPE_CHECKING:
    from moect.config import RunConfig

NEVER_LEARNT = (
    "`data.languages` has a `learnt` language, and no earlier run learned it: give that run as `model.start`, or the "
    "role `old` if the base knows it"
)


def check(config: RunConfig) -> None:
    """Raise for what the fields together cannot mean.

    Raises:
        ValueError: the first such thing, by its key, with the remedy.
    """
    model, data, train = config.model, config.data, config.train
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ValueError(f"`name` is {config.name!r}: give a plain folder name")
    if (model.base is None) == (model.from_config is None):
        raise ValueError("give either `model.base` or `model.from_config`, not both and not neither")
    if model.from_config is not None:
        if config.method != "full":
            raise ValueError("a base trained from scratch needs `method: full`")
        if not model.tokenizer:
            raise ValueError("`model.from_config` needs `model.tokenizer`")
        if "model_type" not in model.from_config:
            raise ValueError("`model.from_config` has no `model_type`")
        if model.start:
            raise ValueError("`model.start` goes on from a run on the same base: it needs `model.base`")
    if model.train_tokenizer is not None and not (model.tokenizer and model.from_config):
        raise ValueError(
            "`model.train_tokenizer` needs `model.tokenizer`, the folder to write to, and `model.from_config`: "
            "an existing base has its own"
        )
    if model.extend_tokenizer is not None:
        if model.extend_tokenizer < 1:
            raise ValueError(f"`model.extend_tokenizer` is {model.extend_tokenizer}: it must be at least 1")
        if not model.base or model.tokenizer:
            raise ValueError("`model.extend_tokenizer` adds to the tokenizer of `model.base`; remove `model.tokenizer`")
        if "new" not in {data.languages.get(source.lang) for source in data.train}:
            raise ValueError("`model.extend_tokenizer` learns from new languages, and `data.train` has none")
        if config.method != "moe-ct":
            raise ValueError(
                f"`model.extend_tokenizer` is for `method: moe-ct`; `{config.method}` makes no rows for new tokens"
            )
    if model.train_embeddings != "none" and config.method != "moe-ct":
        raise ValueError(
            "`model.train_embeddings` is for `method: moe-ct`; `full` trains them all, `lora` names modules in "
            "`lora.targets`, and `block-expansion` keeps them"
        )
    if train.parts != "all":
        _check_parts(config)
    if model.experts_from:
        if config.method != "moe-ct" or config.moe.fusion == "add" or config.moe.init == "zero":
            raise ValueError(
                "`model.experts_from` is for experts that begin as FFNs: `method: moe-ct` with `moe.fusion: gate`, "
                "`discrete`, `fixed` or `routed`, and not `moe.init: zero`"
            )
        if model.start:
            raise ValueError("`model.experts_from` and `model.start` both say how experts begin: give one")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"`seed` is {config.seed}: it must lie between 0 and {2**31 - 1}")
    for section in ("moe", "lora", "loss", "data", "train", "gate", "health"):
        for name, value in vars(getattr(config, section)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{section}.{name}` is {value}: it must be a finite number")
    for name, value in vars(config.loss).items():
        if isinstance(value, float) and value < 0:
            raise ValueError(f"`loss.{name}` is {value}: it cannot be negative")
    if config.lora.alpha <= 0:
        raise ValueError(f"`lora.alpha` is {config.lora.alpha}: it must be positive")
    for section, values, names in (
        ("train", train, ("steps", "batch_size", "micro_batch", "log_every", "save_every", "keep_every", "stop_after")),
        ("lora", config.lora, ("rank",)),
    ):
        for name in names:
            value = getattr(values, name)
            if value is not None and value < 1:
                raise ValueError(f"`{section}.{name}` is {value}: it must be at least 1")
    for name in ("lr", "eps"):
        if getattr(train, name) <= 0:
            raise ValueError(f"`train.{name}` is {getattr(train, name)}: it must be positive")
    for name in ("warmup", "clip", "weight_decay", "keep_last"):
        if getattr(train, name) < 0:
            raise ValueError(f"`train.{name}` is {getattr(train, name)}: it cannot be negative")
    for name in ("decay", "min_lr"):
        if not 0 <= getattr(train, name) <= 1:
            raise ValueError(f"`train.{name}` is {getattr(train, name)}: it must lie between 0 and 1")
    if len(train.betas) != 2 or not all(0 <= b < 1 for b in train.betas):
        raise ValueError(f"`train.betas` is {train.betas}: give two numbers in [0, 1)")
    if train.warmup >= train.steps:
        raise ValueError(
            f"`train.warmup` is {train.warmup} of {train.steps} steps: the warm-up must end before the run"
        )
    if train.batch_size % train.micro_batch:
        raise ValueError(
            f"`train.batch_size` {train.batch_size} is no multiple of `train.micro_batch` {train.micro_batch}"
        )
    if model.attention == "flash_attention_2" and train.micro_batch > 1:
        raise ValueError(
            "`model.attention: flash_attention_2` keeps packed documents apart only in single rows: set "
            "`train.micro_batch: 1`, or use sdpa"
        )
    check_data(data)
    check_monitor(config.monitor, data)
    check_gate(config.gate, data, config.calibrates)
    check_health(config.health)
    roles = {data.languages[source.lang] for source in data.train}
    if "learnt" in data.languages.values() and not model.start and config.resume == "never":
        raise ValueError(NEVER_LEARNT)  # a run that goes on may have lost sight of its start
    if config.method == "moe-ct":
        _check_routed(config, roles)
    if config.loss.base_kl:
        if config.method not in ("moe-ct", "block-expansion"):
            raise ValueError(
                f"`loss.base_kl` needs the frozen base inside the model that trains: `method: moe-ct` or "
                f"`block-expansion`, and this is `{config.method}`"
            )
        if model.extend_tokenizer is not None:
            raise ValueError(
                "`loss.base_kl` passes the text through the base, which cannot read the tokens of "
                "`model.extend_tokenizer`: leave out one of the two"
            )
        if "old" not in roles or data.replay == 0:
            raise ValueError(
                "`loss.base_kl` is about text of old languages, and none is read: give such text in `data.train` and a "
                "`data.replay` above 0"
            )
    if config.has_language_gate:
        if not config.loss.gate and config.moe.gate_sees != "pairs":
            raise ValueError("`loss.gate` is 0: the language gate would never learn which language is which")
        if not {"old", "new"} <= roles:
            raise ValueError("`moe.language_gate` learns from both roles: `data.train` needs old and new languages")
        if data.replay == 0:
            raise ValueError("`moe.language_gate` learns from replayed text: set `data.replay` above 0")


def _check_parts(config: RunConfig) -> None:
    parts = config.train.parts
    if not parts:
        raise ValueError("`train.parts` is empty: nothing would train; name some of what was appended, or use `all`")
    if config.method != "moe-ct":
        raise ValueError(f"`train.parts` is for `method: moe-ct`, and this is `{config.method}`")
    if "gate" in parts and config.has_language_gate and config.moe.gate_sees == "pairs":
        raise ValueError(
            "`train.parts` names `gate`, and one that sees `pairs` counts and does not train: leave it out"
        )
    if set(parts) <= {"router", "fusion"} and not (config.model.start or config.model.experts_from):
        raise ValueError(
            f"`train.parts: [{', '.join(parts)}]` would train beside experts that never learned anything: give the run "
            "that trained them as `model.start`, or add `experts`"
        )


def _check_routed(config: RunConfig, roles: set[str]) -> None:
    loss = config.loss
    if loss.balance_over == "trained" and config.moe.fewest_experts < 3:
        raise ValueError("`loss.balance_over: trained` has nothing to balance: `moe.experts` has to be 3 at least")
    if loss.language_prior and ("old" not in roles or config.data.replay == 0):
        raise ValueError(
            "`loss.language_prior` is about tokens of old languages, and none is read: give such text in `data.train` "
            "and a `data.replay` above 0"
        )
    if config.moe.fusion == "routed":
        return
    for name, idle in (("language_prior", 0), ("balance_over", "all")):
        if getattr(loss, name) != idle:
            raise ValueError(
                f"`loss.{name}` needs the frozen FFN among the experts, `moe.fusion: routed`, and it is "
                f"`{config.moe.fusion}`"
            )
