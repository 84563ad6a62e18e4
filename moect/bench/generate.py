"""`moect bench generate`: what appended experts and their gate cost at inference, beside the base, in turns.

`moect.bench.steps` says what a round is. Prefill is compared round by round, generation step by step.

B batch, S prompt, N new tokens
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from math import inf
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from moect.bench.cases import DTYPES
from moect.bench.machine import machine, versions
from moect.bench.models import (
    AS_IS,
    BASE,
    BASE_ONLY,
    CLOSED,
    FLOOR,
    LAPTOP,
    OPEN,
    Contestant,
    Shape,
    exported_contestants,
    parse_shape,
    random_contestants,
    share_let_through,
)
from moect.bench.progress import Progress
from moect.bench.result_file import result_file
from moect.bench.steps import FloorRunner, Runner, one_round
from moect.bench.turns import SECONDS, rounds_of
from moect.errors import ConfigError, ExportError
from moect.free_memory import free_bytes
from moect.model.embeddings import rows_of
from moect.tables import aligned

BELOW = f"""\
x base: the base's time over this one's for the same prefill or step; the median, and between which the middle half lies
{FLOOR}: the matrix products of the base and nothing else
MiB a token: of weights that a step reads, over its batch; GB/s: so many of them in the time of a step"""


@dataclass(frozen=True)
class Options:
    """What to measure; `read_options` checks and completes it.

    Attributes:
        shape: of random models; None with `model`.
        dtypes: empty: the dtype in which `model` was written.
        model: folder of an exported model; None: random ones.
        text: documents to go through; None: random tokens.
        batch, prompt, new: B, S and N.
        rounds: None: what `seconds` allow.
        seconds: of timing, for a dtype.
    """

    shape: Shape | None
    dtypes: tuple[str, ...]
    model: Path | None
    text: str | None
    batch: int
    prompt: int
    new: int
    device: str
    threads: int
    rounds: int | None
    seconds: float
    seed: int
    output: Path | None

    @property
    def tokens(self) -> int:
        return self.batch * (self.prompt + self.new)

    def command(self) -> str:
        """The command that measures the same, with every default spelled out."""
        words = ["moect", "bench", "generate"]
        words += ["--model", str(self.model)] if self.model else ["--shape", str(self.shape)]
        words += ["--text", self.text] if self.text else []
        words += ["--dtype", *self.dtypes] if self.dtypes else []
        words += ["--batch", str(self.batch), "--prompt", str(self.prompt), "--new", str(self.new)]
        words += ["--device", self.device, "--threads", str(self.threads)]
        words += ["--rounds", str(self.rounds)] if self.rounds else ["--seconds", str(self.seconds)]
        words += ["--seed", str(self.seed)]
        return shlex.join(words + (["--output", str(self.output)] if self.output else []))


def read_options(
    shape: str | None = None,
    dtypes: list[str] | None = None,
    model: Path | None = None,
    text: str | None = None,
    batch: int = 1,
    prompt: int = 128,
    new: int = 32,
    device: str | None = None,
    threads: int | None = None,
    rounds: int | None = None,
    seconds: float = SECONDS,
    seed: int = 0,
    output: Path | None = None,
) -> Options:
    """The command line as options; what is None gets its default.

    Raises:
        ConfigError: values that cannot be, or that exclude each other.
    """
    if model and shape:
        raise ConfigError("--shape is for random models, and --model has one of its own; leave one of them out")
    if text and not model:
        raise ConfigError("--text is for the tokenizer and the gate of a trained model; give --model too")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; leave it out to measure on the CPU")
    for name in dtypes or []:
        if name not in DTYPES:
            raise ConfigError(f"--dtype {name}: there are {', '.join(DTYPES)}")
    if not 0 < seconds < inf:
        raise ConfigError(f"--seconds {seconds}: expected a number above 0, as in 20")
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"--seed {seed}: expected a whole number of 64 bits, from -2^63 to 2^63 - 1")
    return Options(
        shape=None if model else parse_shape(shape) if shape else LAPTOP,
        dtypes=tuple(dict.fromkeys(dtypes or ([] if model else ["fp32", "bf16"]))),
        model=model,
        text=text,
        batch=batch,
        prompt=prompt,
        new=new,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=threads or torch.get_num_threads(),
        rounds=rounds,
        seconds=seconds,
        seed=seed,
        output=output,
    )


def run(options: Options) -> dict:
    """Measure, print tables and write the JSON file, after each dtype what there is; returns what it holds.

    Raises:
        ConfigError: a shape that does not fit into the free memory, a model or text that cannot be used, a file that
            cannot be written; or a contestant that does not compute the base though it should.
    """
    if options.shape:
        for dtype in options.dtypes:
            _require_memory(options, options.shape, dtype)
    threads = torch.get_num_threads()
    with result_file(options.output) as write:
        torch.set_num_threads(options.threads)
        try:
            return _measure(options, write)
        finally:
            torch.set_num_threads(threads)


def _require_memory(options: Options, shape: Shape, dtype: str) -> None:
    needs = shape.weights * DTYPES[dtype].itemsize + options.tokens * (2 * shape.L * shape.D + 4 * shape.F) * 2
    free = free_bytes(options.device)
    if needs > free:
        raise ConfigError(
            f"--shape {shape} in {dtype} needs at least {needs / 2**30:.1f} GiB and the {options.device} has "
            f"{free / 2**30:.1f} GiB free; give a smaller one, or a smaller --batch or --prompt"
        )


def _measure(options: Options, write: Callable[[dict], None]) -> dict:
    result = {
        "command": options.command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "device": options.device,
        "complete": False,  # until the last dtype is in it
        "versions": versions(),
        "machine": machine(options.device),
        "results": [],
    }
    here = result["machine"]
    software = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
    print(f"{here.get('gpu', here['cpu'])}, CPU threads {here['threads']}, {software}, seed {options.seed}", flush=True)
    read = _Text(options)
    dtypes = options.dtypes or (None,)
    for number, dtype in enumerate(dtypes, 1):
        records = _measure_dtype(options, dtype, read)
        result["results"] += records
        result["complete"] = number == len(dtypes)
        write(result)
        print(f"\n{_title(options, records)}\n{render(records)}", flush=True)
        for record in records:
            if record["contestant"] == AS_IS:
                print(f"the gate lets {100 * record['share_let_through']:.2f}% of the tokens through", flush=True)
    print(f"\n{BELOW}", flush=True)
    return result


class _Text:
    """The tokens that all contestants go through, (B, S + N)."""

    def __init__(self, options: Options):
        self.options = options
        self.found: Tensor | None = None
        if options.text:
            self.found = torch.tensor(self._of_files(options.tokens)).view(options.batch, -1)

    def ids(self, base: nn.Module) -> Tensor:
        """Without a text, random tokens of the base."""
        if self.found is None:
            generator = torch.Generator().manual_seed(self.options.seed)
            shape = (self.options.batch, self.options.prompt + self.options.new)
            self.found = torch.randint(base.lm_head.out_features, shape, generator=generator)
        return self.found.to(self.options.device)

    def _of_files(self, wanted: int) -> list[int]:
        from moect.config import ModelConfig
        from moect.data.reading.sources import read_documents
        from moect.data.vocabulary.tokenizer import load_tokenizer
        from moect.data_config import DataConfig, SourceConfig

        tokenizer = load_tokenizer(ModelConfig(base=str(self.options.model)))
        source, data, ids = SourceConfig(path=str(Path(self.options.text).absolute()), lang="any"), DataConfig(), []
        for document in read_documents(source, data.root, data.max_bad_fraction):
            ids += tokenizer(document.text, verbose=False)["input_ids"]
            if len(ids) >= wanted:
                return ids[:wanted]
        raise ConfigError(
            f"--text {self.options.text}: has {len(ids)} tokens, and --batch {self.options.batch} of --prompt "
            f"{self.options.prompt} and --new {self.options.new} need {wanted}; give more text or a smaller number"
        )


def _measure_dtype(options: Options, dtype: str | None, text: _Text) -> list[dict]:
    """The records of all contestants in one dtype, the floor first."""
    tell = Progress(f"generate {dtype or ''}".rstrip())
    tell("making models")
    if options.shape:
        contestants = random_contestants(options.shape, dtype, options.device, options.batch, options.seed)
    else:
        contestants = exported_contestants(options.model, dtype, options.device, options.batch)
    base = contestants[0].model
    ids_BS = text.ids(base)
    known_BS = ids_BS.where(ids_BS < base.lm_head.out_features, 0)  # the base has no tokens that were added to it
    tell("holding them against the base")
    _require_base(contestants, known_BS[:, : options.prompt])
    shares = {c.name: share_let_through(c, ids_BS) for c in contestants if c.name in (AS_IS, CLOSED, OPEN)}

    runners = {FLOOR: FloorRunner(base, options.batch, options.prompt, options.device)}
    for c in contestants:
        ids = known_BS if c.name in (BASE, BASE_ONLY) else ids_BS
        runners[c.name] = Runner(c, ids, options.prompt, options.device)
    tell("warming up")
    rounds = rounds_of(
        partial(one_round, runners, options.new), options.rounds, options.seconds, options.seed, tell.round
    )
    tell("")
    prefill = {name: [taken[name].prefill for taken in rounds] for name in runners}
    steps = {name: [step for taken in rounds for step in taken[name].steps] for name in runners}
    written = next(name for name, known in DTYPES.items() if known == base.dtype)
    step_bytes = {FLOOR: contestants[0].step_bytes} | {c.name: c.step_bytes for c in contestants}
    return [
        {
            "contestant": name,
            "dtype": written,
            "rounds": len(rounds),
            "prefill": _figures(prefill[name], prefill[BASE], options.batch * options.prompt),
            "generation": _figures(steps[name], steps[BASE], options.batch),
            "step_bytes": step_bytes[name],
            "bytes_per_token": step_bytes[name] / options.batch,
            "share_let_through": shares.get(name),
        }
        for name in runners
    ]


def _figures(seconds: list[float], of_base: list[float], tokens: int) -> dict:
    """Tokens a second, and how fast that is beside the base.

    Args:
        seconds: of each prefill, or each step.
        of_base: the base's of the same rounds and steps.
        tokens: that each of them takes.
    """
    ratios = [base / own for base, own in zip(of_base, seconds, strict=True)]
    low, _, high = quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / median(seconds),
        "x_base": median(ratios),
        "x_base_quartiles": [low, high],
    }


@torch.no_grad()
def _require_base(contestants: list[Contestant], ids_BS: Tensor) -> None:
    """Refuse to time what should be the base bit for bit and is not.

    Raises:
        ExportError: it names the contestant.
    """
    expected_BSV = contestants[0].model(ids_BS, use_cache=False).logits
    for c in contestants:
        if c.name == BASE_ONLY or (c.name == CLOSED and not rows_of(c.model)):
            with c.within():
                same = torch.equal(c.model(ids_BS, use_cache=False).logits, expected_BSV)
            if not same:
                raise ExportError(f"`{c.name}` has other logits than the base, so to time it says nothing; report this")


def render(records: list[dict]) -> str:
    """A line a contestant."""
    heading = ["", "prefill tokens/s", "x base", "middle half", "generation tokens/s", "x base", "middle half"]
    heading += ["MiB a token", "GB/s", "rounds"]
    rows = []
    for record in records:
        row = [record["contestant"]]
        for part in ("prefill", "generation"):
            figures = record[part]
            row += [_rate(figures["tokens_per_s"]), f"{figures['x_base']:.3f}"]
            row += ["-".join(f"{ratio:.3f}" for ratio in figures["x_base_quartiles"])]
        read = record["bytes_per_token"]
        row += [
            f"{read / 2**20:.1f}",
            f"{read * record['generation']['tokens_per_s'] / 1e9:.1f}",
            str(record["rounds"]),
        ]
        rows.append(row)
    return aligned(heading, rows)


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.1f}" if tokens_per_s < 1000 else f"{tokens_per_s:,.0f}"


def _title(options: Options, records: list[dict]) -> str:
    what = str(options.model or ", ".join(f"{k} {v}" for k, v in options.shape._asdict().items()))
    return f"{what}, {records[0]['dtype']}: batch {options.batch}, prompt {options.prompt}, new tokens {options.new}"
