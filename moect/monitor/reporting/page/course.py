"""The sections of a report about the run itself: training, mixture, actions, facts, commands, definitions."""

from __future__ import annotations

import shlex
from pathlib import Path

from moect.data_config import KEPT
from moect.monitor.reporting.figures import share_text
from moect.monitor.reporting.names import isolated, isolated_in
from moect.monitor.reporting.page.content import Block, Code, Picture, Section, Table, Terms, Text
from moect.monitor.reporting.pictures.plots import plot_loss
from moect.monitor.reporting.run_files import RunFiles
from moect.monitor.rows import FILE_NAME

DEFINITIONS = {
    "bits per byte": "cross-entropy of the text in bits, over its bytes in UTF-8. Comparable between models and "
    "tokenizers, not between languages. Each token is scored once; without a BOS token the first one is left out, with "
    "its bytes.",
    "forgotten (old languages)": "bits per byte of the model over those of the base on the same text, less 1; 0% is "
    "the base, above it something was lost. Retention is base over model.",
    "gained (new languages)": "1 less bits per byte of the model over those of the base; 0% is the base.",
    "difference": "bits per byte of the model less those of the base.",
    "95% interval": "where the number would lie on other documents of the same kind. It knows nothing of other seeds.",
    "identical": "the logits of the model are those of the base, bit for bit; a document is, if all of its tokens are.",
    "KL": "how far the model's distribution of the next token is from the base's, in bits a token.",
    "exact match": "share of prompts after which greedy decoding gives exactly the answer.",
    "gate": "mean weight of the frozen FFN; with a language gate, the gate's mean value (near 0 for old languages).",
    "open": "share of tokens that the language gate lets through to the experts.",
    "best checkpoint": "the one with the greatest mean gain among those within the limits of `monitor.max_forgetting`; "
    "without limits, among all. Without new languages, the one with the greatest mean retention.",
}
FIRST_SKIPS = 3  # skipped steps of which it is told why
MOST_OF_A_HOST = 8  # ranks; plan.json does not say on how many hosts they were


def training(run: RunFiles, plots: Path) -> Section:
    """Loss, speed, and the share of the time that the monitor took."""
    losses = [r for r in run.log.figures if r.get("loss") is not None]
    if not losses:
        return Section("training", "Training", [Text("No step was logged yet.")])
    last = losses[-1]
    said = [f"Loss {losses[0]['loss']:.4f} at step {losses[0]['step']:,}, {last['loss']:.4f} at step {last['step']:,}."]
    if (speed := run.log.median_speed) is not None:
        said.append(f"Median speed {speed:,.0f} tokens a second.")
    if (share := run.log.monitor_share) is not None:
        said.append(f"The monitor took {share_text(share)} of the time of training and measuring.")
    marks = [(_at(e), str(e.get("action"))) for e in run.log.events("action")]
    marks += [(_at(e), "rollback") for e in run.log.events("rollback")]
    path = plot_loss(losses, marks, plots / "loss.png")
    alt = "Training loss by step" + "".join(f"; {word} at step {step:,}" for step, word in marks) + "."
    blocks: list[Block] = [Text(" ".join(said)), Picture(path, alt)]
    if seen := last.get("tokens_seen"):
        total = sum(seen.values()) or 1
        lines = [[isolated(lang), f"{tokens:,}", share_text(tokens / total)] for lang, tokens in seen.items()]
        head = "tokens drawn, undone ones too" if run.log.steps_undone else "tokens seen"
        blocks.append(Table(["language", head, "share"], lines))
    if skipped := run.log.events("skip"):
        why = "; ".join(f"step {e['step']:,}: {e.get('why')}" for e in skipped[:FIRST_SKIPS])
        more = "" if len(skipped) <= FIRST_SKIPS else f"; and {len(skipped) - FIRST_SKIPS:,} more"
        blocks.append(Text(f"Steps skipped, their text being passed over: {len(skipped):,} ({why}{more})."))
    if run.log.cut:
        blocks.append(Text(f"{run.log.cut} line(s) of log.jsonl, cut off by a crash, are left out."))
    return Section("training", "Training", blocks)


def mixture(run: RunFiles) -> Section | None:
    """Changes of the mixture, by the run's actions or by whoever resumed it."""
    lines = []
    for event in run.log.events("mixture"):
        before, now = event.get("before") or {}, event.get("now") or {}
        for key in dict.fromkeys((*before, *now)):
            old, new = before.get(key), now.get(key)
            if old != new:
                lines.append([f"{event['step']:,}", isolated(key), share_text(old, 2), share_text(new, 2)])
    if not lines:
        return None
    return Section(
        "mixture", "Changes of the mixture", [Table(["from step", "corpus", "share before", "since"], lines, 2)]
    )


