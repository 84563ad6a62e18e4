"""report.md: what a run was and what it did to its languages, from what lies in its folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from moect.config import RunConfig, load_config
from moect.errors import ConfigError
from moect.monitor.reporting.plots import plot_forgetting, plot_last, plot_loss
from moect.monitor.reporting.table import percent
from moect.monitor.rows import FILE_NAME, Row, read_rows, write_atomically

log = logging.getLogger("moect.monitor")

DEFINITIONS = """\
- **bits per byte**: cross-entropy of the text in bits, over its bytes in UTF-8. Comparable between models and
  tokenizers, not between languages. Each token is scored once; without a BOS token the first one is left out, with its
  bytes.
- **delta**: bits per byte of the model minus those of the base on the same text.
- **retention** (old languages): base bits per byte / model bits per byte; 100% is the base.
- **gain** (new languages): 1 - model bits per byte / base bits per byte; 0% is the base.
- **exact match**: share of prompts after which greedy decoding gives exactly the answer.
- **gate**: mean weight of the frozen FFN; with a language gate, the gate's mean value (near 0 for old languages).
- **open**: share of tokens that the language gate lets through to the experts."""


def write_report(run_folder: Path) -> Path:
    """Write report.md and plots/*.png of a run, from its config.yaml, plan.json, log.jsonl and monitor/.

    Args:
        run_folder: the run's folder; the run need not be finished.

    Returns:
        The path of report.md.

    Raises:
        ConfigError: it is no run's folder, or cannot be written.
        DataError: forgetting.jsonl is damaged.
    """
    folder = Path(run_folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: is not the folder of a run, it has no config.yaml; give RUN as `output`/`name`")
    config = load_config(folder / "config.yaml")
    try:
        records, superseded, cut_lines = read_log(folder / "log.jsonl")
        plan = _read_plan(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror or error}); check permissions") from error
    # rows of checkpoints that a resume went back behind, and that were not made again
    rows = [row for row in read_rows(folder / "monitor") if row["step"] not in superseded]
    losses = [r for r in records if r.get("loss") is not None]
    parts = [f"# Run {config.name}", _facts(config, plan, records)]
    try:
        parts += ["## Languages", *_languages(rows, folder)]
        parts += ["## Training", *_training(losses, folder)]
        if cut_lines:
            parts.append(f"{cut_lines} line(s) of log.jsonl, cut off by a crash, are left out.")
        parts += ["## Source", _source(folder)]
        write_atomically(folder / "report.md", "\n\n".join(parts) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); check permissions") from error
    return folder / "report.md"


def read_log(path: Path) -> tuple[list[dict], set[int], int]:
    """The lines of log.jsonl that count.

    After an event `resume` at step N, earlier lines of steps beyond N are superseded: the steps were made again.

    Returns:
        Records without an event, by ascending step; the steps of checkpoints that were superseded and not made again;
        the number of lines that are not whole JSON objects, which a crash leaves behind.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    entries: list[dict] = []
    superseded: set[int] = set()
    cut = 0
    for line in lines:
        try:
            entry = json.loads(line)
            step = int(entry.get("step", 0))
        except (ValueError, TypeError, AttributeError):
            cut += 1
            continue
        if entry.get("event") == "resume":
            superseded |= {e["step"] for e in entries if e.get("event") == "checkpoint" and e["step"] > step}
            entries = [e for e in entries if e.get("step", 0) <= step]
        entries.append(entry)
    if cut:
        log.warning("%s: %d line(s) are not whole JSON objects and are left out", path, cut)
    superseded -= {e["step"] for e in entries if e.get("event") == "checkpoint"}
    return [e for e in entries if "event" not in e and "step" in e], superseded, cut


def _read_plan(folder: Path) -> dict:
    path = folder / "plan.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON; remove it, the report does without") from error


def _facts(config: RunConfig, plan: dict, records: list[dict]) -> str:
    train, data = config.train, config.data
    done = max((r["step"] for r in records), default=0)
    by_role = {role: [lang for lang, r in data.languages.items() if r == role] for role in ("old", "new")}
    facts = [
        ("method", config.method),
        ("base", config.model.base or "made from scratch"),
        ("old languages", ", ".join(by_role["old"]) or "none"),
        ("new languages", ", ".join(by_role["new"]) or "none"),
        ("steps", f"{done:,} of {train.steps:,}"),
        ("tokens a step", f"{train.batch_size * data.sequence_length:,}"),
        ("precision, seed", f"{train.precision}, {config.seed}"),
    ]
    if config.method == "moe-ct":
        moe = config.moe
        gate = ", language gate" if moe.language_gate else ""
        facts.insert(1, ("module", f"{moe.experts} experts, top {moe.top_k}, fusion `{moe.fusion}`{gate}"))
    if count := plan.get("parameters"):
        shares = f"{count['total']:,} total, {count['trainable']:,} trainable, {count['active']:,} active per token"
        facts.append(("parameters", shares))
    if "ranks" in plan:
        facts.append(("ranks", f"{plan['ranks']}, ZeRO {plan['zero_stage']}"))
    return _markdown(["", ""], [[name, _cell(value)] for name, value in facts])


def _languages(rows: list[Row], folder: Path) -> list[str]:
    if not rows:
        return ["The monitor has measured nothing yet."]
    first, last = (pick(r["step"] for r in rows) for pick in (min, max))
    parts = [f"### Step {last}", _table([r for r in rows if r["step"] == last])]
    if first != last:
        parts += [f"### Step {first}", _table([r for r in rows if r["step"] == first])]
        plot_forgetting(rows, folder / "plots" / "forgetting.png")
        parts.append("![Bits per byte minus the base's, by step](plots/forgetting.png)")
    plot_last([r for r in rows if r["step"] == last], folder / "plots" / "last.png")
    return [*parts, "![Base and model at the last checkpoint](plots/last.png)", DEFINITIONS]


def _training(losses: list[dict], folder: Path) -> list[str]:
    if not losses:
        return ["No step was logged yet."]
    plot_loss(losses, folder / "plots" / "loss.png")
    last = losses[-1]
    sentence = f"Loss {losses[0]['loss']:.4f} at step {losses[0]['step']}, {last['loss']:.4f} at step {last['step']}."
    speeds = sorted(r["tokens_per_second"] for r in losses if r.get("tokens_per_second"))
    if speeds:
        sentence += f" Median speed {speeds[len(speeds) // 2]:,.0f} tokens a second."
    return [sentence, "![Training loss by step](plots/loss.png)"]


def _source(folder: Path) -> str:
    return (
        f"Written by `moect report {folder}` from `config.yaml`, `plan.json`, `log.jsonl` and `monitor/{FILE_NAME}`, "
        "which hold every number above. `config.yaml` repeats the run; where it was resumed with other values, those "
        "before are in `config-before-resume-N.yaml`, and `log.jsonl` says when they changed."
    )


def _table(rows: list[Row]) -> str:
    optional = {
        "retention": lambda r: percent(r.get("retention"), 2),
        "gain": lambda r: percent(r.get("gain"), 2),
        "exact match, base": lambda r: percent(r.get("base_exact_match")),
        "exact match": lambda r: percent(r.get("exact_match")),
        "gate": lambda r: "" if r.get("gate") is None else f"{r['gate']:.3f}",
        "open": lambda r: percent(r.get("open_share")),
    }
    used = {name: form for name, form in optional.items() if any(form(r) for r in rows)}
    names = ["language", "role", "domain", "documents", "bytes", "base", "model", "delta", *used]
    lines = []
    for r in sorted(rows, key=lambda r: r["role"] == "new"):
        bits = [f"{r['base_bits_per_byte']:.4f}", f"{r['bits_per_byte']:.4f}", f"{r['delta']:+.4f}"]
        texts = [r["lang"], r["role"], _cell(r["domain"]), f"{r['documents']:,}", f"{r['bytes']:,}"]
        lines.append([*texts, *bits, *(form(r) for form in used.values())])
    return _markdown(names, lines, left=3)


def _markdown(names: list[str], lines: list[list[str]], left: int = 2) -> str:
    """A table; the first `left` columns are text, the others figures."""
    rule = [":--" if i < left else "--:" for i in range(len(names))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, rule, *lines))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
