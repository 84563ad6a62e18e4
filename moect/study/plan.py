"""What a study is: a file that names a base, what all runs share, and what makes each of them different.

    name: study
    base: base.yaml                     a run that makes the base, once a seed; its export is what the others extend
    extend: extend.yaml                 what all runs share
    seeds: [0, 1, 2]
    pilot:                              short runs that choose each method's learning rate
      rates: [1.0e-3, 2.0e-3, 4.0e-3]
      set: {train: {steps: 150}}        their keys over those of the method
    curve: {train: {save_every: 150}}   keys of a method's first seed, which is measured on the way
    methods:                            with every seed
      - {name: full, method: full, about: what it is, …}
    variants:                           with the first seed, at the rate of the method that each is like
      - {name: replay-1, like: language-gate, data: {replay: 0.01}}

Keys beside name, about, like and rate are the configuration's own, over the shared ones; `stages` makes several of one
run. `rate` is a learning rate that needs no pilot.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moect.config import STRICT, RunConfig, read_values
from moect.errors import ConfigError
from moect.stages import ended, merge, stages_of

OWN = ("name", "about", "like", "rate")  # keys of a method that are not the configuration's


@dataclass(frozen=True)
class Method:
    """One line of the study.

    Attributes:
        name: of the line.
        about: what it is, in a few words.
        values: its configuration without name, output, seed, base and learning rate.
        like: the method whose learning rate it takes; None: its own.
        rate: the learning rate, where it is given.
    """

    name: str
    about: str
    values: dict
    like: str | None
    rate: float | None

    @property
    def has_pilots(self) -> bool:
        """Whether its learning rate is neither given nor another's."""
        return self.rate is None and self.like is None


@dataclass
class Pilot:
    """How learning rates are chosen.

    Attributes:
        rates: those that are tried first.
        set: keys of the pilot runs, over those of the method.
    """

    __pydantic_config__ = STRICT
    rates: list[float]
    set: dict


@dataclass
class StudyFile:
    """A study's file as it is read."""

    __pydantic_config__ = STRICT
    name: str
    base: str
    extend: str
    methods: list[dict]
    pilot: Pilot
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    curve: dict = dataclasses.field(default_factory=dict)
    variants: list[dict] = dataclasses.field(default_factory=list)
    output: str = RunConfig.output


@dataclass(frozen=True)
class Job:
    """A run of the study.

    Attributes:
        name: of the run, and of its folder.
        kind: `base`, and its `export`; `pilot` of a learning rate; `method` and `variant`, the runs that count.
        values: the configuration, whole.
        configs: the same, checked: of each of its stages; none of an export.
        method: whose run it is; empty for the base.
        rate: the learning rate.
        seed: of the run.
    """

    name: str
    kind: Literal["base", "export", "pilot", "method", "variant"]
    values: dict
    configs: list[RunConfig]
    method: str
    rate: float
    seed: int

    @property
    def steps(self) -> int:
        """Optimizer steps, of all its stages."""
        return sum(config.train.steps for config in self.configs)


