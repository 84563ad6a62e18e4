"""A run from its configuration to its last checkpoint: build, measure the base, train, save, measure again.

Everything random is a function of (seed, step, rank), the learning rate of the step, and the data order of (seed,
position): so a resumed run repeats exactly what the uninterrupted one would have done.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

import moect
from moect import distributed
from moect.config import RunConfig, config_to_yaml
from moect.data.batches.loader import Loader
from moect.data.reading.evaluation import load_calibration, load_evaluation
from moect.data.vocabulary.extended_tokenizer import extension_of
from moect.data.vocabulary.tokenizer import keep_tokenizer, load_tokenizer, run_tokenizer
from moect.errors import ForgettingError, Stopped
from moect.model.append import modules_of
from moect.model.build import DTYPES, base_files, base_fingerprint, build_model, load_base_config
from moect.model.ready_experts import source_digest, take_experts
from moect.monitor.forgetting import ForgettingMonitor
from moect.monitor.measuring.cost import token_lengths
from moect.plan import make_plan, render
from moect.train import base_proof, state
from moect.train.budget import act
from moect.train.checkpoints import reading
from moect.train.checkpoints.restore import begin_from, find_origin, finish_save, go_back
from moect.train.checkpoints.saver import Saver
from moect.train.engine import deepspeed_config, make_engine
from moect.train.folder import RunLog, check_shared, open_folder
from moect.train.gate_counts import count_gate
from moect.train.gate_start import start_gate
from moect.train.health.ranks import check_ranks
from moect.train.health.rollback import roll_back
from moect.train.health.watchdog import Watchdog
from moect.train.meters import Meter, duration, greatest_peak_memory, peak_flops, reset_peak_memory, slow_precision
from moect.train.objective import Objective
from moect.train.run_lock import only_training
from moect.train.signals import Signals
from moect.train.step import Steps
from moect.train.token_rows import decide_rows, extension_digest, opening_tokens
from moect.train.watch import Watch

log = logging.getLogger("moect.train")


def train(config: RunConfig) -> Path:
    """Run, or resume, the training that a configuration describes. Every rank calls it.

    The process group stays: a process that ends after this calls `moect.distributed.stop`.

    Returns:
        The run's folder.

    Raises:
        MoectError: whatever the user can put right.
        RankLost: another rank does not answer, or has failed.
    """
    rank, world_size = distributed.start(config.health.timeout_minutes)
    run = None
    with only_training(config):
        try:
            run = Run(config, rank, world_size)
            run.go()
        except Exception as error:
            if (explained := distributed.explained(error, run and run.step)) is error:
                raise
            raise explained from error
        finally:
            if run:
                run.close()
    return run.folder


class Run:
    """One training run on one rank. `go` is the whole story."""

    def __init__(self, config: RunConfig, rank: int, world_size: int):
        self.config, self.rank, self.world_size = config, rank, world_size
        self.main = rank == 0
        # whatever can be wrong with the input is found before the folder is made
        self.tokenizer = distributed.main_first(lambda: run_tokenizer(config))
        self.extension = extension_of(self.tokenizer) if config.model.extend_tokenizer else None
        vocab_size = load_base_config(config.model).vocab_size
        if self.extension:
            vocab_size = max(vocab_size, self.extension.first_id + len(self.extension.pieces))
        cache = Path(config.output) / ".cache"
        check_shared(cache)
        self.loader = distributed.main_first(
            lambda: Loader(config, self.tokenizer, cache, rank, world_size, vocab_size)
        )
        texts, calibration = [], []
        if config.monitor.enabled:
            texts = distributed.main_first(lambda: load_evaluation(config.data, cache))
            calibration = distributed.main_first(lambda: load_calibration(config, cache))
        zero3 = deepspeed_config(config.train, world_size) if config.train.zero_stage == 3 else None
        self.folder = config.folder
        files = base_files(config.model)
        self.fingerprint = base_fingerprint(config.model, config.seed, files)
        self.origin = find_origin(config, self.fingerprint, self.extension, self.loader)
        rows = distributed.on_main(
            lambda: decide_rows(config, self.loader.stores, vocab_size, self.origin.checkpoint, self.origin.start)
        )
        opening = []
        if not self.origin.checkpoint:  # which has its own
            opening = distributed.on_main(lambda: opening_tokens(config, self.loader.stores, vocab_size))
        model = build_model(config, zero3=zero3, rows=rows, extension=self.extension, opening=opening)
        self.experts_from = self.origin.info.get("experts_from")
        self.vocab_size = vocab_size
        if not (self.origin.checkpoint or self.origin.start):
            start_gate(model, config, self.loader.stores, self.tokenizer, vocab_size)
            count_gate(model, config, self.loader.stores, self.tokenizer, vocab_size)
        if config.model.experts_from and not self.origin.checkpoint:
            take_experts(model, config)
            self.experts_from = distributed.on_main(lambda: source_digest(config))
        # a divided parameter is empty
        shapes = build_model(config, meta=True, rows=rows, extension=self.extension) if zero3 else model
        # before DeepSpeed gives all ranks the weights of rank 0
        check_ranks(model, f"{config.folder}: as built", everything=True)
        samples = self.loader.samples(self.tokenizer)
        # of what is drawn already and of the shares from here on
        held_out = token_lengths(texts, self.tokenizer)
        self.plan = make_plan(config, shapes, self.loader.summary(), world_size, samples=samples, held_out=held_out)

        for moe in modules_of(model)[:1]:
            moe.experts.choose()

        monitor = None
        if texts:
            monitor = distributed.main_first(
                lambda: ForgettingMonitor(
                    config,
                    texts,
                    self.tokenizer,
                    self.folder / "monitor",
                    rank,
                    world_size,
                    self.fingerprint,
                    base_tokenizer=load_tokenizer(config.model) if self.extension else None,
                    cache_folder=cache,
                    calibration=calibration,
                )
            )
        distributed.on_main(lambda: open_folder(config))
        distributed.on_main(lambda: keep_tokenizer(self.tokenizer, self.folder))
        self.log = RunLog(self.folder, enabled=self.main)
        self.writer = _tensorboard(self.folder) if self.main else None
        self.objective = Objective(model, config)
        self.engine = make_engine(self.objective, config.train, world_size)
        self.base = base_proof.BaseProof(config, model, files, self.fingerprint)
        self.watch = Watch(monitor, config, self.log, self.writer) if monitor else None
        self.steps = Steps(config, self.engine, self.objective, self.loader, rank, world_size)
        self.saver = Saver(config, self.engine, rank, world_size, self._saved)
        self.signals = Signals(tell=self.main)
        self.step = 0
        self.rollbacks = 0  # times that the budget has sent the run back
        self.health_rollbacks = 0  # times that skipped steps have
        self.watchdog = Watchdog(self.folder, rank, config.health.hang_minutes)

    def go(self) -> None:
        """The run: from step 0 or the last checkpoint, to the last step, `stop_after` or a signal.

        Raises:
            ForgettingError: an old language lost more than it may, and the run is to end then.
            Stopped: a signal asked for it.
        """
        train = self.config.train
        distributed.on_main(self._announce)
        distributed.on_main(self.saver.check_space)
        self.watchdog.beat("the measurement of the base")
        if self.watch:
            self.watch.measure_base(self.objective.model)
        try:
            self._begin()
            end = min(train.steps, train.stop_after or train.steps)
            if self.step >= end < train.steps:
                self._say(f"nothing to do: train.stop_after is {train.stop_after}; raise it, or leave it out")
            with self.signals:
                self._train_until(end)
                self.saver.settle()
        except ForgettingError:
            self._prove_base()
            self.log.write(event="stop", step=self.step)
            raise
        self._prove_base()
        done = self.step == train.steps
        self.log.write(event="end" if done else "stop", step=self.step)
        if self.watch and self.main:
            self.watch.tell_cost(self.folder)
        how = "finished" if done else "stopped as asked; go on with resume=auto"
        self._say(f"\n{self.folder}: {how} at step {self.step}")

    def _begin(self) -> None:
        """Take the weights that the run goes on from or begins with, and measure them unless that was done."""
        if self.origin.checkpoint:
            self._resume(self.origin.checkpoint)
            # a kill may have come between checkpoint and measurement
            self._measure(again=False, judged=self.origin.info.get("judged", False))
            return
        if self.log.has_lines:  # it ended before its first checkpoint: what it logged is superseded
            self.log.write(event="resume", step=0, world_size=self.world_size, changed=[])
            self._say(f"{self.folder}: no checkpoint to go on from; begins again at step 0")
            if self.watch:
                self.watch.forget_after(0)
        start = self.origin.start
        self.log.write(event="start", step=0, plan=self.plan, **({"from": str(start)} if start else {}))
        if start:
            begin_from(start, self.steps)
            if self.config.train.parts == "all":
                count_gate(self.objective.model, self.config, self.loader.stores, self.tokenizer, self.vocab_size)
            self._say(f"what trains begins as in {start}")
        self._measure()

    def _train_until(self, end: int) -> None:
        """The loop over the steps."""
        train = self.config.train
        device, dtype = self.engine.device, DTYPES[train.precision]
        peak, source = peak_flops(device, dtype)
        self._say(f"\nMFU against {peak / 1e12:.2f} TFLOP/s a rank ({source})")
        if advice := slow_precision(device, dtype, peak):
            self._say(advice)
        meter = Meter(self.plan["tokens_per_step"], self.plan["flops_per_token"], peak, self.world_size)
        reset_peak_memory(device)
        while self.step < end:
            meter.start_step()
            self.watchdog.beat(f"step {self.step + 1}")
            self.steps.take(self.step, self.signals.notes() | self.saver.notes())
            self.step += 1
            meter.end_step()
            if self.steps.fault and self._skipped(self.steps.fault):
                continue
            if (every := self.config.health.check_ranks_every) and self.step % every == 0:
                self._check_ranks()
            if self.step % train.log_every == 0 or self.step == end:
                self._report(meter)
            self.saver.settle_if_written(self.steps.notes)
            stop = self.steps.notes["stop"] > 0
            if stop or self.step % train.save_every == 0 or self.step == end:
                self.save()
                if not (stop := stop or self._asked_to_stop()):
                    self._measure()
                    reset_peak_memory(self.engine.device)  # the monitor's does not count
                if stop or self._asked_to_stop():
                    self._stop()

    def _skipped(self, why: str) -> bool:
        """Tell of a skipped step, and go back if it was one too many; whether the run has."""
        in_row = self.steps.judge.skips_in_row
        self.log.write(event="skip", step=self.step, why=why, in_row=in_row)
        if self.main:
            log.warning("step %d is skipped: %s", self.step, why)
        if in_row < self.config.health.max_skips:
            return False
        roll_back(self, in_row, why)
        return True

    def _check_ranks(self) -> None:
        check_ranks(self.objective.model, f"{self.folder}: at step {self.step}")

    def _asked_to_stop(self) -> bool:
        """Whether any rank has received a signal, where no step carries the word."""
        asked = torch.tensor(float(self.signals.received is not None), device=self.engine.device)
        dist.all_reduce(asked)
        return asked.item() > 0

    def _stop(self) -> None:
        self.saver.settle()
        self._prove_base(files=False)  # who sent the signal may not wait for gigabytes to be read
        name = self.signals.received or "a signal on another rank"
        self.log.write(event="stop", step=self.step, signal=name)
        error = Stopped(f"{self.folder}: by {name} at step {self.step}, with a checkpoint; go on with resume=auto")
        error.told_by_main_rank = not self.main
        raise error

    def _prove_base(self, files: bool = True) -> None:
        """Say that the base is what it was at the start, or raise the error that it is not."""
        proof = self.base.prove(files)
        self.log.write(**proof, step=self.step)
        self._say(base_proof.told(proof))

    def close(self) -> None:
        """Close the run's files, end its worker processes, and let go of DeepSpeed's hooks."""
        self.watchdog.close()
        self.loader.close()
        self.log.close()
        if self.writer:
            with suppress(OSError):  # a full disk, of which more is known by now
                self.writer.close()
        self.engine.destroy()

    def _report(self, meter: Meter) -> None:
        """One line for the screen, log.jsonl and TensorBoard."""
        if not self.main:
            return
        values = self.steps.figures(self.step)
        speed = meter.read(self.config.train.steps - self.step)
        speeds = {k: v for k, v in speed.items() if k != "eta_seconds"}
        seen = self.loader.tokens_seen()
        self.log.write(step=self.step, **values, **speeds, tokens_seen=seen)
        for language, tokens in seen.items():
            self.writer.add_scalar(f"tokens/{language}", tokens, self.step)
        for key, value in {**values, "tokens_per_second": speed["tokens_per_second"], "mfu": speed["mfu"]}.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"train/{key}", value, self.step)
        extra = "".join(
            f"  {k} {values[k]:.3f}" for k in ("balance", "language_prior", "base_kl", "gate") if k in values
        )
        width = len(str(self.config.train.steps))
        self._say(
            f"step {self.step:>{width}}/{self.config.train.steps}  loss {values['loss']:.4f}{extra}  "
            f"lr {values['lr']:.1e}  norm {values['grad_norm']:.2f}  {speed['tokens_per_second']:,.0f} tok/s  "
            f"MFU {100 * speed['mfu']:.0f}%  ETA {duration(speed['eta_seconds'])}"
        )

    def save(self, judged: bool = False) -> None:
        """A checkpoint of everything that the next step depends on.

        Args:
            judged: what follows from the measurement of this step was done before.
        """
        self.watchdog.beat(f"the checkpoint of step {self.step}")
        self._check_ranks()  # nothing is made of weights that differ
        peak = greatest_peak_memory(self.engine.device)
        carried = state.carried(self.objective.model)
        load_LE = self.objective.load_LE.to("cpu", copy=True)
        extra = {"module": carried, "trainer": {"load_LE": load_LE, **self.steps.judge.tensors()}}
        info = {
            "moect": moect.__version__,
            "base_fingerprint": self.fingerprint,
            "base_memory": self.base.memory,
            "began_from": self.origin.began_from,
            "experts_from": self.experts_from,
            "extension": extension_digest(self.extension),
            "data": self.loader.state_dict(),
            "world_size": self.world_size,
            "rollbacks": self.rollbacks,
            "judged": judged,
            "health_rollbacks": self.health_rollbacks,
            **self.steps.judge.values(),
            "peak_memory": peak,
            "config": dataclasses.asdict(self.config),
        }
        self.saver.save(self.step, extra, info)

    def _saved(self, path: Path, info: dict) -> None:
        """A checkpoint is complete."""
        self.log.write(event="checkpoint", step=reading.step_of(path), peak_memory=info["peak_memory"])
        print(f"saved {path}", flush=True)

    def settle(self) -> None:
        """Wait until the last checkpoint is complete."""
        self.saver.settle()

    def _resume(self, path: Path) -> None:
        """Go back to a checkpoint."""
        self.base.check_resumed(self.origin.info, str(path))
        self.watchdog.beat(f"going back to {path.name}")
        self.go_back(path)
        distributed.on_main(lambda: finish_save(self.config, self.step))
        if self.watch:
            self.watch.forget_after(self.step)
        self.rollbacks = self.origin.info.get("rollbacks", 0)
        self.health_rollbacks = self.origin.info.get("health_rollbacks", 0)
        changed = self.origin.changed
        self.log.write(event="resume", step=self.step, world_size=self.world_size, changed=changed)
        self._say(f"resumed from {path}" + "".join(f"\n  changed: {line}" for line in changed))
        if change := self.loader.change:
            self.log.write(event="mixture", step=self.step, row=self.loader.rows, **change)
            shares = (f"\n  {key}: {change['before'][key]:.2%} -> {now:.2%}" for key, now in change["now"].items())
            self._say("the mixture changes; what was drawn before is not made up for" + "".join(shares))

    def go_back(self, path: Path) -> None:
        """Take weights, optimizer and step from a checkpoint of this run; the text goes on from where it is."""
        self.step = go_back(path, self.steps)["step"]

    def _measure(self, again: bool = True, judged: bool = False) -> None:
        """Measure this step, or take what was measured, and do what follows from it, unless that is done.

        Nothing follows at a step that only has a checkpoint because the run was stopped there: one that was not stopped
        would not have looked.
        """
        self.watchdog.beat(f"the measurement of step {self.step}")
        rows = self.watch and self.watch.measure(self.objective.model, self.step, again)
        train = self.config.train
        due = self.step % train.save_every == 0 or self.step == train.steps
        if rows and due and not judged:
            self.saver.settle()  # what follows may depend on which checkpoints there are
            act(self, rows)

    def _announce(self) -> None:
        print(render(self.plan), flush=True)
        (self.folder / "plan.json").write_text(json.dumps(self.plan, indent=1, ensure_ascii=False), encoding="utf-8")
        self.writer.add_text("config", f"```yaml\n{config_to_yaml(self.config)}```")
        if self.objective.modules_L and self.config.moe.dispatch != "auto":
            print(f"experts by `{self.config.moe.dispatch}`, as configured", flush=True)

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)


def _tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard")
