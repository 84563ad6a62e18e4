"""Kill trainings at random moments with SIGKILL, resume them, and compare the end with that of one never killed.

    python tests/kill_harness.py --moments 50 --seed 0

Moments are those of kill_moments.py, drawn kind by kind, and kills from outside after a random delay. Some runs are
killed again while they resume. Compared, bit for bit: every checkpoint at the end (weights, optimizer, balance state),
the data's position, the rows of the monitor and the figures of log.jsonl. One line a run; exit code 1 if any differs.

The processes are forked from this one, which has imported everything: a start costs a second, not ten.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from small_runs import Place, assert_same_bits, free_port, make_inputs  # noqa: E402

from moect.train.checkpoints.reading import list_checkpoints, read_info, step_of  # noqa: E402

WAIT = 300.0  # seconds that a process may take before it counts as hung
BASE = {
    "train": {"steps": 8, "save_every": 2, "keep_last": 2},
    "monitor": {"enabled": True, "samples": 1, "sample_tokens": 2, "resamples": 20},
}
FORGETS = {  # goes back to an earlier checkpoint at step 4
    "method": "full",
    "data": {"replay": 0.125},
    "train": {"steps": 8, "lr": 0.01, "warmup": 0, "save_every": 2, "keep_last": 0},
    "monitor": {"enabled": True, "samples": 0, "resamples": 0, "max_forgetting": 0.1, "action": "rollback"},
}
BIAS = {"fusion": "add", "balance": "bias", "language_gate": True, "experts": 3, "router": "sigmoid"}


@dataclass
class Variant:
    """A run that is killed: sections of its configuration, and its ranks."""

    sections: dict
    ranks: int = 1


VARIANTS = {
    "plain": Variant(BASE),
    "async": Variant({**BASE, "train": {**BASE["train"], "async_save": True}}),
    "bias, keep 1": Variant({**BASE, "moe": BIAS, "train": {**BASE["train"], "keep_last": 1, "precision": "bf16"}}),
    "rollback": Variant(FORGETS),
    "rollback, async": Variant({**FORGETS, "train": {**FORGETS["train"], "async_save": True}}),
    "2 ranks": Variant({**BASE, "train": {**BASE["train"], "zero_stage": 2}}, 2),
    "2 ranks, ZeRO 3, async": Variant({**BASE, "train": {**BASE["train"], "zero_stage": 3, "async_save": True}}, 2),
}


@dataclass
class Kill:
    """When a process is to die: at the `number`-th moment of a kind on a rank; or after `delay` seconds."""

    rank: int
    kind: str
    number: int = 0
    delay: float = 0.0
    together: bool = True  # with the other rank, as when a node goes; else that one must end by itself


@dataclass
class Outcome:
    """What became of one killed run."""

    moments: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)


class Harness:
    """Runs, kills and compares.

    Args:
        work: an empty folder.
    """

    def __init__(self, work: Path):
        self.work = work
        (work / "inputs").mkdir()
        self.inputs = make_inputs(work / "inputs")
        self.references: dict[str, Path] = {}
        self.moments: dict[str, list[list[str]]] = {}  # of each variant, by rank: the kinds of all moments

    def place(self, variant: str, output: Path) -> Place:
        """Where a variant's run finds its base and writes to."""
        output.mkdir(exist_ok=True)
        place = Place(self.inputs, output)
        if "max_forgetting" in VARIANTS[variant].sections["monitor"]:
            plain = place.values
            place.values = lambda *a, **s: plain(*a, **{"model": {"base": str(self._taught())}, **s})
        return place

    def reference(self, variant: str) -> Path:
        """The run that is never killed; made once. What it passes through is where others die."""
        if variant not in self.references:
            output = self.work / f"reference-{len(self.references)}"
            place, ranks = self.place(variant, output), VARIANTS[variant].ranks
            config = place.config(**VARIANTS[variant].sections, resume="auto")
            records = [self.work / f"{output.name}-{rank}.moments" for rank in range(ranks)]
            codes = self._run(place.write(config), output, records)
            if codes != [0] * ranks:
                raise RuntimeError(f"{variant}: the run that nobody kills ended with {codes}, see {output}")
            self.references[variant] = config.folder
            lines = [record.read_text().splitlines() for record in records]
            self.moments[variant] = [[line.split("\t")[0] for line in part] for part in lines]
        return self.references[variant]

    def draw(self, rng: random.Random, variant: str) -> list[Kill]:
        """The kills of one run: of a random kind at a random moment of it; sometimes again while it resumes."""
        self.reference(variant)
        kills = [self._draw_one(rng, variant)]
        while len(kills) < 4 and rng.random() < 0.35:
            again = self._draw_one(rng, variant)
            again.number = min(again.number, rng.randint(1, 12))  # a resumed run has fewer moments
            kills.append(again)
        return kills

    def _draw_one(self, rng: random.Random, variant: str) -> Kill:
        ranks = VARIANTS[variant].ranks
        rank, together = rng.randrange(ranks), rng.random() < 0.7
        counts = Counter(self.moments[variant][rank])
        kind = rng.choice([*sorted(counts), "delay"])
        if kind == "delay":
            return Kill(rank, kind, delay=rng.random() * 4.0, together=True)
        return Kill(rank, kind, number=rng.randint(1, counts[kind]), together=together)

    def kill_and_compare(self, name: str, variant: str, kills: list[Kill], cache: bool = True) -> Outcome:
        """Train, killed as said; resume to the end; compare."""
        reference, outcome, output = self.reference(variant), Outcome(), self.work / name
        place = self.place(variant, output)
        if cache:
            shutil.copytree(reference.parent / ".cache", output / ".cache")
        config = place.config(**VARIANTS[variant].sections, resume="auto")
        path = place.write(config)
        try:
            for number, kill in enumerate([*kills, None]):
                records = [self.work / f"{name}-{number}-{rank}.moments" for rank in range(VARIANTS[variant].ranks)]
                codes = self._run(path, output, records, kill)
                while any(_spoilt_by_the_fork(record.with_suffix(".txt")) for record in records):
                    codes = self._run(path, output, records, kill)
                if kill is None and any(codes):
                    outcome.faults.append(f"the last resume ended with {codes}")
                if kill is not None:
                    died = -signal.SIGKILL in codes
                    lines = records[kill.rank].read_text().splitlines() if records[kill.rank].exists() else []
                    last = lines[-1].split("\t")[1] if lines else "start"
                    outcome.kinds.append(kill.kind if died else "none")
                    outcome.moments.append(f"{kill.kind}: {last}" if died else "went on to the end")
                    if not died and any(codes):
                        outcome.faults.append(f"ended with {codes} before it was killed")
            if not outcome.faults:
                self._compare(config.folder, reference, outcome)
        except Exception as error:  # the next run goes on
            text = traceback.format_exc() if not isinstance(error, (AssertionError, RuntimeError)) else str(error)
            outcome.faults.append(text)
        return outcome

    def _run(self, path: Path, output: Path, records: list[Path], kill: Kill | None = None) -> list[int]:
        """Fork a process a rank, and return their exit codes, negative for a signal."""
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(records))}
        pids = []
        for rank, record in enumerate(records):
            mine = kill if kill and kill.kind != "delay" and kill.rank == rank else None
            pid = os.fork()
            if pid == 0:
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if len(records) > 1 else {}
                _become_training(path, output, record, ranked, mine)
            pids.append(pid)
        return self._wait(pids, kill)

    def _wait(self, pids: list[int], kill: Kill | None) -> list[int]:
        codes: dict[int, int] = {}
        started = time.monotonic()
        outside = kill is not None and kill.kind == "delay"
        while len(codes) < len(pids):
            for pid in [pid for pid in pids if pid not in codes]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            waited = time.monotonic() - started
            dead = -signal.SIGKILL in codes.values()
            if (outside and waited > kill.delay) or (dead and kill.together):
                _kill_all(pid for pid in pids if pid not in codes)
            if waited > WAIT:
                _kill_all(pid for pid in pids if pid not in codes)
                raise RuntimeError(f"hung: still there after {WAIT:.0f} s; ended: {list(codes.values())}")
            time.sleep(0.005)
        return [codes[pid] for pid in pids]

    def _compare(self, run: Path, reference: Path, outcome: Outcome) -> None:
        """Note what differs between two finished runs."""
        mine, theirs = (list_checkpoints(folder / "checkpoints") for folder in (run, reference))
        if [step_of(p) for p in mine] != [step_of(p) for p in theirs]:
            outcome.faults.append(f"checkpoints {[p.name for p in mine]}, not {[p.name for p in theirs]}")
            return
        for path, other in zip(mine, theirs, strict=True):
            assert_same_bits(run, reference, step_of(path))
            infos = [{k: v for k, v in read_info(p).items() if k not in NOT_COMPARED} for p in (path, other)]
            if infos[0] != infos[1]:
                keys = [k for k in infos[1] if infos[0].get(k) != infos[1][k]]
                outcome.faults.append(f"{path.name}: {', '.join(keys)} differ")
        for name in ("forgetting.jsonl", "samples.jsonl", "tasks.jsonl"):
            rows = [_lines(folder / "monitor" / name) for folder in (run, reference)]
            if rows[0] != rows[1]:
                outcome.faults.append(f"monitor/{name} differs: {len(rows[0])} rows, {len(rows[1])} in the other")
        values = [_figures(folder) for folder in (run, reference)]
        if values[0] != values[1]:
            steps = [s for s in values[1] if values[0].get(s) != values[1][s]] or sorted(values[0].keys() - values[1])
            outcome.faults.append(f"figures of log.jsonl differ at steps {steps}")
        told = [line for line in _lines(run / "log.jsonl") if "event" in line]
        outcome.resumed = [line["step"] for line in told if line["event"] == "resume"]
        if told[-1]["event"] != "end":
            outcome.faults.append(f"the log's last event is {told[-1]['event']}")
        outcome.left_over = [str(p.relative_to(run)) for p in run.rglob(".*") if p.name not in MEANT]
        if folders := [p.name for p in (run / "checkpoints").glob(".*")]:
            outcome.faults.append(f"left over: {', '.join(folders)}")

    def _taught(self) -> Path:
        """A base that has learned English, so that there is something to forget; made once."""
        taught = self.work / "taught"
        if not taught.exists():
            english = {"languages": {"en": "old"}, "train": [{"path": "en.train.jsonl", "lang": "en"}]}
            data = {**english, "evaluation": [], "replay": None}
            steps = {"steps": 60, "lr": 0.01, "save_every": 60, "log_every": 60}
            pid = os.fork()
            if pid == 0:
                _in_child(self.work / "taught.txt", lambda: self._teach(taught, data, steps))
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                raise RuntimeError(f"the base could not be taught, see {self.work / 'taught.txt'}")
        return taught

    def _teach(self, taught: Path, data: dict, steps: dict) -> int:
        from export_helpers import export_run

        from moect.train.loop import train

        (self.work / "teaching").mkdir()
        place = Place(self.inputs, self.work / "teaching")
        export_run(train(place.config(method="full", data=data, train=steps)), output=taught)
        return 0


