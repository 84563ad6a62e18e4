"""How a report opens: the verdict in words, and the few numbers that stand for it."""

from __future__ import annotations

from dataclasses import replace

from moect.monitor.reporting.figures import (
    at_step,
    between,
    bound_text,
    change,
    change_text,
    identical,
    role,
    share_text,
    signed,
    worst,
)
from moect.monitor.reporting.names import isolated
from moect.monitor.reporting.page.content import Block, Figure, Figures, Text, Tone
from moect.monitor.reporting.page.course import steps_done
from moect.monitor.reporting.page.measured import Measured
from moect.monitor.reporting.run_files import RunFiles
from moect.monitor.rows import Row

MOST_NAMED = 10  # languages, or texts beyond their limits


def opening(run: RunFiles, m: Measured | None) -> tuple[str, Tone, list[Block]]:
    """The verdict in a line, its tone, and the blocks below it; before it, how a run ended that could not go on."""
    told, tone, blocks = _measured(run, m)
    last = ([e for e in run.log.entries if "event" in e] or [{}])[-1]
    if last.get("event") != "stop" or "why" not in last:
        return told, tone, blocks
    return f"The run could not go on at step {last['step']:,}: {last['why']}. {told}", "bad", blocks


def _measured(run: RunFiles, m: Measured | None) -> tuple[str, Tone, list[Block]]:
    """Of steps that were trained and not measured nothing is known, so nothing good is said of them."""
    if m is None:
        figures = [_trained(run)] if steps_done(run) else []
        return "The monitor has measured nothing yet.", "plain", [Figures(figures)] if figures else []
    step, done = m.verdict.step, steps_done(run)
    if step == 0 and len({row["step"] for row in run.rows}) == 1:
        after = f"steps up to {done:,} were not measured" if done else "the model is still its base"
        return f"Measured before the first step only; {after}.", "plain", [Figures([_trained(run)])]
    old, new = role(m.last, "old"), role(m.last, "new")
    tone: Tone = "bad" if m.verdict.excess else "good" if m.limits else "plain"
    figures = [f for f in (_gain(m, new), _worst(m), _same(old), _best(m), _trained(run)) if f]
    words = [Text(_new_words(new)), Text(_old_words(m, old)), Text(_best_words(m))]
    told = _verdict(m)
    if step < done:
        told += f" Measured at step {step:,}; steps up to {done:,} were not measured."
        tone = "plain" if tone == "good" else tone
        figures = [replace(f, tone="plain") if f.tone == "good" else f for f in figures]
    return told, tone, [Figures(figures), *(w for w in words if w.text)]


def _verdict(m: Measured) -> str:
    gained = "" if m.verdict.gain is None else f"the new languages gained {share_text(m.verdict.gain)} on average"
    if m.verdict.gain is not None and m.verdict.gain < 0:
        gained = f"the new languages got {share_text(-m.verdict.gain)} worse on average"
    lost = ""
    if (furthest := worst(m.last)) is not None:
        most, name = change(furthest), m.labels.written(furthest)
        lost = "no old one lost anything"
        if most is None:
            lost = f"what {name} lost is no share of the base's bits, because the base needs none"
        elif most > 0:
            lost = f"no old one lost more than {bound_text(most)}"
    said = ", and ".join(part for part in (gained, lost) if part)
    at = f"at step {m.verdict.step:,}"
    if m.verdict.excess:
        count = len(m.verdict.excess)
        texts = "1 old text has" if count == 1 else f"{count} old texts have"
        return f"Beyond the limits {at}: {texts} lost more than allowed" + (f"; {gained}." if gained else ".")
    return f"Within the limits {at}: {said}." if m.limits else f"A{at[1:]}, {said}. No limits were set."


def _new_words(rows: list[Row]) -> str:
    return f"New languages, fewer bits per byte than under the base: {_by_language(rows)}." if rows else ""


