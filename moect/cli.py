"""The `moect` command: one function a subcommand. A user error is one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from moect.argument_types import above_zero, positive, share
from moect.bench.command import add_bench
from moect.errors import MoectError, RankLost


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    arguments = _parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("moect").setLevel(logging.INFO)
    _calm_libraries()
    try:
        arguments.run(arguments)
    except MoectError as error:
        _tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def process(argv: list[str] | None = None) -> NoReturn:
    """`main` as a whole process, which ends with its exit code.

    After a training, Python's own ending is left out: a communication thread that wants the interpreter then aborts the
    process, now and then, and the launcher would see that in place of the exit code.
    """
    code = main(argv)
    if "deepspeed" not in sys.modules:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train(arguments: argparse.Namespace) -> None:
    """Train, or resume, a run, or the stages of one after another."""
    from moect.stages import load_stages, run_stages

    stages = load_stages(arguments.config, arguments.overrides)
    from moect import distributed

    failed = True
    try:
        run_stages(stages)
        failed = False
    finally:
        distributed.stop(failed)


def plan(arguments: argparse.Namespace) -> None:
    """Print what a run, or each stage of one, would be and cost, without training."""
    from moect.stages import load_stages, plan_stages

    stages = load_stages(arguments.config, arguments.overrides)
    from moect.plan import render

    plans = plan_stages(stages, arguments.ranks, arguments.gpu, arguments.mfu)
    for number, (config, made) in enumerate(zip(stages, plans, strict=True)):
        if len(stages) > 1:
            print(f"{chr(10) * bool(number)}stage {config.name}")
        print(render(made))


def prepare(arguments: argparse.Namespace) -> None:
    """Tokenize all corpora of a run, or of its stages, once, and report on them; training then begins at once."""
    from moect.stages import load_stages, prepare_stages

    stages = load_stages(arguments.config, arguments.overrides)
    for config, told in prepare_stages(stages, arguments.workers, arguments.inspect, arguments.sample):
        if len(stages) > 1:
            print(f"\nstage {config.name}")
        print("\n".join(told), flush=True)


def probe(arguments: argparse.Namespace) -> None:
    """Measure in which blocks of a base its languages are least alike, and say how many experts each should have."""
    from moect.probe import probe as measure
    from moect.probe import render
    from moect.stages import load_stages

    print(render(measure(load_stages(arguments.config, arguments.overrides)[-1], arguments.experts, arguments.moved)))


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure a checkpoint of a run as its training would have, and add the results to the run's."""
    from moect.evaluate import evaluate_mixed, evaluate_run

    failed, measure = True, evaluate_mixed if arguments.mixed else evaluate_run
    try:
        evaluation = measure(arguments.run_folder, arguments.checkpoint, arguments.overrides)
        failed = False
    finally:
        from moect import distributed

        main = distributed.is_main()
        distributed.stop(failed)
    if main:
        (_tell_mixed if arguments.mixed else _tell_evaluation)(evaluation)


def export(arguments: argparse.Namespace) -> None:
    """Write a run's model as a Hugging Face directory, load it again and prove that it computes the same."""
    from moect.export.command import run

    given = ("checkpoint", "output", "target", "dtype", "instruct", "pickle", "verify")
    options = {name: getattr(arguments, name) for name in given}
    options["shard_bytes"] = int(arguments.shard_size * 1e9)
    run(arguments.run_folder, options, arguments.adapter, arguments.push, arguments.public)


def checkpoints(arguments: argparse.Namespace) -> None:
    """List the checkpoints of a run, verify them, or delete those that are not needed."""
    from moect.checkpoints import show, show_prunable

    if arguments.prune:
        show_prunable(arguments.run_folder, arguments.keep_last, arguments.keep_every, arguments.yes)
    else:
        show(arguments.run_folder, arguments.verify)


def generate(arguments: argparse.Namespace) -> None:
    """Continue a text with an exported model."""
    from moect.export.generate import generate_text

    print(generate_text(arguments.model, arguments.text, arguments.tokens, arguments.sample, arguments.seed))


def report(arguments: argparse.Namespace) -> None:
    """Write report.html, report.md and their plots from what a run has logged and measured."""
    from moect.monitor.reporting.page.report import write_report

    for path in write_report(arguments.run_folder):
        print(f"wrote {path}")


def kernels(arguments: argparse.Namespace) -> None:
    """Compile the expert kernels before their first use, into $MOECT_KERNELS or ~/.cache/moect/kernels."""
    from moect.dispatch.build import SOURCES
    from moect.dispatch.extension import library, load
    from moect.errors import DispatchError

    devices = dict.fromkeys(arguments.devices or ["cpu"])
    for device in devices:
        if device not in SOURCES:
            raise DispatchError(f"no kernels for {device}: there are {', '.join(SOURCES)}")
    for device in devices:
        if reason := load(device):
            raise DispatchError(f"no kernels for {device}: {reason}")
        print(f"{device}: {library(device)}")


