"""Folders of runs as the trainer leaves them, with made-up measurements, for the tests of reports."""

from __future__ import annotations

import json
import random
from pathlib import Path

from monitor_texts import run_config

from moect.config import config_to_yaml
from moect.monitor.measuring.exactness import wilson
from moect.monitor.rows import replace_rows

OLD, NEW = ("en", "de", "zh"), ("sw", "eu", "is", "ta")
STEPS = (0, 200, 400, 600, 800, 1000)
SCRIPTS = {
    "ta": "தமிழ் ஒரு செம்மொழி; அதன் இலக்கியம் இரண்டாயிரம் ஆண்டுகள் பழமையானது.",
    "zh": "北京是中国的首都，也是一座历史悠久的城市。",
    "bn": "বাংলা ভাষা দক্ষিণ এশিয়ার একটি প্রধান ভাষা।",
    "en": "The river rises in the hills north of the town and flows into the bay.",
    "sw": "Mto huo huanzia milimani kaskazini mwa mji na kumwaga maji yake ghubani.",
}
LENGTHS = ((1, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, None))


def write_log(folder: Path, *entries: dict | str) -> Path:
    """log.jsonl; a string is a line as it stands."""
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "log.jsonl"


def loss(step: int, value: float) -> dict:
    """A line of training."""
    return {"step": step, "loss": value, "lr": 1e-3, "tokens_per_second": 1000.0 + step}


def row(step: int, lang: str, role: str, bits: float, base_bits: float, **more) -> dict:
    """A row with nothing but bits per byte, and what is given."""
    change = {"retention": base_bits / bits} if role == "old" else {"gain": 1 - bits / base_bits}
    values = {"step": step, "lang": lang, "role": role, "domain": "held-out", "bytes": 12345, "documents": 50, **change}
    return {**values, "bits_per_byte": bits, "base_bits_per_byte": base_bits, "delta": bits - base_bits, **more}


def make_run(
    folder: Path, languages: dict[str, str] | None = None, domains: tuple[str, ...] = ("held-out",), **sections
) -> Path:
    """A folder with config.yaml only."""
    languages = languages or {"en": "old", "cy": "new"}
    folder.mkdir(parents=True)
    train = [{"path": f"{n}.txt", "lang": lang} for n, lang in enumerate(languages)]
    data = {"languages": languages, "train": train, **sections.pop("data", {})}
    evaluation = [
        {"path": f"{n}.{domain}.txt", "lang": lang, "domain": domain}
        for n, lang in enumerate(languages)
        for domain in domains
    ]
    config = run_config(data={**data, "evaluation": evaluation}, **sections)
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return folder


def full_run(
    folder: Path,
    gate: str | None = "language",
    old: tuple[str, ...] = OLD,
    new: tuple[str, ...] = NEW,
    domains: tuple[str, ...] = ("web", "news"),
    blocks: int = 12,
    experts: int = 8,
    limit: str | None = "1%",
) -> Path:
    """A run in which the monitor has measured all that it can.

    Args:
        folder: made.
        gate: `language`, `fusion` or None, as of the module.
        old, new: languages.
        domains: of each.
        blocks, experts: of the module.
        limit: of forgetting.
    """
    moe = {"experts": experts, "fusion": "gate" if gate == "fusion" else "add", "language_gate": gate == "language"}
    languages = {lang: "old" for lang in old} | {lang: "new" for lang in new}
    make_run(
        folder,
        languages,
        domains,
        name="swahili",
        model={"base": "Qwen/Qwen3-0.6B-Base"},
        moe=moe,
        data={"replay": 0.1, "sequence_length": 512},
        train={"steps": 1000, "batch_size": 64, "micro_batch": 8},
        monitor={"max_forgetting": limit, "action": "rollback" if limit else "warn"},
    )
    rows = [
        _row(random.Random(f"{n} {domain}"), step, lang, domain, n, len(old), gate, blocks, experts)
        for step in STEPS
        for n, lang in enumerate((*old, *new))
        for domain in domains
    ]
    replace_rows(folder / "monitor", rows)
    _write_lines(folder / "monitor" / "tasks.jsonl", [t for step in STEPS for t in _tasks(step, old, new)])
    _write_lines(folder / "monitor" / "samples.jsonl", [_sample(lang, languages) for lang in languages])
    plan = {"parameters": {"total": 680_000_000, "trainable": 84_000_000, "active": 638_000_000}}
    (folder / "plan.json").write_text(json.dumps({**plan, "ranks": 8, "zero_stage": 2}))
    _write_full_log(folder, old, new)
    return folder


