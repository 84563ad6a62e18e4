"""The whole run as dataclasses: YAML in, `section.key=value` overrides, checks.

`load_config` is the only way in. Every field carries its help text, from which docs/configuration.md is generated.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from moect.data_config import DataConfig, check_data
from moect.errors import ConfigError
from moect.gate_config import GateConfig, check_gate
from moect.health_config import HealthConfig, check_health
from moect.moe_config import MoeConfig, option
from moect.monitor_config import MonitorConfig, check_monitor

STRICT = {"extra": "forbid"}  # unknown keys are errors
NAMED = {  # methods that are a module of a certain form
    "language-gate": {"fusion": "add", "language_gate": True},
    "native": {"fusion": "add", "router": "sigmoid"},
    "moe-lpr": {"fusion": "routed"},
}


@dataclass
class ModelConfig:
    """The base model: an existing one to extend, or a shape to train from scratch."""

    __pydantic_config__ = STRICT
    base: str | None = option(None, "directory or hub name of the base, in Hugging Face format")
    from_config: dict | None = option(None, "HF config values (`model_type`, `hidden_size`, …) of a base to train anew")
    tokenizer: str | None = option(None, "directory or hub name of the tokenizer; null: the base's own")
    train_tokenizer: int | None = option(
        None, "train the tokenizer first, a byte-level BPE of at most so many tokens, on `data.train` into `tokenizer`"
    )
    extend_tokenizer: int | None = option(
        None, "first add at most so many tokens to the base's tokenizer, learned from the new languages in `data.train`"
    )
    train_embeddings: Literal["none", "unseen", "all"] = option(
        "none",
        "rows of embedding and head that train; `unseen`: of tokens that the old languages hardly use, and added ones",
    )
    start: str | None = option(
        None, "folder of an earlier run on the same base: what trains begins as its last checkpoint has it"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = option(
        "sdpa", "attention kernel, as transformers names it"
    )
    revision: str | None = option(None, "revision of a hub base")
    trust_remote_code: bool = option(False, "run code that comes with the base or its tokenizer")


@dataclass
class LoraConfig:
    """The LoRA baseline (`method: lora`)."""

    __pydantic_config__ = STRICT
    rank: int = option(8, "rank of each update")
    alpha: float = option(16.0, "scale of each update: alpha / rank")
    targets: str | list[str] = option("all-linear", "modules that get an update, as peft names them")


@dataclass
class LossConfig:
    """Weights of the losses beside cross-entropy."""

    __pydantic_config__ = STRICT
    balance: float = option(0.01, "weight of the balance loss (`moe.balance: loss`)")
    bias_rate: float = option(0.001, "step of the selection bias (`moe.balance: bias`)")
    balance_over: Literal["all", "trained"] = option(
        "all", "with `fusion: routed`: balance all experts, or those only that train, which leaves the frozen one alone"
    )
    language_prior: float = option(
        0.0,
        "with `fusion: routed`: weight of the cross-entropy of the routing toward the frozen FFN on old-language text",
    )
    z: float = option(0.0, "weight of the router z-loss")
    gate: float = option(1.0, "weight of the language gate's cross-entropy (`moe.language_gate: true`)")


@dataclass
class TrainConfig:
    """The optimisation, and how DeepSpeed runs it."""

    __pydantic_config__ = STRICT
    parts: Literal["all"] | list[Literal["experts", "router", "fusion", "gate", "rows"]] = option(
        "all",
        "what trains of what was appended (`method: moe-ct`): all of it, or some of experts, router, fusion, gate and "
        "rows; the others stay as `model.start` has them",
    )
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(64, "rows a step, over all ranks and accumulation steps")
    micro_batch: int = option(8, "rows a rank takes at once")
    lr: float = option(1e-4, "peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = option(
        "cosine", "after the warm-up: cosine, stable then decay, or flat"
    )
    warmup: int = option(0, "steps of linear warm-up")
    decay: float = option(0.2, "share of the steps that `wsd` decays over, linearly")
    min_lr: float = option(0.1, "last learning rate as a share of the peak")
    betas: list[float] = option([0.9, 0.95], "AdamW's moment decay rates")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices only")
    clip: float = option(1.0, "greatest norm of the gradient; 0: no clipping")
    precision: Literal["fp32", "bf16"] = option("bf16", "bf16 keeps fp32 masters of what trains")
    zero_stage: Literal[0, 1, 2, 3] = option(2, "DeepSpeed ZeRO stage; 3 partitions the base too")
    activation_checkpointing: bool = option(
        False, "recompute each block in backward instead of keeping its activations"
    )
    log_every: int = option(10, "steps between two lines of log.jsonl and of the screen")
    save_every: int = option(500, "steps between two checkpoints; the last step always makes one")
    keep_last: int = option(3, "checkpoints to keep; 0: all. The best within `monitor.max_forgetting` stays anyway")
    keep_every: int | None = option(None, "also keep checkpoints of steps that are a multiple of this, for good")
    async_save: bool = option(False, "write checkpoints while training goes on; takes a copy of them in host memory")
    stop_after: int | None = option(None, "stop with a checkpoint after this step, as if interrupted; resume goes on")


@dataclass
class ExportConfig:
    """What `moect export` writes."""

    __pydantic_config__ = STRICT
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "dtype of the weights; auto: train.precision")
    target: Literal["auto", "glm4_moe", "qwen2_moe", "granitemoeshared", "mixtral", "qwen3_moe", "moect", "base"] = (
        option("auto", "architecture to write; auto: the best that holds the model, see docs/export.md")
    )


@dataclass
class RunConfig:
    """One run. Its folder is `output`/`name`."""

    __pydantic_config__ = STRICT
    name: str = option("run", "name of the run")
    output: str = option("runs", "folder of all runs")
    seed: int = option(0, "seed of initialisation, data order and everything random")
    method: Literal["moe-ct", "full", "lora"] = option(
        "moe-ct",
        "what trains: an appended module (`moe-ct`), everything (`full`), or low-rank updates (`lora`); "
        "`language-gate`, `native` and `moe-lpr` are `moe-ct` with values of `moe` that make it that method",
    )
    resume: Literal["never", "auto"] = option(
        "never", "`auto`: go on from the run's last good checkpoint, if it has one"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output) / self.name


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a YAML file.
        overrides: `section.key=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: the file cannot be read, or something in it cannot be meant.
    """
    values = read_values(path)
    if "stages" in values:
        raise ConfigError(f"{path}: holds several runs (`stages`), where one is wanted; give a file of one run")
    for override in overrides:
        override_value(values, override)
    return config_from_dict(values, where=str(path))