def sample(arguments: argparse.Namespace) -> None:
    """Write text that a model draws from itself, to replay where there is no text of its old languages."""
    from moect.sample import SampleOptions
    from moect.sample import sample as write

    given = ("documents", "tokens", "batch", "temperature", "seed")
    options = SampleOptions(**{name: getattr(arguments, name) for name in given})
    documents = write(arguments.base, arguments.lang, arguments.output, options)
    empty = options.documents - documents
    print(f"wrote {arguments.output}: {documents:,} documents" + f", {empty:,} without text left out" * bool(empty))


def study(arguments: argparse.Namespace) -> None:
    """Run the methods of a study on one base, several at a time, each at the learning rate that pilots find for it."""
    from moect.study.command import run

    given = ("file", "at_once", "only", "listing", "known", "results", "page")
    run(**{name: getattr(arguments, name) for name in given})


def compare(arguments: argparse.Namespace) -> None:
    """Put runs side by side: what each gained, lost and cost, and every held-out text."""
    from moect.monitor.comparing.comparison import compare as compare_runs
    from moect.monitor.comparing.output import check_output, write
    from moect.monitor.comparing.table import render

    if arguments.output:
        check_output(arguments.output)
    comparison = compare_runs(arguments.run_folders, arguments.last, arguments.group)
    print(render(comparison, arguments.markdown))
    if arguments.output:
        print(f"\nwrote {write(comparison, arguments.output)}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if [word for word in more if word.startswith("-") or "=" not in word] or (more and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.overrides += more
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moect", description="Teach an LLM new languages without losing what it knows."
    )
    _take_local_rank(parser)  # where the launcher runs this file as a module, it puts it first
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, **kwargs) -> argparse.ArgumentParser:
        doc = function.__doc__
        made = commands.add_parser(
            function.__name__, help=doc[0].lower() + doc[1:].rstrip("."), description=doc, **kwargs
        )
        made.set_defaults(run=function)
        return made

    for function in (train, plan, prepare, probe):
        made = command(function)
        made.add_argument("--config", required=True, type=Path, help="YAML file; docs/configuration.md lists all keys")
        made.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single values of the file")
        if function is train:
            _take_local_rank(made)
        elif function is probe:
            made.add_argument("--experts", type=positive, metavar="N", help="of the mean block (default: moe.experts)")
            made.add_argument(
                "--moved",
                type=Path,
                metavar="RUN",
                help="a run of a few steps with method=full: only blocks whose FFN moved most there get experts",
            )
        elif function is prepare:
            made.add_argument("--workers", type=positive, help="processes that tokenize (default: the cores)")
            made.add_argument(
                "--inspect",
                action="store_true",
                help="also look for duplicates, held-out text among the training text, and other languages",
            )
            made.add_argument(
                "--sample", type=share, default=1.0, help="share of the documents to inspect (default: all)"
            )
        else:
            made.add_argument("--ranks", type=positive, default=1, help="ranks the run will have (default 1)")
            made.add_argument("--gpu", metavar="NAME", help="the ranks' GPU, as 'RTX 4090' or H100: adds fit and time")
            made.add_argument("--mfu", type=share, default=0.35, help="share of its arithmetic used (default 0.35)")

    made = command(evaluate)
    made.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    made.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="monitor.* and data.evaluation, over the run's"
    )
    made.add_argument("--checkpoint", metavar="step-N", help="default: the one that would be exported")
    made.add_argument(
        "--mixed",
        action="store_true",
        help="measure the language gate on documents that change between an old and a new language instead",
    )

    made = command(export)
    made.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    made.add_argument("--checkpoint", metavar="step-N", help="default: the best within monitor.max_forgetting")
    made.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/export")
    made.add_argument(
        "--target", metavar="NAME", help="architecture (default: export.target of the run); moect plan lists"
    )
    made.add_argument("--dtype", choices=("auto", "fp32", "bf16"), help="default: export.dtype of the run")
    made.add_argument(
        "--shard-size", type=above_zero, default=2.0, metavar="GB", help="of a file of weights (default 2)"
    )
    made.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare logits")
    made.add_argument("--adapter", action="store_true", help="what was trained alone, for moect.load (or peft)")
    made.add_argument(
        "--instruct-delta", dest="instruct", metavar="MODEL", help="add what this chat model has more than the base"
    )
    made.add_argument("--pickle", action="store_true", help="with --instruct-delta: read it from pickled weights too")
    made.add_argument("--push", metavar="ORG/NAME", help="then send it to the Hugging Face hub, private when made")
    made.add_argument("--public", action="store_true", help="with --push: a repository that is made now is public")

    made = command(checkpoints)
    made.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    made.add_argument("--verify", action="store_true", help="read every file; exit code 2 if one is damaged")
    made.add_argument("--prune", action="store_true", help="what rotation would delete, damaged ones and left-overs")
    made.add_argument("--keep-last", type=lambda n: positive(n, 0), metavar="N", help="default: as the run; 0: all")
    made.add_argument("--keep-every", type=positive, metavar="N", help="default: the run's train.keep_every")
    made.add_argument("--yes", action="store_true", help="with --prune: delete it")

    made = command(generate)
    made.add_argument("model", type=Path, metavar="DIR", help="an exported model")
    made.add_argument("text", help="text to continue")
    made.add_argument("--tokens", type=int, default=64, help="greatest number of new tokens (default 64)")
    made.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    made.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")

    made = command(report)
    made.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")

    made = command(sample, epilog="example: moect sample Qwen/Qwen3-0.6B --documents 5000 --output data/old.jsonl")
    made.add_argument("base", metavar="MODEL", help="directory or hub name of a causal LM")
    made.add_argument("--documents", type=positive, required=True, metavar="N", help="how many")
    made.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="never over a file")
    made.add_argument("--lang", default="old", help="what to call the language in the file (default old)")
    made.add_argument("--tokens", type=positive, default=256, metavar="N", help="of a document at most (default 256)")
    made.add_argument("--batch", type=positive, default=16, metavar="N", help="documents at a time (default 16)")
    made.add_argument(
        "--temperature", type=above_zero, default=1.0, metavar="T", help="of the distribution (default 1)"
    )
    made.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")

    made = command(study, epilog="interrupted, it goes on with the same command; docs/study.md has an example")
    made.add_argument("file", type=Path, metavar="FILE.yaml", help="what the study is: see configs/study")
    made.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="methods or runs, with * (default: all)")
    made.add_argument(
        "--jobs",
        dest="at_once",
        type=positive,
        metavar="N",
        help="runs at a time (default: one a GPU; without one, one a core, at most 8)",
    )
    made.add_argument(
        "--known", type=Path, metavar="FILE.json", help="results, perhaps of another machine: these are not run again"
    )
    instead = made.add_mutually_exclusive_group()
    instead.add_argument(
        "--list", dest="listing", action="store_true", help="only say what can be run now and is not done"
    )
    instead.add_argument(
        "--results", type=Path, metavar="OUT.json", help="only write what has ended, beside what is there of the study"
    )
    instead.add_argument(
        "--page", type=Path, metavar="PAGE.md", help="only make the tables of a page, from PAGE.json or --known"
    )

    made = command(compare)
    made.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="folders of runs on one base")
    made.add_argument(
        "--last", action="store_true", help="the last checkpoint of each (default: the best within budget)"
    )
    made.add_argument(
        "--group", choices=("config", "name"), help="mean and deviation over runs that differ in their seed"
    )
    made.add_argument("--markdown", action="store_true", help="tables as Markdown")
    made.add_argument("--output", type=Path, metavar="FILE", help="also write .png, .md or .json; never over a file")

    made = command(kernels)
    made.add_argument("devices", nargs="*", metavar="cpu|cuda", help="for which (default cpu)")

    add_bench(commands)
    return parser