def _spoilt_by_the_fork(record: Path) -> bool:
    """Whether a process could not begin because a fork copies a thread pool without its threads, which PyTorch then
    finds out, now and then; a process of its own does not have that."""
    return record.exists() and "Invalid thread pool" in record.read_text()


NOT_COMPARED = ("peak_memory", "config", "files")  # the tensors are compared themselves
SPEED = ("tokens_per_second", "mfu", "peak_memory", "seconds", "step_seconds", "data_wait")
MEANT = (".lock",)


def _lines(path: Path) -> list[dict]:
    """The lines of a file, those left out that a kill has cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            if path.name != "log.jsonl":
                raise
    return lines


def _figures(run: Path) -> dict[int, dict]:
    """The figures of log.jsonl by step, without those that a resume superseded and without speeds."""
    steps = {}
    for line in _lines(run / "log.jsonl"):
        if line.get("event") == "resume":
            steps = {step: values for step, values in steps.items() if step <= line["step"]}
        elif "event" not in line:
            steps[line["step"]] = {k: v for k, v in line.items() if k not in SPEED}
    return steps


def _kill_all(pids) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _become_training(path: Path, output: Path, record: Path, environment: dict, kill: Kill | None) -> None:
    """In a forked child: the command itself, watched."""

    def work() -> int:
        from kill_moments import Moments

        from moect.cli import main

        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ.update(environment)
        Moments(output, record, kill and kill.kind, kill and kill.number).install()
        return main(["train", "--config", str(path)])

    _in_child(record.with_suffix(".txt"), work)


def _in_child(words: Path, work) -> None:
    """Do `work` with the output going to a file, and end."""
    code = 1
    try:
        handle = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = work()
    except BaseException:  # nothing may run on in the harness's own frames
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Kill as many runs as asked, and tell of each."""
    parser = argparse.ArgumentParser(description="Kill trainings at random moments, resume them and compare.")
    parser.add_argument("--moments", type=int, default=50, help="runs to kill (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, moments and delays (default 0)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--only", type=int, help="the number of one run, to look at it again; keeps the folder")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one (default 0)")
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs that differ")
    arguments = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp(prefix="kill-"))
    import_everything()
    harness, failed, kinds, left_over = Harness(work), 0, Counter(), Counter()
    for number in range(arguments.moments):
        rng = random.Random(f"{arguments.seed} {number}")
        variant = arguments.variants[number % len(arguments.variants)]
        if arguments.only not in (None, number) or number < arguments.first:
            continue
        kills, cache = harness.draw(rng, variant), rng.random() < 0.8
        outcome = harness.kill_and_compare(f"run-{number}", variant, kills, cache)
        kinds.update(outcome.kinds)
        left_over.update(Path(path).parts[0] for path in outcome.left_over)
        verdict = f"DIFFERS: {'; '.join(outcome.faults)}" if outcome.faults else "the same"
        resumed = ", ".join(map(str, outcome.resumed)) or "-"
        print(f"{number:3}  {variant:22}  {' | '.join(outcome.moments)}  -> from {resumed}: {verdict}", flush=True)
        if outcome.faults:
            failed += 1
        elif arguments.only is None:
            shutil.rmtree(work / f"run-{number}")
    print(f"killed {sum(kinds.values())} times: " + ", ".join(f"{k} {n}" for k, n in sorted(kinds.items())))
    if left_over:
        print("left over: " + ", ".join(f"{n} in {folder}" for folder, n in left_over.items()))
    print(f"{failed} runs differ" if failed else "every run ended as the one never killed")
    if (failed and arguments.keep) or arguments.only is not None:
        print(f"see {work}")
    else:
        shutil.rmtree(work)
    return 1 if failed else 0


def import_everything() -> None:
    """Before the first fork, and nothing that starts a thread."""
    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import moect.cli  # noqa: F401
    import moect.stages  # noqa: F401
    import moect.train.loop  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