def _old_words(m: Measured, rows: list[Row]) -> str:
    if not rows:
        return ""
    said = f"Old languages, more bits per byte: {_by_language(rows)}. "
    if m.verdict.excess:
        beyond = [str(replace(e, lang=isolated(e.lang), domain=isolated(e.domain))) for e in m.verdict.excess]
        more = f" and {len(beyond) - MOST_NAMED} more" if len(beyond) > MOST_NAMED else ""
        said += f"Beyond their limits: {'; '.join(beyond[:MOST_NAMED])}{more}. "
    langs = dict.fromkeys(row["lang"] for row in rows)
    alike = {lang: identical([row for row in rows if row["lang"] == lang]) for lang in langs}
    shares = [f"{isolated(lang)} {share_text(same.share)}" for lang, same in alike.items() if same]
    if shares:
        said += f"Documents whose logits are the base's, bit for bit: {_shortened(shares)}."
    return said


def _best_words(m: Measured) -> str:
    if m.best is None:
        return "No checkpoint after step 0 is within the limits." if m.limits and _can_be_best(m) else ""
    if m.best.step == m.verdict.step:
        return ""
    furthest = worst(at_step(m.run.rows, m.best.step))
    parts = [] if m.best.gain is None else [f"mean gain {share_text(m.best.gain)}"]
    if furthest is not None:
        parts.append(f"worst old text {m.labels.written(furthest)} {change_text(furthest)}")
    within = " within the limits" if m.limits else ""
    return f"The best checkpoint{within} is step {m.best.step:,}, not the last: {', '.join(parts)}."


def _by_language(rows: list[Row]) -> str:
    """Each language with its change, or those of its domains."""
    texts: dict[str, list[Row]] = {}
    for row in rows:
        texts.setdefault(row["lang"], []).append(row)
    return _shortened(
        [
            f"{isolated(lang)} {change_text(members[0])}"
            if len(members) == 1
            else f"{isolated(lang)} " + " and ".join(f"{change_text(r)} ({isolated(r['domain'])})" for r in members)
            for lang, members in texts.items()
        ]
    )


def _shortened(parts: list[str]) -> str:
    more = f" and {len(parts) - MOST_NAMED} more, below" if len(parts) > MOST_NAMED else ""
    return ", ".join(parts[:MOST_NAMED]) + more


def _gain(m: Measured, rows: list[Row]) -> Figure | None:
    if m.verdict.gain is None:
        return None
    texts = len(rows)
    note = f"mean over {texts} new text{'s' * (texts != 1)}, fewer bits per byte"
    return Figure("gained", signed(m.verdict.gain, 1), note, "good" if m.verdict.gain > 0 else "bad")


def _worst(m: Measured) -> Figure | None:
    if (row := worst(m.last)) is None:
        return None
    limit = m.limits.get((row["lang"], row["domain"]))
    beyond = any((e.lang, e.domain) == (row["lang"], row["domain"]) for e in m.verdict.excess)
    note = m.labels.written(row) + (", no limit set" if limit is None else f", limit {100 * limit:.3g}%")
    tone: Tone = "plain" if limit is None else "bad" if beyond or m.verdict.excess else "good"
    return Figure("most forgotten", change_text(row), note, tone)


def _same(rows: list[Row]) -> Figure | None:
    same = identical(rows)
    if same is None:
        return None
    interval = between((same.low, same.high), 1, sign=False)
    note = f"of {same.documents:,} old documents (95%: {interval}); {share_text(same.token_share, 2)} of tokens"
    return Figure("bit-identical to the base", share_text(same.share), note)


def _best(m: Measured) -> Figure:
    count = _can_be_best(m)
    of = f"of {count} measured" if count != 1 else "the only one measured"
    if count < len({row["step"] for row in m.run.rows if row["step"] > 0}):
        of += " on all texts"
    if not count:
        return Figure("best checkpoint", "none", "none was measured on all texts of data.evaluation")
    if m.best is None:
        return Figure("best checkpoint", "none", f"{of}; none is within the limits", "bad")
    return Figure("best checkpoint", f"step {m.best.step:,}", of + (", within the limits" if m.limits else ""))


def _can_be_best(m: Measured) -> int:
    """How many checkpoints can be compared with one another."""
    return sum(verdict.step > 0 for verdict in m.verdicts)


def _trained(run: RunFiles) -> Figure:
    note = f"of {run.config.train.steps:,} steps"
    if run.log.tokens_drawn:
        drawn, undone = run.log.tokens_drawn
        note += f", {_count(drawn)} tokens" + (f" drawn, of which {_count(undone)} undone" if undone else "")
    return Figure("trained", f"{steps_done(run):,}", note)


def _count(number: int) -> str:
    for size, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
