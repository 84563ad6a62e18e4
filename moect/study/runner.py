"""The runs of a study, several at a time, each a process of its own; interrupted, the same command goes on."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

from moect.errors import ConfigError, MoectError
from moect.locks import locked
from moect.processes import available_cores
from moect.study.plan import Job, Study
from moect.study.rates import known_rates, next_rates, outcome, tried_rates
from moect.train.meters import duration

POLL = 0.5  # seconds
# of a launcher above this process; a run is one rank of its own
OF_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
TAIL = 5  # lines of a failed run's log that are shown


class StudyFailed(MoectError):
    """Runs of a study did not end well; the others did."""

    exit_code = 1


@dataclass
class Running:
    """A run under way, where it runs, and whether it began here or goes on."""

    job: Job
    process: subprocess.Popen
    slot: int
    since: float
    fresh: bool


class Runner:
    """Runs a study.

    Args:
        study: which.
        at_once: runs side by side; None: one a GPU; without GPUs one a core, at most eight.
        only: patterns of names, of runs or methods; empty: all of them.

    Raises:
        ConfigError: a pattern that no run has.
    """

    def __init__(self, study: Study, at_once: int | None = None, only: list[str] = ()):
        import torch

        self.study, self.only = study, list(only)
        self.gpus = torch.cuda.device_count()
        self.at_once = at_once or self.gpus or min(available_cores(), 8)
        self.threads = max(1, available_cores() // self.at_once)
        self.running: dict[str, Running] = {}
        self.failed: dict[str, int] = {}
        self.taken: list[tuple[int, float]] = []  # steps and seconds of those that ended here
        self.stopping = 0
        names = {*study.methods, *study.variants, *(f"{n}-seed{s}" for n in study.methods for s in study.seeds)}
        if idle := [pattern for pattern in self.only if not any(fnmatch(name, pattern) for name in names)]:
            known = ", ".join((*study.methods, *study.variants))
            raise ConfigError(f"--only {idle[0]}: no run has that name; there are {known}")

    def go(self) -> None:
        """Run what is not done, in the order of importance.

        Raises:
            StudyFailed: some did not end well.
            KeyboardInterrupt: it was asked to stop; every run has its checkpoint.
        """
        logs = self.study.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with locked(logs / "lock", lambda: print(f"{self.study.folder}: waiting for another process that runs it")):
            self._go()
        if self.stopping:
            raise KeyboardInterrupt
        if self.failed:
            raise StudyFailed(
                f"{len(self.failed)} run(s) did not end well: {', '.join(self.failed)}; their output is in {logs}; the "
                "same command tries again"
            )

    def _go(self) -> None:
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._tell_state()
            while not self.stopping:
                ready = [job for job in self.jobs() if job.name not in self.running and job.name not in self.failed]
                for job in ready[: self.at_once - len(self.running)]:
                    if self.stopping or not self._has_room(job):
                        break
                    self._start(job)
                if not self.running:
                    break
                self._wait()
            while self.running:
                self._wait()
        finally:
            for one in self.running.values():  # an error of ours: they end too, with their checkpoints
                _ask_to_stop(one)
            for one in self.running.values():
                one.process.wait()
            for s, handler in before.items():
                signal.signal(s, handler)

    def jobs(self) -> list[Job]:
        """What can be run now and is not done, the most important first.

        Raises:
            ConfigError: a run was made with other values.
            DataError: a pilot was not measured.
        """
        ready = {}
        for job in self.left():
            bases = (self.study.base(job.seed), self.study.base_export(job.seed))
            first = next((base for base in bases if not self.study.ended(base)), job)
            ready.setdefault(first.name, first)
        return list(ready.values())

    def left(self) -> list[Job]:
        """What is wanted, known by now, and not done, the most important first: pilots; the methods with their first
        seed, then the next; variants. Errors as for `jobs`."""
        study = self.study
        jobs = []
        for name, method in study.methods.items():
            if method.has_pilots and self._wants_rate_of(name):
                tried = tried_rates(study, name)
                trying = [rate for rate, found in tried.items() if found is None]
                jobs += [study.pilot_job(name, rate) for rate in (*trying, *next_rates(tried, study.pilot.rates))]
        rates = known_rates(study)
        for seed in study.seeds:
            named = [(n, study.method_job(n, rates[n], seed)) for n in study.methods if n in rates]
            jobs += [job for n, job in named if self._matches(n, job.name)]
        jobs += [study.variant_job(n, rates[n]) for n in study.variants if n in rates and self._matches(n)]
        return [job for job in jobs if not study.done(job)]

    def _wants_rate_of(self, method: str) -> bool:
        """Whether a run is wanted that has the learning rate that this method is piloted for."""
        study = self.study
        names = [n for n in (*study.methods, *study.variants) if study.piloted(n).name == method]
        runs = [f"{n}-seed{seed}" for n in names if n in study.methods for seed in study.seeds]
        return self._matches(*names, *runs)

    def _matches(self, *names: str) -> bool:
        return not self.only or any(fnmatch(name, pattern) for name in names for pattern in self.only)

    def _has_room(self, job: Job) -> bool:
        """A base has all cores, alone, so that it is the same whatever else there is to do."""
        if self.gpus:
            return True
        alone = job.kind == "base" or any(r.job.kind == "base" for r in self.running.values())
        return not (alone and self.running)

    def _start(self, job: Job) -> None:
        command = ["export", str((self.study.folder / job.name).parent)]
        if job.kind != "export":
            config = self.study.kept(job)
            config.write_text(yaml.safe_dump(job.values, sort_keys=False, allow_unicode=True), encoding="utf-8")
            command = ["train", "--config", str(config)]
        fresh = not (self.study.folder / job.name).exists()
        slot = min(set(range(self.at_once)) - {r.slot for r in self.running.values()})
        env = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
        env["OMP_NUM_THREADS"] = str(self.threads if self.gpus or job.kind != "base" else available_cores())
        if self.gpus:
            ours = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
            env["CUDA_VISIBLE_DEVICES"] = ours.split(",")[slot % self.gpus]
        with self._log(job.name).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "moect.cli", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # Ctrl-C reaches this process alone, which tells them
            )
        self.running[job.name] = Running(job, process, slot, time.monotonic(), fresh)
        if self.stopping:  # asked before it could be told
            _ask_to_stop(self.running[job.name])
        print(f"start  {job.name}", flush=True)

    def _wait(self) -> None:
        """Until one of those under way has ended, or this process is asked to stop."""
        asked = self.stopping
        while self.stopping == asked:
            if over := [r for r in self.running.values() if r.process.poll() is not None]:
                for one in over:
                    self._end(one)
                return
            time.sleep(POLL)

    def _end(self, one: Running) -> None:
        name, code, seconds = one.job.name, one.process.returncode, time.monotonic() - one.since
        del self.running[name]
        if code == 0 and self.study.ended(one.job):
            if one.fresh and one.job.kind != "base":  # of the others nobody knows how many steps these seconds were
                self.taken.append((one.job.steps, seconds))
            print(f"done   {name:<40} {duration(seconds):>8}{self._eta()}", flush=True)
        elif self.stopping:
            print(f"stop   {name}", flush=True)
        elif one.job.kind == "pilot" and outcome(self.study, one.job.method, one.job.rate) == math.inf:
            print(f"done   {name:<40} {duration(seconds):>8}   diverged", flush=True)
        else:
            self.failed[name] = code
            path = self._log(name)
            print(f"FAILED {name} (exit code {code}); the end of {path}:", flush=True)
            print(
                *(f"    {line}" for line in path.read_text(errors="replace").splitlines()[-TAIL:]), sep="\n", flush=True
            )

    def _log(self, run: str) -> Path:
        return self.study.folder / "logs" / f"{run.replace('/', '-')}.log"

    def _eta(self) -> str:
        """By the time that steps have taken; pilots that will still turn out to be needed are not known."""
        left = sum(job.steps for job in self.left())
        steps = sum(n for n, _ in self.taken)
        if not left or not steps:
            return ""
        seconds = left * sum(s for _, s in self.taken) / steps / self.at_once
        return f"   ETA {duration(seconds)}"

    def _tell_state(self) -> None:
        waiting = self.left()
        each = f"{self.threads} thread{'s' * (self.threads > 1)}" if not self.gpus else "a GPU"
        print(
            f"{self.study.folder}: {len(waiting)} runs are known to be left, {self.at_once} at a time with {each} each"
        )

    def _stop(self, number, frame) -> None:
        """Ask every run to write a checkpoint and end."""
        self.stopping += 1
        for one in self.running.values():
            _ask_to_stop(one)


def _ask_to_stop(one: Running) -> None:
    with suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGTERM)
