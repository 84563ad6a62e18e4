"""The sections of a report about what was measured: languages, checkpoints, exactness, names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moect.monitor.reporting.figures import (
    MINUS,
    at_step,
    between,
    change_interval,
    change_text,
    changes,
    identical,
    mean,
    role,
    share_text,
    signed,
)
from moect.monitor.reporting.names import isolated
from moect.monitor.reporting.page.content import Block, Picture, Section, Table, Text, compact
from moect.monitor.reporting.pictures.change_plots import Limits, plot_changes, plot_curves, plot_pareto
from moect.monitor.reporting.pictures.labels import Labels
from moect.monitor.reporting.pictures.plots import plot_answers, plot_exactness
from moect.monitor.reporting.run_files import RunFiles
from moect.monitor.rows import Row
from moect.monitor.threshold import render_threshold
from moect.monitor.verdict import Verdict, best, judge, verdicts
from moect.monitor_config import limit_of


@dataclass(frozen=True)
class Measured:
    """What the sections need to know of a run that was measured.

    Attributes:
        run: its files.
        labels: of its texts.
        plots: the folder that takes the pictures.
        last: rows of the last measured step.
        course: rows of all steps on which a text was measured as it was the last time; what curves are made of.
        verdict: on them.
        verdicts: on each step that can be compared with the others.
        best: verdict on the best checkpoint, if any is within the limits.
        limits: what an old text may lose, a share of the base's, by language and domain.
    """

    run: RunFiles
    labels: Labels
    plots: Path
    last: list[Row]
    course: list[Row]
    verdict: Verdict
    verdicts: list[Verdict]
    best: Verdict | None
    limits: Limits


def measured(run: RunFiles, plots: Path) -> Measured | None:
    """None where the monitor has not measured anything yet."""
    if not run.rows:
        return None
    last = at_step(run.rows, run.rows[-1]["step"])
    last = role(last, "old") + role(last, "new")
    limits = {}
    for row in role(run.rows, "old") if run.config.model.base else []:
        limit, base_bits = limit_of(run.config.monitor, row["lang"]), row["base_bits_per_byte"]
        if limit is not None and base_bits:
            limits[row["lang"], row["domain"]] = limit.bits(base_bits) / base_bits
    found = verdicts(run.rows, run.config), best(run.rows, run.config)
    now = {(row["lang"], row["domain"]): row.get("key") for row in run.rows}  # by ascending step: the last one stays
    course = [row for row in run.rows if now[row["lang"], row["domain"]] == row.get("key")]
    return Measured(run, Labels(run.rows), plots, last, course, judge(last, run.config), *found, limits)


def languages(m: Measured) -> Section:
    """What became of each text at the last checkpoint, and at the best where that is another."""
    path = plot_changes(m.last, m.limits, m.labels, m.plots / "last.png")
    summary = "; ".join(f"{isolated(m.labels.of(row))} {change_text(row)}" for row in m.last)
    alt = f"Bars of what each text lost or gained at step {m.verdict.step:,}: {summary}."
    blocks: list[Block] = [*_tables(m, m.last), Picture(path, alt, _how_bars_read(m))]
    if m.best and m.best.step != m.verdict.step:
        blocks += [
            Text(f"At step {m.best.step:,}, the best checkpoint:"),
            *_tables(m, at_step(m.run.rows, m.best.step)),
        ]
    if any(row.get("exact_match") is not None for row in m.last):
        answered = [row for row in m.last if row.get("exact_match") is not None]
        path = plot_answers(answered, m.labels, m.plots / "answers.png")
        blocks.append(Picture(path, "Share of prompts that base and model answer exactly, by text."))
    return Section("languages", f"Languages at step {m.verdict.step:,}", blocks)


def checkpoints(m: Measured) -> Section | None:
    """How it came to this: curves, gain against forgetting, a line a checkpoint."""
    if len(m.verdicts) < 2:
        return None
    path = plot_curves(m.course, m.limits, m.labels, m.plots / "forgetting.png")
    dashed = " A limit that is far above the curves is not drawn." if m.limits else ""
    blocks: list[Block] = [
        Picture(
            path,
            "Share of the base's bits per byte that each old text lost and each new one gained, by step.",
            "A colour is a language, a kind of line a domain. Bands, where few lines leave room, are 95% intervals."
            + dashed,
        )
    ]
    points, lines, marked = [], [], {}
    for number, verdict in enumerate(m.verdicts):
        here = at_step(m.run.rows, verdict.step)
        lost = changes(role(here, "old"))
        same = identical(role(here, "old"))
        if lost and verdict.gain is not None:
            points.append((verdict.step, mean(lost), max(lost), verdict.gain))
        is_best = m.best is not None and verdict.step == m.best.step
        word = "beyond" if verdict.excess else "within"
        lines.append(
            [
                f"{verdict.step:,}" + (" (best)" if is_best else ""),
                signed(verdict.gain),
                signed(mean(lost)),
                signed(max(lost)) if lost else "",
                share_text(same.share) if same else "",
                word if m.limits else "",
            ]
        )
        if is_best or verdict.excess:
            marked[number] = "good" if is_best else "bad"
    if len(points) > 1:
        limits = sorted(set(m.limits.values()))
        path = plot_pareto(
            points, limits if len(limits) <= 4 else [limits[0], limits[-1]], _step(m.best), m.plots / "pareto.png"
        )
        alt = "Mean gain of the new languages against what the old ones lost, a point a checkpoint."
        blocks.append(Picture(path, alt, "Up is learned, right is forgotten; the numbers are steps."))
    heads = ["step", "mean gain", "mean forgotten", "worst forgotten", "old documents identical", "limits"]
    blocks.append(compact(Table(heads, lines, 1, marked)))
    if others := sorted({row["step"] for row in m.run.rows} - {verdict.step for verdict in m.verdicts}):
        steps = ", ".join(f"{step:,}" for step in others)
        blocks.append(Text(f"Not in the table, as they were not measured on the same texts in the same way: {steps}."))
    return Section("checkpoints", "Checkpoints", blocks)


def apart(run: RunFiles) -> Section | None:
    """What `moect evaluate` measured on other texts or with other settings."""
    if not run.apart:
        return None
    lines = []
    for row in run.apart:
        same = identical([row])
        lines.append(
            [
                f"{row['step']:,}",
                isolated(row["lang"]),
                row["role"],
                isolated(row["domain"]),
                f"{row['documents']:,}" if row.get("documents") is not None else "",
                f"{row['base_bits_per_byte']:.4f}",
                f"{row['bits_per_byte']:.4f}",
                change_text(row),
                share_text(same.share) if same else "",
            ]
        )
    told = (
        "Measured by moect evaluate on other texts, or with other settings, than in training: bits per byte, with "
        "what an old language lost and a new one gained. It takes part in no verdict, no curve and no comparison."
    )
    heads = ["step", "language", "role", "domain", "documents", "base", "model", "change", "documents identical"]
    return Section("apart", "Measured apart", [Text(told), compact(Table(heads, lines, 4))])


def exactness(m: Measured) -> Section | None:
    """Where the logits are the base's, bit for bit."""
    compared = [row for row in m.last if row.get("exact")]
    if not compared:
        return None
    lines = []
    for row in compared:
        e = row["exact"]
        shares = (
            e["identical_documents"] / e["documents"],
            e["identical_tokens"] / e["tokens"] if e["tokens"] else None,
        )
        interval = (e["low"], e["high"]) if "low" in e else None
        lines.append(
            [
                m.labels.written(row),
                row["role"],
                share_text(shares[0]),
                between(interval, 1, sign=False),
                f"{e['documents']:,}",
                share_text(shares[1], 2),
                f"{e['tokens']:,}",
                share_text(e.get("top1_agreement"), 2),
                "" if e.get("kl") is None else f"{e['kl']:.2g}",
                "" if e.get("max_logit_difference") is None else f"{e['max_logit_difference']:.2g}",
            ]
        )
    heads = ["text", "role", "documents identical", "95% interval", "of documents", "tokens identical", "of tokens"]
    heads += ["same first choice", "KL, bits a token", "greatest difference"]
    path = plot_exactness(m.course, m.verdict.step, m.labels, m.plots / "exactness.png")
    alt = "Share of documents whose logits are the base's bit for bit, by step and by length of the document."
    caption = ""
    if m.run.config.has_language_gate:
        caption = "A longer document has more tokens that could pass the gate."
    told = [
        "A document counts as identical if the logits of all of its tokens are the base's, bit for bit, on the same "
        "rows with the same kernels."
    ]
    if found := render_threshold(m.run.folder, compared[0]):
        told.append(f"{found[0].upper()}{found[1:]}.")
    blocks = [*map(Text, told), compact(Table(heads, lines, 2)), Picture(path, alt, caption)]
    return Section("exactness", "Bit-identical to the base", blocks)