def _row(chance, step, lang, domain, number, n_old, gate, blocks, experts) -> dict:
    is_old, done = number < n_old, step / STEPS[-1]
    base = chance.uniform(0.7, 2.6)
    lost = done * chance.uniform(0.0, 0.006) + (0.004 * done if (number, domain) == (1, "news") else 0)
    gained = (1 - 2.0 ** (-4 * done)) * chance.uniform(0.15, 0.36)
    change = lost if is_old else -gained
    bits, spread = base * (1 + change), chance.uniform(0.001, 0.004) * (1 if is_old else 6) * done
    made = row(step, lang, "old" if is_old else "new", bits, base, domain=domain, documents=500, bytes=812_345)
    key = "retention" if is_old else "gain"
    for name, value in (("bits_per_byte", bits), ("delta", bits - base), (key, made[key])):
        made |= {f"{name}_low": value - spread, f"{name}_high": value + spread}
    open_share = (done * chance.uniform(0.0, 0.02) if is_old else 1 - 0.5 * (1 - done)) if gate == "language" else 1.0
    if is_old:
        made["exact"] = _exact(open_share, done)
    load = [_load(random.Random(f"{lang} {block}"), experts, is_old, block) for block in range(blocks)]
    if is_old and gate == "language" and step == 0:
        load = [[0.0] * experts for _ in range(blocks)]
    made |= {"blocks": list(range(blocks)), "expert_load": load}
    made["router_entropy"] = [0.2 + 0.6 * chance.random() for _ in range(blocks)]
    made["load_entropy"] = [0.8] * blocks
    if gate == "language":
        made |= {"gate": open_share * 0.9 + 0.01, "open_share": open_share}
    if gate == "fusion":
        by_block = [(0.9 if is_old else 0.35) + 0.1 * chance.random() for _ in range(blocks)]
        made |= {"gate": sum(by_block) / blocks, "gate_by_block": by_block}
    return made


def _exact(open_share: float, done: float) -> dict:
    by_length = []
    for first, last in LENGTHS:
        same = round(33 * (1 - open_share / 10) ** (last or 512))
        low, high = wilson(same, 33)
        counts = {"documents": 33, "identical_documents": same, "low": low, "high": high}
        by_length.append({"from": first, "to": last, **counts})
    same = sum(c["identical_documents"] for c in by_length)
    low, high = wilson(same, 198)
    return {
        **{"documents": 198, "identical_documents": same, "low": low, "high": high},
        **{"tokens": 24_000, "identical_tokens": round(24_000 * (1 - open_share)), "tokens_low": 0.9, "tokens_high": 1},
        **{"top1_agreement": 1 - open_share / 10, "kl": 0.003 * done, "max_logit_difference": 4.5 * done},
        "by_length": by_length,
    }


def _load(chance, experts: int, is_old: bool, block: int) -> list[float]:
    weights = [chance.uniform(0.4, 1.6) for _ in range(experts)]
    if block == 3:
        weights[5 % experts] = 0.01  # dead for all
    if block == 7:
        weights[1] = experts  # overloaded for all
    total = sum(weights)
    return [round(w / total, 4) for w in weights]


def _tasks(step: int, old: tuple, new: tuple) -> list[dict]:
    found = []
    for task, langs in (("xcopa", (*old[:1], *new[:2])), ("belebele", (*old[:2], *new[:4]))):
        for lang in langs:
            value = 0.62 if lang in old else 0.48 + 0.12 * step / STEPS[-1]
            base = 0.62 if lang in old else 0.48
            found.append(
                {
                    **{"step": step, "task": f"{task}_{lang}", "lang": lang, "role": "old" if lang in old else "new"},
                    **{"metric": "acc", "questions": 500, "value": value, "stderr": 0.022, "base_value": base},
                    **{"base_stderr": 0.022, "difference": value - base, "difference_stderr": 0.015},
                }
            )
    return found


def _sample(lang: str, languages: dict[str, str]) -> dict:
    text = SCRIPTS.get(lang, SCRIPTS["en"])
    half = text.find(" ", len(text) // 2) if " " in text else len(text) // 2
    told = {"step": STEPS[-1], "lang": lang, "role": languages[lang], "domain": "web", "document": 0}
    base = text[half:] if languages[lang] == "old" else "<b>1</b> & the the the the the"
    return {**told, "prompt": text[:half], "reference": text[half:], "base": base, "model": text[half:]}


def _write_full_log(folder: Path, old: tuple, new: tuple) -> None:
    chance = random.Random(1)
    lines: list[dict] = [{"event": "start", "step": 0}]
    for step in range(10, 1001, 10):
        steps = step + 200 * (step > 600)  # that were drawn; a rollback undid 200 of them
        seen = {lang: steps * 32_768 // (len(old) + len(new)) for lang in (*old, *new)}
        value = 2.1 + 1.9 * 0.996**step + chance.gauss(0, 0.05)
        lines.append({**loss(step, value), "seconds": 8.0, "tokens_seen": seen})
        if step % 200 == 0:
            lines += [{"event": "checkpoint", "step": step}, {"event": "monitor", "step": step, "seconds": 21.5}]
        if step == 600:
            why = f"{old[-1]} news +1.08% (limit 1%)"
            share = {"old": 0.1, "new": 0.9}, {"old": 0.2, "new": 0.8}
            lines.append({"event": "action", "step": 400, "from": 600, "action": "rollback", "to": 400, "why": why})
            lines[-1]["replay"] = 0.2
            lines.append({"event": "mixture", "step": 400, "row": 25_600, "before": share[0], "now": share[1]})
            for again in range(410, 601, 10):
                seen = {lang: (again + 200) * 32_768 // (len(old) + len(new)) for lang in (*old, *new)}
                lines.append({**loss(again, 2.1 + 1.9 * 0.996**again), "seconds": 8.0, "tokens_seen": seen})
            lines += [{"event": "checkpoint", "step": 600}, {"event": "monitor", "step": 600, "seconds": 21.5}]
    write_log(folder, *lines, {"event": "end", "step": 1000})


def _write_lines(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