class Study:
    """A study, read from its file.

    Args:
        path: the file; the files that it names lie beside it.
        known: what earlier runs of it came to, as `moect.study.results` keeps it: they need not be run again.

    Attributes:
        folder: all runs lie in it, the bases' too.
        methods, variants: by name, in the order of the file.
        seeds, pilot: as in the file.

    Raises:
        ConfigError: a file cannot be read, or something in it cannot be meant.
    """

    def __init__(self, path: Path, known: Sequence[dict] = ()):
        from pydantic import TypeAdapter, ValidationError

        try:
            file = TypeAdapter(StudyFile).validate_python(read_values(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{path}: `{key}`: {first['msg'][0].lower()}{first['msg'][1:]}") from error
        self.path = Path(path)
        if not file.name or "/" in file.name or file.name.startswith("."):
            raise ConfigError(f"{path}: `name` is {file.name!r}: give a plain folder name")
        self.folder = Path(file.output) / file.name
        self.seeds, self.pilot, self.curve = file.seeds, file.pilot, file.curve
        self._base, self._shared = (read_values(self.path.parent / name) for name in (file.base, file.extend))
        self.methods = {m.name: m for m in map(self._method, file.methods)}
        self.variants = {m.name: m for m in map(self._method, file.variants)}
        self._known = {(record["name"], record["made_of"]): record for record in known}
        self._check(file)

    def base(self, seed: int) -> Job:
        """The run that makes the base of the runs with this seed."""
        return self._job(f"base-seed{seed}", "base", {**self._base, "seed": seed}, "", 0.0, seed)

    def base_export(self, seed: int) -> Job:
        """Writes a base as what the others extend."""
        return Job(f"base-seed{seed}/export", "export", {}, [], "", 0.0, seed)

    def pilot_job(self, method: str, rate: float) -> Job:
        """A short run of a method at a learning rate; of one in stages, the first."""
        values = self._of(self.methods[method], rate, self.seeds[0])
        stages = values.pop("stages", None)
        if stages:
            values = merge(values, {key: value for key, value in stages[0].items() if key != "name"})
        values = merge(values, self.pilot.set)
        values["train"]["lr"] = rate
        return self._job(f"pilot-{method}-{rate:g}", "pilot", values, method, rate, self.seeds[0])

    def method_job(self, method: str, rate: float, seed: int) -> Job:
        """A run of a method; that of the first seed is measured on the way."""
        values = self._of(self.methods[method], rate, seed)
        if seed == self.seeds[0]:
            values = merge(values, self.curve)
        return self._job(f"{method}-seed{seed}", "method", values, method, rate, seed)

    def variant_job(self, variant: str, rate: float) -> Job:
        """A run of a variant."""
        made = self.variants[variant]
        return self._job(variant, "variant", self._of(made, rate, self.seeds[0]), made.like or "", rate, self.seeds[0])

    def kept(self, job: Job) -> Path:
        """The file that a run is made from; it stays beside its log."""
        return self.folder / "logs" / f"{job.name.replace('/', '-')}.yaml"

    def made_of(self, job: Job) -> str:
        """A digest of all values that a run depends on, those of its base included."""
        values = [self.base(job.seed).values, job.values]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def known(self, job: Job) -> dict | None:
        """What is known of a run from elsewhere; None: nothing, or it was made of other values."""
        return self._known.get((job.name, self.made_of(job)))

    def done(self, job: Job) -> bool:
        """Whether a run need not be run: it is known, or has ended."""
        return self.known(job) is not None or self.ended(job)

    def ended(self, job: Job) -> bool:
        """Whether a run has come to its end here.

        Raises:
            ConfigError: it was begun with other values than it has now.
        """
        folder, kept = self.folder / job.name, self.kept(job)
        if job.kind == "export":
            return (folder / "config.json").is_file()
        if folder.is_dir() and kept.is_file() and read_values(kept) != job.values:
            raise ConfigError(
                f"{folder}: was made with other values than {self.path} has now (see {kept}): move it away to make it "
                "again, or change the study back"
            )
        return ended(job.configs[-1])

    def _method(self, values: dict) -> Method:
        name, rate = values.get("name"), values.get("rate")
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise ConfigError(f"{self.path}: a method's name is {name!r}: give a plain folder name")
        if rate is not None and not isinstance(rate, (int, float)):
            raise ConfigError(f"{self.path}: the `rate` of {name} is {rate!r}: give a learning rate")
        own = {key: value for key, value in values.items() if key not in OWN}
        return Method(name, str(values.get("about", "")), own, values.get("like"), rate)

    def piloted(self, name: str) -> Method:
        """Whose learning rate a method or variant has: that of a method that is piloted, or one that is given."""
        chain = self._chain(name)
        return next((method for method in chain if method.rate is not None), chain[-1])

    def _chain(self, name: str) -> list[Method]:
        """A method or variant, what it is like, what that is like, and so on."""
        chain = [self.variants.get(name) or self.methods[name]]
        while chain[-1].like:
            if chain[-1].like not in self.methods:
                raise ConfigError(f"{self.path}: {chain[-1].name} is like {chain[-1].like!r}, which is no method")
            chain.append(self.methods[chain[-1].like])
            if len(chain) > len(self.methods) + 1:
                raise ConfigError(f"{self.path}: {name} is like itself; let one of those that it is like stand alone")
        return chain

    def _of(self, method: Method, rate: float, seed: int) -> dict:
        values = self._shared
        for one in reversed(self._chain(method.name)):
            values = merge(values, one.values)
        values = merge(values, {"model": {"base": str(self.folder / self.base_export(seed).name)}})
        return merge(values, {"seed": seed, "train": {"lr": rate}})

    def _job(self, name: str, kind, values: dict, method: str, rate: float, seed: int) -> Job:
        values = {**values, "name": name, "output": str(self.folder), "resume": "auto"}
        return Job(name, kind, values, stages_of(values, f"{self.path}: {name}"), method, rate, seed)

    def _check(self, file: StudyFile) -> None:
        if not self.methods or not self.seeds or not self.pilot.rates:
            raise ConfigError(f"{self.path}: needs at least one of methods, one of seeds and one of pilot.rates")
        names = [values["name"] for values in (*file.methods, *file.variants)]
        runs = [*names, "logs", *(f"{name}-seed{seed}" for name in (*self.methods, "base") for seed in self.seeds)]
        if twice := sorted({name for name in runs if runs.count(name) > 1}):
            raise ConfigError(
                f"{self.path}: two runs are called {twice[0]}; give each its own name, and each seed once"
            )
        for name in (*self.methods, *self.variants):
            self._chain(name)
        for variant in self.variants.values():
            if not variant.like and variant.rate is None:
                raise ConfigError(f"{self.path}: {variant.name} needs `like`, whose learning rate it takes, or `rate`")
        # hours before the last of them begins
        self.base(self.seeds[0])
        for name in (*self.methods, *self.variants):
            rate = self.piloted(name).rate
            for tried in self.pilot.rates if rate is None else [rate]:
                if name in self.variants:
                    self.variant_job(name, tried)
                    continue
                self.method_job(name, tried, self.seeds[0])
                if self.methods[name].has_pilots:
                    self.pilot_job(name, tried)