def _take_local_rank(parser: argparse.ArgumentParser) -> None:
    """The launcher says it a second time, beside the environment."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _tell_evaluation(evaluation) -> None:
    from moect.monitor.reporting.page.report import write_report
    from moect.monitor.reporting.table import render_table
    from moect.monitor.threshold import render_threshold

    print(f"{evaluation.checkpoint}\n\n{render_table(evaluation.rows)}\n")
    if found := render_threshold(evaluation.folder.parent, evaluation.rows[0]):
        print(f"{found}\n")
    print(f"wrote {evaluation.folder}")
    for path in write_report(evaluation.folder.parent):
        print(f"wrote {path}")


def _tell_mixed(evaluation) -> None:
    from moect.monitor.measuring.mixed import render_mixed

    pairs = len({(row["old"], row["new"], row["domain"]) for row in evaluation.rows})
    threshold = evaluation.rows[0]["gate_threshold"]
    print(
        f"{evaluation.checkpoint}\n\ndocuments of an old and a new language in turn, by part; means over {pairs} pairs"
    )
    print(f"in bits per byte; tokens pass above {threshold:.6g}\n")
    print(f"{render_mixed(evaluation.rows)}\n\nwrote {evaluation.folder / 'mixed.jsonl'}")


def _calm_libraries() -> None:
    """No guessing of devices aloud, and progress bars only for somebody who watches them."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("RANK", "0")) or not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _tell(error: MoectError) -> None:
    """One line on stderr. What every rank finds out by itself, or was told by the main rank, only that rank prints."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"moect: {error.label}: {error}", file=sys.stderr)
        return
    if isinstance(error, RankLost) and not getattr(error, "told_by_main_rank", False):  # nobody else knows
        print(f"moect: error on rank {rank}: {error}", file=sys.stderr)
        return
    torch = sys.modules.get("torch")
    started = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if started and not getattr(error, "told_by_main_rank", False):
        print(f"moect: error on rank {rank}: {error}", file=sys.stderr)


if __name__ == "__main__":
    process()
