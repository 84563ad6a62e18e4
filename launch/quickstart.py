"""The quick start: what continual training costs the old languages, and what an appended module with a gate does.

A small base learns numbers in English, German, French and Spanish, and a trace of four other languages. Those are then
added three times: by training everything, by the same with replay of old text, and by an appended mixture of experts
with a language gate, interrupted and resumed on the way. The last one is exported, reloaded and asked.

Every step is a command that could be typed; each is printed before it runs. bash launch/quickstart.sh --help
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from moect.data.reading.numbers import LANGUAGES, write_numbers
from moect.data.vocabulary.tokenizer import train_tokenizer
from moect.errors import MoectError
from moect.monitor.comparing.comparison import Comparison, compare
from moect.monitor.comparing.plot import plot
from moect.monitor.comparing.table import by_text, definitions, overview

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 512
ASKED = ("en", "cy", "te")
CAVEATS = """\
What the table does not show: every text begins with a tag that names its language, which makes the gate's work easy;
real text has none. The model has under a million parameters and the task is one of spelling. Exact match also hides
small losses: see bits per byte in each run's report."""


def main() -> int:
    """Run all of it and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything it makes")
    parser.add_argument("--seed", type=int, default=0, help="of data, initialisation and order (default 0)")
    parser.add_argument("--quick", action="store_true", help="a few steps each: shows the mechanism, learns nothing")
    arguments = parser.parse_args()
    folder = _free(ROOT / arguments.output)
    start = time.monotonic()
    try:
        _quickstart(folder, arguments.seed, arguments.quick)
    except MoectError as error:
        print(f"quick start: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"quick start: a command failed (exit code {error.returncode}); its output is above", file=sys.stderr)
        return 1
    print(f"\nAll of it took {(time.monotonic() - start) / 60:.1f} minutes.")
    return 0


def _quickstart(folder: Path, seed: int, quick: bool) -> None:
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    _heading("1  Text: numbers written out in eight languages")
    _make_corpus(folder, seed)

    base_steps, steps = (4, 4) if quick else (None, None)
    common = [f"output={shown}", f"data.root={shown}/data", f"seed={seed}"]

    _heading("2  A base that speaks English, German, French and Spanish")
    base = [*common, f"model.tokenizer={shown}/tokenizer", *_limit(base_steps)]
    _train("quickstart-base.yaml", *base)
    _moect("export", f"{shown}/base")

    extend = [*common, f"model.base={shown}/base/export", *_limit(steps)]
    _heading("3  Add Welsh, Icelandic, Telugu, Tajik by training everything")
    _train("quickstart.yaml", *extend, "name=full", "method=full", "data.replay=0")
    _heading("4  The same, with a tenth of the rows replayed from the old languages")
    _train("quickstart.yaml", *extend, "name=full-replay", "method=full")
    _heading("5  The same replay, but the base stays frozen: appended experts behind a language gate")
    half = 2 if quick else 200
    _train("quickstart.yaml", *extend, "name=moe-ct", f"train.stop_after={half}")
    print("\nInterrupted on purpose. On it goes:")
    _train("quickstart.yaml", *extend, "name=moe-ct", "resume=auto")

    _heading("6  Export, reload, ask")
    _moect("export", f"{shown}/moe-ct")
    for lang in ASKED:  # the first held-out number, whatever becomes of it
        question = json.loads((folder / "data" / "test" / f"{lang}.jsonl").open(encoding="utf-8").readline())
        _moect("generate", f"{shown}/moe-ct/export", question["text"].strip(), "--tokens", "80")
        print(f"held-out answer: {question['text']}{question['answer']}", flush=True)

    _heading("7  Result")
    runs = [folder / name for name in ("full", "full-replay", "moe-ct")]
    for run in runs:
        _moect("report", str(run.relative_to(ROOT) if run.is_relative_to(ROOT) else run), quiet=True)
    comparison = compare(runs, last=True)  # at equal steps
    _write_report(folder, comparison, seed)
    documents = {text["documents"] for text in comparison.texts}
    print(f"\nExact match in % on {_span(documents)} held-out numbers a language, seed {seed}\n")
    print(f"{by_text(comparison)}\n\n{overview(comparison)}")
    print(f"\n{CAVEATS}\n")
    print(f"Report: {shown}/report.md    plot: {shown}/comparison.png    exported model: {shown}/moe-ct/export")
    print(f"To look at in a browser: {shown}/moe-ct/report.html")


def _make_corpus(folder: Path, seed: int) -> None:
    manifest = write_numbers(folder / "data", seed=seed, trace_share=0.06)
    parts = [("train", lang) for lang, role in LANGUAGES.items() if role == "old"]
    parts += [("trace", lang) for lang, role in LANGUAGES.items() if role == "new"]
    lines = (line for part, lang in parts for line in (folder / "data" / part / f"{lang}.jsonl").open(encoding="utf-8"))
    train_tokenizer((json.loads(line)["text"] for line in lines), VOCABULARY, folder / "tokenizer")
    for lang, facts in manifest["languages"].items():
        example = json.loads((folder / "data" / "train" / f"{lang}.jsonl").open(encoding="utf-8").readline())["text"]
        seen = "all" if facts["role"] == "old" else f"{facts['trace']}"
        counts = f"{facts['train']} to train, {facts['test']} to test, base sees {seen}"
        print(f"{lang}  {facts['role']}  {counts:<45} {example}")


def _train(config: str, *overrides: str) -> None:
    _run([sys.executable, "launch/train.py", "--config", f"configs/{config}", *overrides])


def _moect(*arguments: str, quiet: bool = False) -> None:
    _run([sys.executable, "-m", "moect.cli", *arguments], quiet)


def _run(command: list[str], quiet: bool = False) -> None:
    """Print a command as one would type it, and run it in the checkout."""
    if not quiet:
        typed = " ".join(f'"{word}"' if " " in word or "<" in word else word for word in command)
        typed = typed.replace(sys.executable, "python").replace("python -m moect.cli", "moect")
        print(f"\n$ {typed}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL if quiet else None)


def _limit(steps: int | None) -> list[str]:
    return [] if steps is None else [f"train.steps={steps}", "train.warmup=0", "train.log_every=1"]


def _write_report(folder: Path, comparison: Comparison, seed: int) -> None:
    plot(comparison, folder / "comparison.png")
    text = f"""# Quick start

Exact match in % on held-out numbers, before (base) and after each method; seed {seed}.

{by_text(comparison, markdown=True)}

In bits per byte, and what it took:

{overview(comparison, markdown=True)}

{definitions(comparison, markdown=True)}

![what the old languages lost and the new ones gained, by method and by language](comparison.png)

{CAVEATS}

Each run in full: [full](full/report.md), [full-replay](full-replay/report.md), [moe-ct](moe-ct/report.md).
Made by `bash launch/quickstart.sh --seed {seed}`.
"""
    (folder / "report.md").write_text(text, encoding="utf-8")


def _span(numbers: set[int]) -> str:
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _free(folder: Path) -> Path:
    """The folder, or the next free number after it: nothing is overwritten."""
    number = 1
    free = folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
