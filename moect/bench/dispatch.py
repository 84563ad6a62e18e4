"""`moect bench dispatch`: every backend, transformers' experts and the floor, on the same tensors, in one process.

For each shape and dtype: who can take part, whether all of them compute what the obvious loop computes in float64 (on
all tokens, gradients included), the peak memory of a forward and backward pass, and the times, in turns.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from statistics import median

import torch

from moect.bench import cases, table
from moect.bench.cases import Problem, Shape
from moect.bench.contestants import Contestant, LeftOut, exact_results, of_backends, require_agreement
from moect.bench.floor import Floor
from moect.bench.machine import machine, versions
from moect.bench.memory import peak_extra_bytes
from moect.bench.peers import peers
from moect.bench.progress import Progress
from moect.bench.result_file import result_file
from moect.bench.turns import SECONDS, Times, dense_flops_per_second, take_turns
from moect.dispatch import backends, choose
from moect.errors import ConfigError
from moect.free_memory import free_bytes

MOST_SKEW = 1e6  # fp32 holds its products with normal numbers; far below it one expert already gets all tokens


@dataclass(frozen=True)
class Options:
    """What to measure; `read_options` checks and completes it."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    backends: tuple[str, ...]
    device: str
    threads: int
    rounds: int | None
    seconds: float
    seed: int
    skew: float
    output: Path | None

    def command(self) -> str:
        """The command that measures the same, with every default spelled out."""
        words = ["moect", "bench", "dispatch", "--shape", *map(str, self.shapes), "--dtype", *self.dtypes]
        words += ["--backend", *self.backends, "--device", self.device, "--threads", str(self.threads)]
        words += ["--rounds", str(self.rounds)] if self.rounds else ["--seconds", str(self.seconds)]
        words += ["--seed", str(self.seed), "--skew", str(self.skew)]
        return shlex.join(words + (["--output", str(self.output)] if self.output else []))


