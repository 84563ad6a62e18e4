"""How a report opens: the verdict in words, and the few numbers that stand for it."""

from __future__ import annotations

from moect.monitor.reporting.figures import at_step, between, change, identical, role, share_text, signed
from moect.monitor.reporting.page.content import Block, Figure, Figures, Text, Tone
from moect.monitor.reporting.page.course import steps_done, tokens_seen
from moect.monitor.reporting.page.measured import Measured
from moect.monitor.reporting.run_files import RunFiles
from moect.monitor.rows import Row

MOST_NAMED = 10  # languages, or texts beyond their limits


def opening(run: RunFiles, m: Measured | None) -> tuple[str, Tone, list[Block]]:
    """The verdict in a line, its tone, and the blocks below it."""
    if m is None:
        figures = [_trained(run)] if steps_done(run) else []
        return "The monitor has measured nothing yet.", "plain", [Figures(figures)] if figures else []
    if m.verdict.step == 0 and len({row["step"] for row in run.rows}) == 1:
        told = "Measured before the first step only: the model is still its base."
        return told, "plain", [Figures([_trained(run)])]
    old, new = role(m.last, "old"), role(m.last, "new")
    worst = max(old, key=change, default=None)
    tone: Tone = "bad" if m.verdict.excess else "good" if m.limits else "plain"
    figures = [f for f in (_gain(m, new), _worst(m, worst), _same(old), _best(m), _trained(run)) if f]
    words = [Text(_new_words(new)), Text(_old_words(m, old)), Text(_best_words(m))]
    return _verdict(m, worst), tone, [Figures(figures), *(w for w in words if w.text)]


def _verdict(m: Measured, worst: Row | None) -> str:
    gained = "" if m.verdict.gain is None else f"the new languages gained {share_text(m.verdict.gain)} on average"
    if m.verdict.gain is not None and m.verdict.gain < 0:
        gained = f"the new languages got {share_text(-m.verdict.gain)} worse on average"
    lost = ""
    if worst is not None:
        most = change(worst)
        lost = f"no old one lost more than {share_text(most, 2)}" if most > 0 else "no old one lost anything"
    said = ", and ".join(part for part in (gained, lost) if part)
    if m.verdict.excess:
        count = len(m.verdict.excess)
        texts = "1 old text has" if count == 1 else f"{count} old texts have"
        return f"Beyond the limits: {texts} lost more than allowed" + (f"; {gained}." if gained else ".")
    return f"Within the limits: {said}." if m.limits else f"{said[:1].upper()}{said[1:]}. No limits were set."


def _new_words(rows: list[Row]) -> str:
    return f"New languages, fewer bits per byte than under the base: {_by_language(rows)}." if rows else ""


def _old_words(m: Measured, rows: list[Row]) -> str:
    if not rows:
        return ""
    said = f"Old languages, more bits per byte: {_by_language(rows)}. "
    if m.verdict.excess:
        beyond = [str(e) for e in m.verdict.excess]
        more = f" and {len(beyond) - MOST_NAMED} more" if len(beyond) > MOST_NAMED else ""
        said += f"Beyond their limits: {'; '.join(beyond[:MOST_NAMED])}{more}. "
    langs = dict.fromkeys(row["lang"] for row in rows)
    alike = {lang: identical([row for row in rows if row["lang"] == lang]) for lang in langs}
    shares = [f"{lang} {share_text(same.share)}" for lang, same in alike.items() if same]
    if shares:
        said += f"Documents whose logits are the base's, bit for bit: {_shortened(shares)}."
    return said


def _best_words(m: Measured) -> str:
    if m.best is None:
        return "No checkpoint after step 0 is within the limits." if m.limits else ""
    if m.best.step == m.verdict.step:
        return ""
    old = role(at_step(m.run.rows, m.best.step), "old")
    worst = max(old, key=change, default=None)
    parts = [] if m.best.gain is None else [f"mean gain {share_text(m.best.gain)}"]
    if worst is not None:
        parts.append(f"worst old text {m.labels.written(worst)} {signed(change(worst))}")
    within = " within the limits" if m.limits else ""
    return f"The best checkpoint{within} is step {m.best.step:,}, not the last: {', '.join(parts)}."


def _by_language(rows: list[Row]) -> str:
    """Each language with its change, or those of its domains."""
    texts: dict[str, list[Row]] = {}
    for row in rows:
        texts.setdefault(row["lang"], []).append(row)
    return _shortened(
        [
            f"{lang} {signed(change(members[0]))}"
            if len(members) == 1
            else f"{lang} " + " and ".join(f"{signed(change(r))} ({r['domain']})" for r in members)
            for lang, members in texts.items()
        ]
    )


def _shortened(parts: list[str]) -> str:
    more = f" and {len(parts) - MOST_NAMED} more, below" if len(parts) > MOST_NAMED else ""
    return ", ".join(parts[:MOST_NAMED]) + more


def _gain(m: Measured, rows: list[Row]) -> Figure | None:
    if m.verdict.gain is None:
        return None
    langs = len({row["lang"] for row in rows})
    note = f"mean over {langs} new language{'s' * (langs != 1)}, fewer bits per byte"
    return Figure("gained", signed(m.verdict.gain, 1), note, "good" if m.verdict.gain > 0 else "bad")


def _worst(m: Measured, row: Row | None) -> Figure | None:
    if row is None:
        return None
    limit = m.limits.get((row["lang"], row["domain"]))
    beyond = any((e.lang, e.domain) == (row["lang"], row["domain"]) for e in m.verdict.excess)
    note = m.labels.written(row) + (", no limit set" if limit is None else f", limit {100 * limit:.3g}%")
    tone: Tone = "plain" if limit is None else "bad" if beyond or m.verdict.excess else "good"
    return Figure("most forgotten", signed(change(row)), note, tone)


def _same(rows: list[Row]) -> Figure | None:
    same = identical(rows)
    if same is None:
        return None
    interval = between((same.low, same.high), 1, sign=False)
    note = f"of {same.documents:,} old documents (95%: {interval}); {share_text(same.token_share, 2)} of tokens"
    return Figure("bit-identical to the base", share_text(same.share), note)


def _best(m: Measured) -> Figure:
    count = len({row["step"] for row in m.run.rows if row["step"] > 0})
    of = f"of {count} measured" if count != 1 else "the only one measured"
    if m.best is None:
        return Figure("best checkpoint", "none", f"{of}; none is within the limits", "bad")
    return Figure("best checkpoint", f"step {m.best.step:,}", of + (", within the limits" if m.limits else ""))


def _trained(run: RunFiles) -> Figure:
    tokens = tokens_seen(run)
    note = f"of {run.config.train.steps:,} steps"
    return Figure("trained", f"{steps_done(run):,}", note if tokens is None else f"{note}, {_count(tokens)} tokens")


def _count(number: int) -> str:
    for size, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
