"""`moect bench`: its parts, and what they can be told."""

from __future__ import annotations

import argparse
from pathlib import Path

from moect.argument_types import above_zero, positive


def add_bench(commands) -> None:
    """Add the command to a parser's."""
    doc = "Measure what our own parts cost, beside their rivals and beside what the machine could do."
    bench = commands.add_parser("bench", help=doc[0].lower() + doc[1:].rstrip("."), description=doc)
    parts = bench.add_subparsers(required=True, metavar="PART")
    _add_dispatch(parts)
    _add_data(parts)
    _add_generate(parts)


def dispatch(arguments: argparse.Namespace) -> None:
    """Time the expert dispatch: our backends, transformers' experts and the floor, on the same tensors, in turns."""
    from moect.bench.dispatch import read_options, run

    given = ("device", "threads", "rounds", "seconds", "seed", "skew", "output")
    options = {name: getattr(arguments, name) for name in given}
    run(read_options(arguments.shape, arguments.dtype, arguments.backend, **options))


def data(arguments: argparse.Namespace) -> None:
    """Time reading, tokenizing and storing a corpus, beside the tokenizers library alone, in turns; and its memory."""
    from moect.bench.data import Options, run
    from moect.processes import available_cores

    workers = arguments.workers or available_cores()
    names = ("text", "tokenizer", "megabytes", "rounds", "seed", "output")
    run(Options(workers=workers, **{name: getattr(arguments, name) for name in names}))


def generate(arguments: argparse.Namespace) -> None:
    """Time prefill and generation: a base, the same with experts and a gate, a stock mixture, in turns."""
    from moect.bench.generate import read_options, run

    given = ("model", "text", "batch", "prompt", "new", "device", "threads", "rounds", "seconds", "seed", "output")
    run(read_options(arguments.shape, arguments.dtype, **{name: getattr(arguments, name) for name in given}))


def _add_dispatch(parts) -> None:
    doc = dispatch.__doc__
    made = parts.add_parser(
        "dispatch",
        help=doc[0].lower() + doc[1:].rstrip("."),
        description=doc,
        epilog="example: moect bench dispatch --shape 2048,512,1024,8,2 --dtype bf16 --output dispatch.json",
    )
    made.set_defaults(run=dispatch)
    made.add_argument(
        "--shape",
        nargs="+",
        metavar="T,D,F,E,K",
        help="tokens, width, expert width, experts, experts a token (default: five for a CPU, two for a GPU)",
    )
    made.add_argument("--dtype", nargs="+", metavar="NAME", help="fp32, bf16, fp16 (default: fp32 bf16; on a GPU bf16)")
    made.add_argument("--backend", nargs="+", metavar="NAME", help="which of ours (default: all)")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    made.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's own choice)")
    made.add_argument("--rounds", type=positive, help="default: what --seconds allow, from 5 to 101")
    made.add_argument("--seconds", type=float, default=20.0, metavar="S", help="for a shape and dtype (default 20)")
    made.add_argument("--seed", type=int, default=0, help="of tensors and routing (default 0)")
    made.add_argument(
        "--skew",
        type=float,
        default=0.0,
        help="how uneven the routing is: 0 nearly balanced (default), 1 far from it",
    )
    made.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers there; never over a file")


def _add_data(parts) -> None:
    doc = data.__doc__
    made = parts.add_parser("data", help=doc[0].lower() + doc[1:].rstrip("."), description=doc)
    made.set_defaults(run=data)
    made.add_argument("--text", metavar="PATH", help="file, glob or folder of documents (default: numbers in words)")
    made.add_argument("--tokenizer", metavar="DIR", help="default: a small one, trained on that text")
    made.add_argument("--megabytes", type=above_zero, default=64.0, metavar="MB", help="of text (default 64)")
    made.add_argument("--workers", type=positive, help="our processes, and the library's threads (default: the cores)")
    made.add_argument("--rounds", type=positive, default=3, help="of both (default 3)")
    made.add_argument("--seed", type=int, default=0, help="of text and order (default 0)")
    made.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers there; never over a file")


def _add_generate(parts) -> None:
    doc = generate.__doc__
    made = parts.add_parser(
        "generate",
        help=doc[0].lower() + doc[1:].rstrip("."),
        description=doc,
        epilog="example: moect bench generate --model runs/extend/export --text english.txt",
    )
    made.set_defaults(run=generate)
    made.add_argument(
        "--shape",
        metavar="L,D,F,V,E,K,W",
        help="blocks, width, FFN width, vocabulary, experts, experts a token, expert width, of random models "
        "(default: 8,512,1536,32768,4,2,1536)",
    )
    made.add_argument("--model", type=Path, metavar="DIR", help="an exported model, instead of random ones")
    made.add_argument("--text", metavar="PATH", help="with --model: file, glob or folder of documents to go through")
    made.add_argument("--dtype", nargs="+", metavar="NAME", help="fp32, bf16, fp16 (default: fp32 bf16; the model's)")
    made.add_argument("--batch", type=positive, default=1, help="texts at once (default 1)")
    made.add_argument("--prompt", type=positive, default=128, help="tokens of each text's prompt (default 128)")
    made.add_argument("--new", type=positive, default=32, help="tokens that follow, one by one (default 32)")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    made.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's own choice)")
    made.add_argument("--rounds", type=positive, help="default: what --seconds allow, from 5 to 101")
    made.add_argument("--seconds", type=float, default=20.0, metavar="S", help="for a dtype (default 20)")
    made.add_argument("--seed", type=int, default=0, help="of weights and tokens (default 0)")
    made.add_argument("--output", type=Path, metavar="FILE.json", help="write all numbers there; never over a file")