def actions(run: RunFiles) -> Section | None:
    """What the run did about forgetting and bad steps, and measurements that failed."""
    lines = []
    names = {*run.config.data.languages, *(row["domain"] for row in run.rows)}
    for e in sorted(run.log.events("action"), key=_at):
        replay = e.get("replay")
        done = {
            "replay": f"replay raised to {share_text(replay)}" if replay is not None else "replay raised",
            "rollback": f"back to step {e.get('to') or 0:,}"
            + (f", replay {share_text(replay)}" if replay is not None else ""),
            "stop": "the run was ended",
        }.get(e.get("action"), str(e.get("action")))
        lines.append([f"{_at(e):,}", done, isolated_in(str(e.get("why") or ""), names)])
    for e in run.log.events("rollback"):
        done = f"back to step {e['step']:,}, the text goes on"
        lines.append([f"{_at(e):,}", done, f"{e.get('skipped')} steps skipped in a row, the last: {e.get('why')}"])
    blocks: list[Block] = [Table(["at step", "what the run did", "why"], lines, 3)] if lines else []
    failed = [[f"{e.get('step', 0):,}", str(e.get("error", ""))] for e in run.log.events("monitor failed")]
    if failed:
        blocks += [Text("Measurements that failed; the training went on:"), Table(["at step", "error"], failed, 2)]
    return Section("actions", "What the run did about it", blocks) if blocks else None


def _at(action: dict) -> int:
    """The step at which it was taken: of a rollback, where the run came from."""
    return action["from"] if action.get("from") is not None else action["step"]


def facts(run: RunFiles) -> Section:
    """What was run."""
    config, plan = run.config, run.plan
    train, data = config.train, config.data
    by_role = {name: [lang for lang, r in data.languages.items() if r == name] for name in (*KEPT, "new")}
    told = [("method", config.method)]
    if config.method == "moe-ct":
        moe = config.moe
        gate = ", language gate" if moe.language_gate else ""
        told.append(("module", f"{moe.experts_told} experts, top {moe.top_k}, fusion {moe.fusion}{gate}"))
    told += [
        ("base", config.model.base or "made from scratch"),
        ("old languages", ", ".join(map(isolated, by_role["old"])) or "none"),
        *([("learnt languages", ", ".join(map(isolated, by_role["learnt"])))] if by_role["learnt"] else []),
        ("new languages", ", ".join(map(isolated, by_role["new"])) or "none"),
        ("steps", f"{steps_done(run):,} of {train.steps:,}"),
        ("tokens a step", f"{train.batch_size * data.sequence_length:,}"),
        ("replay", "by number of tokens" if data.replay is None else share_text(data.replay)),
        ("learning rate", f"{train.lr:g}"),
        ("precision, seed", f"{train.precision}, {config.seed}"),
    ]
    if count := plan.get("parameters"):
        words = {"total": "total", "trainable": "trainable", "active": "active per token"}
        told.append(("parameters", ", ".join(f"{count[key]:,} {word}" for key, word in words.items() if key in count)))
    if "ranks" in plan:
        told.append(("ranks", f"{plan['ranks']}, ZeRO {plan.get('zero_stage', train.zero_stage)}"))
    return Section("facts", "The run", [Table(["fact", "value"], [[name, str(value)] for name, value in told], 2)])


def commands(run: RunFiles) -> Section:
    """How to make the report, the export and the run again."""
    folder, name = shlex.quote(str(run.folder)), shlex.quote(f"name={run.config.name}-again")
    config = shlex.quote(str(run.folder / "config.yaml"))
    ranks = run.plan.get("ranks", 1)
    launcher, where = "python", ""
    if ranks > MOST_OF_A_HOST:
        launcher, where = "deepspeed", f"  # {ranks} ranks (on the hosts it ran on)"
    elif ranks > 1:
        launcher = f"deepspeed --num_accelerators {ranks}"
    lines = [
        f"{launcher} launch/train.py --config {config} {name} resume=never{where}",
        f"moect report {folder}",
        f"moect export {folder}",
    ]
    told = (
        "The first makes the run again under another name, the second this report, the third a model to use. "
        f"Every number above is from config.yaml, plan.json, log.jsonl and monitor/ (first of all {FILE_NAME}). Where "
        "the run was resumed with other values, those before are in config-before-resume-N.yaml, and log.jsonl says "
        "when they changed."
    )
    return Section("commands", "Commands", [Code("\n".join(lines)), Text(told)])


def definitions() -> Section:
    """What the words mean."""
    return Section("definitions", "What the numbers mean", [Terms(list(DEFINITIONS.items()))])


def steps_done(run: RunFiles) -> int:
    """Optimizer steps behind the run."""
    return max((e["step"] for e in (*run.log.figures, *run.log.events("checkpoint"), *run.rows)), default=0)