def read_options(
    shapes: list[str] | None = None,
    dtypes: list[str] | None = None,
    names: list[str] | None = None,
    device: str | None = None,
    threads: int | None = None,
    rounds: int | None = None,
    seconds: float = SECONDS,
    seed: int = 0,
    skew: float = 0.0,
    output: Path | None = None,
) -> Options:
    """The command line as options; what is None gets its default, which depends on the device.

    Raises:
        ConfigError: a shape, dtype, backend, device or number that cannot be.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; leave it out to measure on the CPU")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = cases.CUDA_SHAPES if device == "cuda" else cases.CPU_SHAPES
    dtypes = dtypes or (["bf16"] if device == "cuda" else ["fp32", "bf16"])
    for known, given, flag in ((list(cases.DTYPES), dtypes, "--dtype"), (backends(), names or [], "--backend")):
        for name in given:
            if name not in known:
                raise ConfigError(f"{flag} {name}: there are {', '.join(known)}")
    processors = os.cpu_count()
    if threads is not None and processors is not None and threads > processors:
        raise ConfigError(f"--threads {threads}: this machine has {processors} processors; give at most {processors}")
    if not 0 < seconds < inf:
        raise ConfigError(f"--seconds {seconds}: expected a number above 0, as in 20")
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"--seed {seed}: expected a whole number of 64 bits, from -2^63 to 2^63 - 1")
    if not abs(skew) <= MOST_SKEW:  # NaN too
        raise ConfigError(f"--skew {skew}: expected a number from -{MOST_SKEW:.0e} to {MOST_SKEW:.0e}, as in 0.5")
    return Options(
        shapes=tuple(dict.fromkeys(map(cases.parse_shape, shapes))) if shapes else usual,
        dtypes=tuple(dict.fromkeys(dtypes)),
        backends=tuple(dict.fromkeys(names or backends())),
        device=device,
        threads=threads or torch.get_num_threads(),
        rounds=rounds,
        seconds=seconds,
        seed=seed,
        skew=skew,
        output=output,
    )


def run(options: Options) -> dict:
    """Measure, print tables and write the JSON file, after each case what there is; returns what it holds.

    Raises:
        ConfigError: a shape that does not fit into the free memory, or a file that cannot be written; both are known
            before anything is measured.
        DispatchError: a contestant that computes something else.
    """
    for shape in options.shapes:
        for dtype in options.dtypes:
            _require_memory(options, shape, dtype)
    threads = torch.get_num_threads()
    with result_file(options.output) as write:
        torch.set_num_threads(options.threads)
        try:
            return _measure(options, write)
        finally:
            torch.set_num_threads(threads)


def _require_memory(options: Options, shape: Shape, dtype: str) -> None:
    needs, free = cases.needed_bytes(shape, dtype), free_bytes(options.device)
    if needs > free:
        raise ConfigError(
            f"--shape {shape} in {dtype} needs at least {needs / 2**30:.1f} GiB and the {options.device} has "
            f"{free / 2**30:.1f} GiB free; give a smaller one"
        )


def _measure(options: Options, write: Callable[[dict], None]) -> dict:
    result = {
        "command": options.command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "skew": options.skew,
        "device": options.device,
        "complete": False,  # until the last case is in it
        "versions": versions(),
        "machine": machine(options.device),
        "dense_bf16_flops_per_s": dense_flops_per_second("cuda") if options.device == "cuda" else None,
    }
    here = result["machine"]
    software = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
    print(f"{here.get('gpu', here['cpu'])}, CPU threads {here['threads']}, {software}, seed {options.seed}")
    dense = result["dense_bf16_flops_per_s"]
    if dense:
        print(f"dense bf16 matrix product: {dense / 1e12:.0f} TFLOP/s")
    measured, told = [], set()
    for shape in options.shapes:
        for dtype in options.dtypes:
            records = _measure_case(options, shape, dtype, dense)
            measured.append(records)
            result["results"] = [record for case in measured for record in case]
            result["complete"] = len(measured) == len(options.shapes) * len(options.dtypes)
            write(result)
            print(f"\n{_title(records)}\n{table.render_case(records, dense=bool(dense))}", flush=True)
            for record in records:
                line = f"{record['contestant']} is left out: {record['reason']}"
                if record["reason"] is not None and line not in told:
                    told.add(line)
                    print(line, flush=True)
    print(f"\nforward and backward pass, what `auto` takes\n{table.render_closing(measured)}", flush=True)
    print(table.BELOW_CLOSING, flush=True)
    return result


def _title(records: list[table.Record]) -> str:
    shape, segments = records[0]["shape"], records[0]["tokens_per_expert"]
    named = ", ".join(f"{letter} {size}" for letter, size in shape.items())
    least = f"output and gradients {records[0]['result_bytes'] / 2**20:.1f} MiB"
    return f"{named}, {records[0]['dtype']}: {segments['fewest']} to {segments['most']} tokens an expert, {least}"


def _measure_case(options: Options, shape: Shape, dtype: str, dense: float | None) -> list[table.Record]:
    """The records of one shape and dtype: the floor's, our backends', transformers'."""
    problem = cases.make_problem(shape, dtype, options.device, options.seed, options.skew)
    # these may compile kernels and say so, which is not to stand in a line of progress
    auto = choose("auto", problem.x_TD, problem.gate_up_E2FD)
    entrants = [*of_backends(list(options.backends), problem), *peers(problem)]
    tell = Progress(f"{shape} {dtype}")
    tell("checking against float64")
    exact = exact_results(problem)
    for entrant in entrants:
        if isinstance(entrant, Contestant):
            require_agreement(entrant, exact, problem)
    del exact
    tell("measuring memory")
    memory = {c.name: peak_extra_bytes(c.forward_backward, options.device) for c in _taking_part(entrants)}
    tell("warming up")
    floor = Floor(problem)
    contestants = [Contestant("floor", "floor", floor.forward, floor.forward_backward), *_taking_part(entrants)]
    times = take_turns(contestants, options.device, options.rounds, options.seconds, options.seed, tell=tell.round)
    tell("")
    return [_record(entrant, problem, times, memory, auto, dense) for entrant in [contestants[0], *entrants]]


def _taking_part(entrants: list[Contestant | LeftOut]) -> list[Contestant]:
    return [entrant for entrant in entrants if isinstance(entrant, Contestant)]


def _record(
    entrant: Contestant | LeftOut,
    problem: Problem,
    times: dict[str, Times],
    memory: dict[str, int | None],
    auto: str,
    dense: float | None,
) -> table.Record:
    """All that is known of one contestant on one problem; None where there is no such number."""
    shape = problem.shape
    counts = torch.bincount(problem.indices_TK.flatten().cpu(), minlength=shape.E)
    record = {
        "shape": shape._asdict(),
        "dtype": problem.dtype_name,
        "tokens_per_expert": {"fewest": counts.min().item(), "most": counts.max().item()},
        "contestant": entrant.name,
        "kind": entrant.kind,
        "auto": entrant.name == auto,
        "reason": entrant.reason if isinstance(entrant, LeftOut) else None,
        "rounds": None,
        "peak_extra_bytes": memory.get(entrant.name),
        "result_bytes": problem.result_bytes,
        "share_of_dense": None,
    }
    taken = times.get(entrant.name)
    for key in ("forward", "forward_backward"):
        flops = shape.flops(backward=key == "forward_backward")
        values = getattr(taken, key) if taken else []
        record[f"{key}_ms"] = median(values) if values else None
        record[f"{key}_min_ms"] = min(values) if values else None
        record[f"{key}_flops"] = flops
        record[f"{key}_gflops_per_s"] = flops / median(values) / 1e6 if values else None
    if taken:
        record["rounds"] = taken.rounds
        if dense and problem.dtype == torch.bfloat16:  # whose rate it is
            record["share_of_dense"] = record["forward_backward_gflops_per_s"] * 1e9 / dense
    return record
