"""A run from its configuration to its last checkpoint: build, measure the base, train, save, measure again.

Everything random is a function of (seed, step, rank), the learning rate of the step, and the data order of (seed,
position): so a resumed run repeats exactly what the uninterrupted one would have done.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist

import moect
from moect import distributed
from moect.config import RunConfig, config_to_yaml
from moect.data.batches.loader import Loader, MicroBatch
from moect.data.reading.evaluation import load_evaluation
from moect.data.vocabulary.extended_tokenizer import extension_of
from moect.data.vocabulary.tokenizer import keep_tokenizer, load_tokenizer, run_tokenizer
from moect.errors import CheckpointError, TrainingError
from moect.model.append import modules_of
from moect.model.build import DTYPES, base_fingerprint, build_model, load_base_config
from moect.model.partition import full_shape
from moect.monitor.forgetting import ForgettingMonitor
from moect.monitor.measuring.cost import token_lengths
from moect.plan import make_plan, render
from moect.train import checkpoint, state
from moect.train.best import best_checkpoint
from moect.train.budget import act
from moect.train.engine import deepspeed_config, make_engine
from moect.train.folder import RunLog, open_folder
from moect.train.meters import Meter, duration, greatest_peak_memory, peak_flops, reset_peak_memory
from moect.train.objective import Objective, StepCounts
from moect.train.resume import check_same_run, check_same_start, check_start
from moect.train.schedule import learning_rate
from moect.train.token_rows import IDS, check_extension, decide_rows, extension_digest, widen_rows
from moect.train.watch import Watch


def train(config: RunConfig) -> Path:
    """Run, or resume, the training that a configuration describes. Every rank calls it.

    The process group stays: a process that ends after this calls `moect.distributed.stop`.

    Returns:
        The run's folder.

    Raises:
        MoectError: whatever the user can put right.
    """
    rank, world_size = distributed.start()
    run = Run(config, rank, world_size)
    try:
        run.go()
    finally:
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
        self.loader = distributed.main_first(
            lambda: Loader(config, self.tokenizer, cache, rank, world_size, vocab_size)
        )
        texts = []
        if config.monitor.enabled:
            texts = distributed.main_first(lambda: load_evaluation(config.data, cache))
        zero3 = deepspeed_config(config.train, world_size) if config.train.zero_stage == 3 else None
        self.folder = config.folder
        self.fingerprint = base_fingerprint(config.model, config.seed)
        self.began_from = None  # the digest of what trained in the run that this one went on from
        self.checkpoint, self.changed = self._find_checkpoint() if config.resume == "auto" else (None, [])
        self.start = self._find_start() if config.model.start and not self.checkpoint else None
        rows = distributed.on_main(
            lambda: decide_rows(config, self.loader.stores, vocab_size, self.checkpoint, self.start)
        )
        model = build_model(config, zero3=zero3, rows=rows, extension=self.extension)
        # a divided parameter is empty
        shapes = build_model(config, meta=True, rows=rows, extension=self.extension) if zero3 else model
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
                )
            )
        distributed.on_main(lambda: open_folder(config))
        distributed.on_main(lambda: keep_tokenizer(self.tokenizer, self.folder))
        self.log = RunLog(self.folder, enabled=self.main)
        self.writer = _tensorboard(self.folder) if self.main else None
        self.objective = Objective(model, config)
        self.engine = make_engine(self.objective, config.train, world_size)
        self.watch = Watch(monitor, config, self.log, self.writer) if monitor else None
        self.step = 0
        self.rollbacks = 0  # times that the budget has sent the run back

    def go(self) -> None:
        """The run: from step 0 or the last checkpoint, to the last step or `stop_after`.

        Raises:
            ForgettingError: an old language lost more than it may, and the run is to end then.
        """
        train = self.config.train
        if self.main:
            self._announce()
        if self.watch:
            self.watch.measure_base(self.objective.model)
        if self.checkpoint:
            self._resume(self.checkpoint)
            self._measure(again=False)  # a kill may have come between checkpoint and measurement
        else:
            if self.log.has_lines:  # it ended before its first checkpoint: what it logged is superseded
                self.log.write(event="resume", step=0, world_size=self.world_size, changed=[])
                self._say(f"{self.folder}: no checkpoint to go on from; begins again at step 0")
            self.log.write(event="start", step=0, plan=self.plan, **({"from": str(self.start)} if self.start else {}))
            if self.start:
                self._begin_from(self.start)
            self._measure()
        end = min(train.steps, train.stop_after or train.steps)
        if self.step >= end < train.steps:
            self._say(f"nothing to do: train.stop_after is {train.stop_after}; raise it, or leave it out")
        peak, source = peak_flops(self.engine.device, DTYPES[train.precision])
        self._say(f"\nMFU against {peak / 1e12:.2f} TFLOP/s a rank ({source})")
        meter = Meter(self.plan["tokens_per_step"], self.plan["flops_per_token"], peak, self.world_size)
        reset_peak_memory(self.engine.device)
        while self.step < end:
            meter.start_step()
            counts = self._train_step()
            meter.end_step()
            if self.step % train.log_every == 0 or self.step == end:
                self._report(counts, meter)
            if self.step % train.save_every == 0 or self.step == end:
                self.save()
                self._measure()
                reset_peak_memory(self.engine.device)  # the monitor's does not count
        done = self.step == train.steps
        self.log.write(event="end" if done else "stop", step=self.step)
        if self.watch and self.main:
            self.watch.tell_cost(self.folder)
        how = "finished" if done else "stopped as asked; go on with resume=auto"
        self._say(f"\n{self.folder}: {how} at step {self.step}")

    def close(self) -> None:
        """Close the run's files, end its worker processes, and let go of DeepSpeed's hooks."""
        self.loader.close()
        self.log.close()
        if self.writer:
            self.writer.close()
        self.engine.destroy()

    def _train_step(self) -> StepCounts:
        """One optimizer step over the step's micro-batches."""
        config, engine = self.config, self.engine
        self.engine.train()
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 4099 + self.rank)
        state.set_learning_rate(engine, learning_rate(self.step, config.train))
        batches = [batch.to(engine.device) for batch in self.loader.next_step()]
        counts = self._count(batches)
        # DeepSpeed averages over ranks and accumulation steps; the objective's shares are to be summed
        scale = float(self.world_size * len(batches))
        for batch in batches:
            engine.backward(engine(**_arguments(batch), counts=counts, scale=scale))
            engine.step()
        self._balance()
        self.step += 1
        self._check_finite()
        return counts

    def _check_finite(self) -> None:
        """Stop at the first step that went wrong, before a checkpoint is made of it."""
        for name, value in (("loss", self.sums["cross_entropy"].item()), ("norm of the gradient", self._grad_norm())):
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.folder}: the {name} is {value} at step {self.step}: lower train.lr or lengthen "
                    "train.warmup, and go on from the last checkpoint with resume=auto"
                )

    def _grad_norm(self) -> float:
        return float(self.engine.get_global_grad_norm() or 0.0)

    def _count(self, batches: list[MicroBatch]) -> StepCounts:
        """Count the step's tokens over all ranks."""
        labels = sum((b.labels_BS != -100).sum() for b in batches)
        old, new = (sum((b.role_BS == role).sum() for b in batches) for role in (0, 1))
        counts = torch.stack([labels, old, new])
        dist.all_reduce(counts)
        labels, old, new = counts.tolist()
        return StepCounts(labels=labels, valid=old + new, old=old, new=new)

    def _balance(self) -> None:
        """Take the step's expert load, over all ranks, to the next step's balance loss or to the selection bias."""
        objective = self.objective
        self.sums = _all_reduced(objective.sums)
        objective.sums = {}
        if "expert_counts" not in self.sums:
            return
        counts_LE = self.sums["expert_counts"]
        objective.load_LE = (counts_LE / counts_LE.sum(1, keepdim=True).clamp_min(1)).cpu()
        if self.config.moe.balance == "bias":
            for moe, counts_E in zip(objective.modules_L, counts_LE, strict=True):
                step_E = torch.sign(counts_E.mean() - counts_E) * self.config.loss.bias_rate
                moe.router.selection_bias += step_E.to(moe.router.selection_bias)

    def _report(self, counts: StepCounts, meter: Meter) -> None:
        """One line for the screen, log.jsonl and TensorBoard."""
        if not self.main:
            return
        values = self._figures(counts)
        speed = meter.read(self.config.train.steps - self.step)
        speeds = {k: v for k, v in speed.items() if k != "eta_seconds"}
        seen = self.loader.tokens_seen()
        self.log.write(step=self.step, **values, **speeds, tokens_seen=seen)
        for language, tokens in seen.items():
            self.writer.add_scalar(f"tokens/{language}", tokens, self.step)
        for key, value in {**values, "tokens_per_second": speed["tokens_per_second"], "mfu": speed["mfu"]}.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"train/{key}", value, self.step)
        extra = "".join(f"  {k} {values[k]:.3f}" for k in ("balance", "gate") if k in values)
        width = len(str(self.config.train.steps))
        self._say(
            f"step {self.step:>{width}}/{self.config.train.steps}  loss {values['loss']:.4f}{extra}  "
            f"lr {values['lr']:.1e}  norm {values['grad_norm']:.2f}  {speed['tokens_per_second']:,.0f} tok/s  "
            f"MFU {100 * speed['mfu']:.0f}%  ETA {duration(speed['eta_seconds'])}"
        )

    def _figures(self, counts: StepCounts) -> dict:
        """The step's losses over all its tokens, and its expert load."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        values = {
            "loss": sums["cross_entropy"].item() / max(counts.labels, 1),
            "lr": learning_rate(self.step - 1, self.config.train),
            "grad_norm": self._grad_norm(),
            "old_share": counts.old / max(counts.valid, 1),
        }
        if "expert_counts" in sums:
            load_LE = self.objective.load_LE
            values["greatest_load"] = load_LE.max().item() * load_LE.shape[1]
        if "scores" in sums:
            scores_LE = sums["scores"] / counts.valid
            values["balance"] = (scores_LE.shape[1] * (self.objective.load_LE * scores_LE).sum(1)).mean().item()
        if "z" in sums:
            values["z"] = sums["z"].item() / counts.valid
        if "gate_old" in sums:
            values["gate"] = sums["gate_old"].item() / max(counts.old, 1) + sums["gate_new"].item() / max(counts.new, 1)
        if "frozen_share" in sums:
            values["frozen_share"] = sums["frozen_share"].item() / counts.valid
        return values

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on."""
        peak = greatest_peak_memory(self.engine.device)
        tensors = state.gather(self.engine, keep=self.main)
        if self.main:
            moments = tuple(f"{m}." for m in state.MOMENTS)
            buffers = {name: b.detach().cpu().clone() for name, b in checkpoint.module_buffers(self.objective.model)}
            files = {
                "module": {k: t for k, t in tensors.items() if not k.startswith(moments)} | buffers,
                "optimizer": {k: t for k, t in tensors.items() if k.startswith(moments)},
                "trainer": {"load_LE": self.objective.load_LE},
            }
            info = {
                "moect": moect.__version__,
                "base_fingerprint": self.fingerprint,
                "began_from": self.began_from,
                "extension": extension_digest(self.extension),
                "data": self.loader.state_dict(),
                "world_size": self.world_size,
                "rollbacks": self.rollbacks,
                "config": dataclasses.asdict(self.config),
            }
        folder = self.folder / "checkpoints"

        def write() -> None:
            path = checkpoint.save_checkpoint(folder, self.step, files, info)
            best = best_checkpoint(self.folder, self.config)
            checkpoint.rotate(folder, self.config.train.keep_last, self.step, keep=best and best.step)
            self.log.write(event="checkpoint", step=self.step, peak_memory=peak)
            print(f"saved {path}", flush=True)

        distributed.on_main(write)

    def _find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, and what has changed since. One of another run is refused here, before
        anything is written."""
        folder = self.folder / "checkpoints"
        distributed.on_main(lambda: checkpoint.put_back(folder))
        path = distributed.on_main(
            lambda: checkpoint.list_checkpoints(folder) and checkpoint.find_checkpoint(self.folder)
        )
        if not path:
            return None, []
        info = checkpoint.read_info(path)
        if info["step"] > self.config.train.steps:
            raise CheckpointError(
                f"{path}: beyond the end, train.steps is {self.config.train.steps}; raise it to go on from there"
            )
        changed = check_same_run(info, self.config, self.fingerprint, str(path))
        check_same_start(info, self.config, str(path))
        check_extension(info, self.extension, str(path))
        self.began_from = info.get("began_from")
        self.loader.load_state_dict(info["data"])
        return path, changed

    def _find_start(self) -> Path:
        """The newest undamaged checkpoint of `model.start`, whose tensors fit; its corpora are read on from there."""
        path = distributed.on_main(lambda: checkpoint.find_checkpoint(Path(self.config.model.start)))
        info = checkpoint.read_info(path)
        check_start(info, self.config, self.fingerprint, str(path))
        check_extension(info, self.extension, str(path))
        self.began_from = info["files"][checkpoint.MODULE]
        self.loader.go_on_after(info["data"])
        return path

    def _begin_from(self, path: Path) -> None:
        """Take what trains, and nothing else, from another run's checkpoint."""
        ids = dict(checkpoint.module_buffers(self.objective.model)).get(IDS)
        tensors = widen_rows(checkpoint.read_module(path), ids)
        trains = [name for name, _ in state.trainable_parameters(self.engine) if name in tensors]
        moments = {f"{m}.{name}": torch.zeros_like(tensors[name]) for name in trains for m in state.MOMENTS}
        self._restore(tensors | moments, 0, path)
        self._say(f"what trains begins as in {path}")

    def _resume(self, path: Path) -> None:
        """Go back to a checkpoint."""
        self.go_back(path)
        if self.watch:
            self.watch.forget_after(self.step)
        self.rollbacks = checkpoint.read_info(path).get("rollbacks", 0)
        self.log.write(event="resume", step=self.step, world_size=self.world_size, changed=self.changed)
        self._say(f"resumed from {path}" + "".join(f"\n  changed: {line}" for line in self.changed))
        if change := self.loader.change:
            self.log.write(event="mixture", step=self.step, row=self.loader.rows, **change)
            shares = (f"\n  {key}: {change['before'][key]:.2%} -> {now:.2%}" for key, now in change["now"].items())
            self._say("the mixture changes; what was drawn before is not made up for" + "".join(shares))

    def go_back(self, path: Path) -> None:
        """Take weights, optimizer and step from a checkpoint of this run; the text goes on from where it is."""
        info = checkpoint.read_info(path)
        self._restore(checkpoint.read_module(path) | checkpoint.read_tensors(path, "optimizer"), info["step"], path)
        self.objective.load_LE = checkpoint.read_tensors(path, "trainer")["load_LE"]
        self.step = info["step"]

    def _restore(self, tensors: dict, steps: int, path: Path) -> None:
        """Masters, moments and buffers as a checkpoint has them, after `steps` optimizer steps."""
        self._check_tensors(tensors, path)
        position = self.loader.state_dict()
        batches = [batch.to(self.engine.device) for batch in self.loader.next_step()]
        state.wake_optimizer(self.engine, {**_arguments(batches[0]), "counts": self._count(batches), "scale": 1.0})
        state.scatter(self.engine, tensors, steps)
        for name, buffer in checkpoint.module_buffers(self.objective.model):
            buffer.copy_(tensors[name])
        self.objective.sums = {}
        self.loader.load_state_dict(position)

    def _check_tensors(self, tensors: dict, path: Path) -> None:
        shapes = {name: full_shape(p) for name, p in state.trainable_parameters(self.engine)}
        shapes |= {f"{m}.{name}": shape for name, shape in shapes.items() for m in state.MOMENTS}
        shapes |= {name: buffer.shape for name, buffer in checkpoint.module_buffers(self.objective.model)}
        checkpoint.check_shapes(tensors, shapes, path)

    def _measure(self, again: bool = True) -> None:
        """Measure this step, or take what was measured, and do what follows from it."""
        rows = self.watch and self.watch.measure(self.objective.model, self.step, again)
        if rows:
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


def _arguments(batch: MicroBatch) -> dict:
    return {
        "input_ids": batch.input_ids_BS,
        "labels": batch.labels_BS,
        "position_ids": batch.position_ids_BS,
        "role": batch.role_BS,
    }


def _all_reduced(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums over all ranks, in one collective."""
    names = sorted(sums)
    flat = torch.cat([sums[name].reshape(-1) for name in names])
    dist.all_reduce(flat)
    parts = flat.split([sums[name].numel() for name in names])
    return {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}


def _tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard")