def names(m: Measured) -> Section | None:
    """What stands for names that plots cannot write. To be made after all plots."""
    if not m.labels.replaced:
        return None
    told = Text(
        "The font of the plots lacks characters of some names, and some would look alike where they are shortened. "
        "Others stand for them there."
    )
    lines = [[shown, isolated(name)] for shown, name in m.labels.replaced.items()]
    return Section("names", "Names in the plots", [told, Table(["in plots", "is"], lines, 2)])


def _tables(m: Measured, rows: list[Row]) -> list[Table]:
    """A table of old texts and one of new ones, what matters most first: on a phone the rest is a swipe away."""
    verdict = judge(rows, m.run.config)
    beyond = {(e.lang, e.domain) for e in verdict.excess}
    tables = []
    for name, word in (("old", "forgotten"), ("new", "gained")):
        members = role(rows, name)
        lines = []
        for row in members:
            same, limit = identical([row]), m.limits.get((row["lang"], row["domain"]))
            lines.append(
                [
                    m.labels.written(row),
                    change_text(row),
                    share_text(same.share) if same and name == "old" else "",
                    "" if limit is None else f"{100 * limit:.3g}%",
                    between(change_interval(row)),
                    share_text(same.token_share, 2) if same and name == "old" else "",
                    f"{row['base_bits_per_byte']:.4f}",
                    f"{row['bits_per_byte']:.4f}",
                    f"{row['delta']:+.4f}".replace("-", MINUS),
                    share_text(row.get("base_exact_match")),
                    share_text(row.get("exact_match")),
                    f"{row['documents']:,}" if row.get("documents") is not None else "",
                    f"{row['bytes']:,}" if row.get("bytes") is not None else "",
                ]
            )
        if len(members) > 1:
            lines.append(["mean", signed(mean(changes(members))), *[""] * 11])
        heads = ["to keep" if name == "old" else "to learn", word, "documents identical", "limit", "95% interval"]
        heads += ["tokens identical", "base, bits per byte", "model", "difference", "exact match, base", "model"]
        heads += ["documents", "bytes"]
        marked = {i: "bad" for i, row in enumerate(members) if (row["lang"], row["domain"]) in beyond}
        if members:
            tables.append(compact(Table(heads, lines, 1, marked)))
    return tables


def _how_bars_read(m: Measured) -> str:
    parts = ["Thin lines are 95% intervals over documents."] if any(change_interval(row) for row in m.last) else []
    return " ".join([*parts, "Red marks are limits."] if m.limits else parts)


def _step(verdict: Verdict | None) -> int | None:
    return verdict.step if verdict else None