def read_values(path: str | Path) -> dict:
    """The plain values of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give a YAML file with --config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: no such day, say, and nested too deep
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {_in_a_line(str(getattr(error, 'problem', error)))}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not a mapping of keys to values")
    return values


def config_from_dict(values: dict, where: str = "config") -> RunConfig:
    """Build and check a run's configuration from plain values; `where` begins the error messages."""
    from pydantic import TypeAdapter, ValidationError

    try:
        values = _spelled_out(values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    try:
        config = TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_in_a_line(_explain(error))}") from error
    try:
        _check(config)
    except ValueError as error:
        raise ConfigError(f"{where}: {_in_a_line(str(error))}") from error
    if "root" not in (values.get("data") or {}):
        config.data.root = os.environ.get("MOECT_DATA", config.data.root)
    return config


def _spelled_out(values: dict) -> dict:
    """A named method as `moe-ct` and what the name stands for."""
    method, moe = values.get("method"), values.get("moe") or {}
    if not isinstance(method, str) or method not in NAMED or not isinstance(moe, dict):
        return values
    for key, value in NAMED[method].items():
        if moe.get(key, value) != value:
            raise ValueError(
                f"`method: {method}` has moe.{key}: {value}, and the configuration says {moe[key]!r}; remove one of "
                "the two, or use `method: moe-ct`"
            )
    return {**values, "method": "moe-ct", "moe": {**moe, **NAMED[method]}}


def unused_keys(config: RunConfig) -> list[str]:
    """Keys with a value of their own that this method does not read, in the order of the file."""
    plain = RunConfig()
    moe = config.method == "moe-ct"
    idle = [] if moe else [("moe", f.name) for f in dataclasses.fields(MoeConfig)]
    idle += [] if moe else [("loss", f.name) for f in dataclasses.fields(LossConfig)]
    idle += [] if config.method == "lora" else [("lora", f.name) for f in dataclasses.fields(LoraConfig)]
    if moe and not config.moe.language_gate:
        idle += [("loss", "gate"), ("moe", "gate_threshold"), ("moe", "gate_sees")]
    if not moe or not config.moe.language_gate:
        idle += [("gate", f.name) for f in dataclasses.fields(GateConfig)] + [("data", "calibration")]
    elif config.gate.max_touched_old_documents is None:
        idle += [("gate", "confidence"), ("data", "calibration")]
    if moe and config.moe.balance != "bias":
        idle.append(("loss", "bias_rate"))
    if moe and config.moe.fusion != "fixed":
        idle.append(("moe", "fixed_weight"))
    if config.model.from_config is not None:  # there is nothing to forget
        idle += [("monitor", "max_forgetting"), ("monitor", "action")]
    if config.data.sampling == "unimax":
        idle.append(("data", "temperature"))
    if config.train.schedule != "wsd":
        idle.append(("train", "decay"))
    if config.train.schedule == "constant":
        idle.append(("train", "min_lr"))
    differs = lambda section, name: getattr(getattr(config, section), name) != getattr(getattr(plain, section), name)  # noqa: E731
    return [f"{section}.{name}" for section, name in idle if differs(section, name)]


