"""The whole run as dataclasses: YAML in, `section.key=value` overrides, checks.

`load_config` is the only way in. Every field carries its help text, from which docs/configuration.md is generated.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import yaml

from moect.config_check import check
from moect.data_config import DataConfig
from moect.errors import ConfigError
from moect.expansion_config import ExpansionConfig
from moect.gate_config import GateConfig
from moect.health_config import HealthConfig
from moect.moe_config import MoeConfig, option
from moect.monitor_config import MonitorConfig

STRICT = {"extra": "forbid"}  # unknown keys are errors
Method = Literal["moe-ct", "full", "lora", "block-expansion"]
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
    experts_from: str | None = option(
        None, "folder or hub name of a model trained further from the base, in full: experts begin as its FFNs"
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
    base_kl: float = option(
        0.0,
        "weight of the KL divergence from the frozen base's predictions on old-language text (`method: moe-ct` and "
        "`block-expansion`); takes a second forward pass over its rows, which no plan counts",
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
    method: Method = option(
        "moe-ct",
        "what trains: an appended module (`moe-ct`), everything (`full`), low-rank updates (`lora`), inserted blocks "
        "(`block-expansion`); `language-gate`, `native` and `moe-lpr` are `moe-ct` with values of `moe` that make it "
        "that method",
    )
    resume: Literal["never", "auto"] = option(
        "never", "`auto`: go on from the run's last good checkpoint, if it has one"
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    expansion: ExpansionConfig = field(default_factory=ExpansionConfig)
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

    @property
    def has_language_gate(self) -> bool:
        """Whether a language gate is appended."""
        return self.method == "moe-ct" and self.moe.language_gate

    @property
    def calibrates(self) -> bool:
        """Whether the language gate's threshold is found at each checkpoint, for what `gate` promises."""
        return self.has_language_gate and self.gate.max_touched_old_documents is not None


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
    from pydantic import ValidationError

    try:
        values = _spelled_out(values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    try:
        config = _validator().validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_in_a_line(_explain(error))}") from error
    try:
        check(config)
    except ValueError as error:
        raise ConfigError(f"{where}: {_in_a_line(str(error))}") from error
    if "root" not in (values.get("data") or {}):
        config.data.root = os.environ.get("MOECT_DATA", config.data.root)
    return config


@functools.cache  # it takes longer to make than to use
def _validator():
    from pydantic import TypeAdapter

    return TypeAdapter(RunConfig)


def _spelled_out(values: dict) -> dict:
    """A named method as `moe-ct` and what the name stands for."""
    method, moe = values.get("method"), values.get("moe") or {}
    if isinstance(method, str) and method not in (known := [*get_args(Method), *NAMED]):
        near = difflib.get_close_matches(method, known, n=1)
        raise ValueError(
            f"`method` is {method!r}"
            + (f"; did you mean `{near[0]}`?" if near else f": choose one of {', '.join(known)}")
        )
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
    idle += [] if moe else [("loss", f.name) for f in dataclasses.fields(LossConfig) if f.name != "base_kl"]
    if config.method != "block-expansion":
        idle.append(("expansion", "layers"))
    idle += [] if config.method == "lora" else [("lora", f.name) for f in dataclasses.fields(LoraConfig)]
    if moe and not config.has_language_gate:
        idle += [("loss", "gate"), ("moe", "gate_threshold"), ("moe", "gate_sees")]
    if config.has_language_gate and config.moe.gate_sees != "context":
        idle.append(("gate", "begin"))
    if config.has_language_gate and config.moe.gate_sees == "pairs":  # it counts, and does not train
        idle.append(("loss", "gate"))
    if not config.has_language_gate:
        idle += [("gate", f.name) for f in dataclasses.fields(GateConfig)] + [("data", "calibration")]
    elif not config.calibrates:
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
    branch = ("function-", "list[", "str", "literal[")  # of values that may be one thing or another
    keys = [".".join(str(part) for part in f["loc"] if not str(part).startswith(branch)) for f in findings]
    key, ways = keys[0], [f for f, k in zip(findings, keys, strict=True) if k == keys[0]]
    if within := next((i for i, k in enumerate(keys) if k.startswith(f"{key}.")), 0):  # of the branch that was meant
        key, ways, first = keys[within], [findings[within]], findings[within]
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
        message = ", or ".join(w["msg"].removeprefix("Input ") if n else w["msg"] for n, w in enumerate(ways))
        message = re.sub(r"a (valid )?dictionary( or an instance of \w+)?", "a mapping", message)
        text = f"`{key}`: {message[0].lower()}{message[1:]}, got {shown}"
    more = len(findings) - len(ways)
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
