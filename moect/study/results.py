"""What the runs of a study came to, as plain values: all that its page shows, in one file that can be kept."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from statistics import mean

from moect.errors import DataError
from moect.monitor.comparing.run_summary import summarise
from moect.monitor.reporting.run_files import read_run
from moect.monitor.rows import Row
from moect.study.plan import Job, Study
from moect.study.rates import known_rates, tried_rates

FORMAT = 2


def collect(study: Study) -> dict:
    """What has ended of a study: here, or known from elsewhere.

    Returns:
        `about`: by name of method or variant. `runs`: each with name, method, kind, seed, rate and `made_of`; a pilot
        also with `bits_per_byte`, null if it diverged; the others with steps, tokens, trainable, active,
        tokens_per_second, peak_memory (bytes), `texts`, what was measured of each held-out text at the end, and
        `curve`, the means by role and domain on the way.
    """
    rates = known_rates(study)
    runs = []
    for name in study.methods:
        if study.methods[name].has_pilots:
            tried = tried_rates(study, name)
            runs += [_pilot(study, study.pilot_job(name, r), bits) for r, bits in tried.items() if bits is not None]
    jobs = [
        study.method_job(name, rates[name], seed) for name in study.methods if name in rates for seed in study.seeds
    ]
    jobs += [study.variant_job(name, rates[name]) for name in study.variants if name in rates]
    runs += [_result(study, job) if study.ended(job) else study.known(job) for job in jobs if study.done(job)]
    about = {m.name: {"about": m.about, "like": m.like} for m in (*study.methods.values(), *study.variants.values())}
    return {"format": FORMAT, "about": about, "runs": runs}


def write_results(results: dict, path: Path) -> None:
    """Write results as JSON, a run a line, over earlier ones.

    Raises:
        DataError: something else is there.
    """
    if path.exists():
        read_results(path)
    head = {key: value for key, value in results.items() if key != "runs"}
    lines = [json.dumps(run, ensure_ascii=False) for run in results["runs"]]
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2] + ',\n "runs": [\n' + ",\n".join(lines) + "\n ]\n}\n"
    replace_text(path, text)


def read_results(path: Path) -> dict:
    """Read what `write_results` wrote.

    Raises:
        DataError: it is something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] != FORMAT or {"about", "runs"} - results.keys():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: holds no results of a study; make it with moect study FILE --results") from error
    return results


def replace_text(path: Path, text: str) -> None:
    """Put a text in the place of a file's, all at once.

    Raises:
        DataError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; give another place") from error


def _pilot(study: Study, job: Job, bits: float) -> dict:
    return {**_head(study, job), "bits_per_byte": bits if math.isfinite(bits) else None}


def _head(study: Study, job: Job) -> dict:
    method = job.name if job.kind == "variant" else job.method
    named = {"name": job.name, "method": method, "kind": job.kind, "seed": job.seed, "rate": job.rate}
    return {**named, "made_of": study.made_of(job)}


def _result(study: Study, job: Job) -> dict:
    runs = [read_run(config.folder) for config in job.configs]
    folder = runs[-1].folder
    summary = summarise(folder, last=True)
    if summary.step != runs[-1].config.train.steps:
        raise DataError(
            f"{folder}: its end was not measured, its last measurement is of step {summary.step}: "
            f"moect evaluate {folder} makes up for it"
        )
    peaks = [event["peak_memory"] for run in runs for event in run.log.events("checkpoint") if event.get("peak_memory")]
    return {
        **_head(study, job),
        "steps": job.steps,
        "tokens": sum(run.plan["tokens"] for run in runs),
        "trainable": max(run.plan["parameters"]["trainable"] for run in runs),
        "active": runs[0].plan["parameters"]["active"],
        "tokens_per_second": runs[0].log.median_speed,
        "peak_memory": max(peaks, default=None),
        "texts": [_text(row) for row in summary.rows.values()],
        "curve": _curve(runs[0].rows) if len(runs) == 1 else [],
    }


def _text(row: Row) -> dict:
    kept = ("lang", "role", "domain", "documents", *("bits_per_byte", "base_bits_per_byte"))
    kept += ("open_share", "gate_threshold")
    text = {key: row[key] for key in kept if row.get(key) is not None}
    if exact := row.get("exact"):
        names = ("documents", "identical_documents", "tokens", "identical_tokens", "by_length")
        text["exact"] = {key: exact[key] for key in names if key in exact}
    return text


def _curve(rows: list[Row]) -> list[dict]:
    """Mean bits per byte by role and domain, and the base's, at each measured step."""
    points = []
    for step in sorted({row["step"] for row in rows}):
        for role, domain in sorted({(row["role"], row["domain"]) for row in rows}):
            at = [r for r in rows if (r["step"], r["role"], r["domain"]) == (step, role, domain)]
            if at:
                bits, base = (mean(r[key] for r in at) for key in ("bits_per_byte", "base_bits_per_byte"))
                points.append({"step": step, "role": role, "domain": domain, "bits_per_byte": bits, "base": base})
    return points