def config_to_yaml(config: RunConfig) -> str:
    """The configuration with every default written out, as YAML that `load_config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings hold no key twice: the first of two equal sections would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key}` twice", node.value[number][0].start_mark
                )
        return super().construct_mapping(node, deep)


def override_value(values: dict, override: str) -> None:
    """Put `section.key=value`, the value in YAML, into plain values.

    Raises:
        ConfigError: it cannot be read, or leads through something that is no section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: `{section}` is not a section")
    values[last] = value


def _in_a_line(text: str) -> str:
    """Keys and values that it quotes may hold anything."""
    return " ".join(text.split())


def _explain(error) -> str:
    """pydantic's findings as one line: the first in full, the others counted."""
    findings = error.errors()
    first = findings[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[", "str")))
    if first["type"] == "unexpected_keyword_argument":
        names = _field_names(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        text = f"unknown key `{key}`" + (
            f"; did you mean `{near[0]}`?" if near else f"; known here: {', '.join(names)}"
        )
    elif first["loc"][-1] == "[key]" and isinstance(first["input"], bool):
        section = ".".join(map(str, first["loc"][:-2]))
        text = f"`{section}`: YAML reads a bare no, yes, on or off as a truth value; put the language in quotes"
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"])
    else:
        got = first.get("input")
        shown = repr(got) if not isinstance(got, (dict, list)) else type(got).__name__
        message = re.sub(r"a (valid )?dictionary( or an instance of \w+)?", "a mapping", first["msg"])
        text = f"`{key}`: {message[0].lower()}{message[1:]}, got {shown}"
    more = len(findings) - 1
    return text + (f" (and {more} more)" if more else "")


def _field_names(loc: tuple) -> list[str]:
    """Names of the keys that the section at `loc` may hold."""
    import typing

    here = RunConfig
    for part in loc:
        if isinstance(part, int) or not dataclasses.is_dataclass(here):
            continue
        hint = typing.get_type_hints(here).get(str(part), here)
        here = next((a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)), hint)
    return [f.name for f in dataclasses.fields(here)] if dataclasses.is_dataclass(here) else []


def _check(config: RunConfig) -> None:
    """What no single field can know."""
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
                "`model.extend_tokenizer` is for `method: moe-ct`; `full` and `lora` make no rows for new tokens"
            )
    if model.train_embeddings != "none" and config.method != "moe-ct":
        raise ValueError(
            "`model.train_embeddings` is for `method: moe-ct`; `full` trains them all, and `lora` names modules in "
            "`lora.targets`"
        )
    if train.parts != "all":
        _check_parts(config)
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
    if config.method == "moe-ct" and config.moe.language_gate and not config.loss.gate:
        raise ValueError("`loss.gate` is 0: the language gate would never learn which language is which")
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
    check_gate(config.gate, config.moe if config.method == "moe-ct" else None, data)
    check_health(config.health)
    roles = {data.languages[source.lang] for source in data.train}
    if config.method == "moe-ct":
        _check_routed(config, roles)
    if config.method == "moe-ct" and config.moe.language_gate and roles != {"old", "new"}:
        raise ValueError("`moe.language_gate` learns from both roles: `data.train` needs old and new languages")
    if config.method == "moe-ct" and config.moe.language_gate and data.replay == 0:
        raise ValueError("`moe.language_gate` learns from replayed text: set `data.replay` above 0")


def _check_parts(config: RunConfig) -> None:
    parts = config.train.parts
    if not parts:
        raise ValueError("`train.parts` is empty: nothing would train; name some of what was appended, or use `all`")
    if config.method != "moe-ct":
        raise ValueError(f"`train.parts` is for `method: moe-ct`, and this is `{config.method}`")
    if "experts" not in parts and "rows" not in parts and "gate" not in parts and not config.model.start:
        raise ValueError(
            f"`train.parts: [{', '.join(parts)}]` would train beside experts that never learned anything: give the run "
            "that trained them as `model.start`, or add `experts`"
        )


def _check_routed(config: RunConfig, roles: set[str]) -> None:
    loss = config.loss
    if loss.balance_over == "trained" and config.moe.trained_experts < 2:
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
