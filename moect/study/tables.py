"""A study's results as Markdown tables.

Bits per byte; less is better. Means over languages of equal weight, and over seeds, with the sample standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

from moect.errors import DataError
from moect.tables import size

Run = dict


def methods_table(results: dict, against: str) -> str:
    """A line a method: what it learned, what it lost, what it cost.

    Args:
        results: of `collect`.
        against: the method whose new languages the others are compared with.
    """
    groups, where = _groups(results, "method"), domains(results)
    references = {run["seed"]: run for run in groups.get(against, [])}  # on the same base

    def worse(run: Run) -> float | None:
        reference = references.get(run["seed"])
        return bits(run, "new", where[0]) / bits(reference, "new", where[0]) - 1 if reference else None

    def speed(run: Run) -> float | None:
        reference = references.get(run["seed"])
        return run["tokens_per_second"] / reference["tokens_per_second"] if reference else None

    heads = ["method", "seeds", f"new: {where[0]}", f"against {against}", *(f"new: {d}" for d in where[1:])]
    heads += [*(f"old: {d}" for d in where), "old documents identical", "trained", "active", "speed", "memory"]
    lines = []
    for name, runs in groups.items():
        lines.append(
            [
                f"`{name}`",
                str(len(runs)),
                _spread(runs, lambda r: bits(r, "new", where[0]), "{:.3f}"),
                _spread(runs, worse, "{:+.1%}"),
                *(_spread(runs, lambda r, d=d: bits(r, "new", d), "{:.3f}") for d in where[1:]),
                *(_spread(runs, lambda r, d=d: change(r, "old", d), "{:+.2%}") for d in where),
                _spread(runs, identical, "{:.1%}"),
                _millions(runs[0]["trainable"]),
                _millions(runs[0]["active"]),
                _spread(runs, speed, "{:.2f}", spread=False),
                size(max(r["peak_memory"] or 0 for r in runs)),
            ]
        )
    return markdown(heads, lines)


def summary_table(results: dict, against: str, domain: str) -> str:
    """A line a method, in few columns: what the languages gained and lost against the base, and against a method."""
    _check_domain(results, domain)
    groups = _groups(results, "method")
    references = {run["seed"]: run for run in groups.get(against, [])}  # on the same base

    def worse(run: Run) -> float | None:
        reference = references.get(run["seed"])
        return bits(run, "new", domain) / bits(reference, "new", domain) - 1 if reference else None

    heads = ["method", "new languages", f"against {against}", "old languages", "old documents identical", "trained"]
    lines = [
        [
            f"`{name}`",
            _spread(runs, lambda r: change(r, "new", domain), "{:+.1%}"),
            "" if name == against else _spread(runs, worse, "{:+.1%}"),
            _spread(runs, lambda r: change(r, "old", domain), "{:+.2%}"),
            _spread(runs, identical, "{:.1%}"),
            _millions(runs[0]["trainable"]),
        ]
        for name, runs in groups.items()
    ]
    return markdown(heads, lines)


def languages_table(results: dict, domain: str) -> str:
    """Bits per byte of each language, a line a method.

    Raises:
        DataError: no text is of this domain.
    """
    groups = _groups(results, "method")
    _check_domain(results, domain)
    languages = [t["lang"] for t in _measured(results)[0]["texts"] if t["domain"] == domain]
    of_seeds = list({run["seed"]: run for run in reversed(_measured(results))}.values())  # one of each base

    def cells(runs: list[Run], key: str) -> list[str]:
        return [_spread(runs, lambda r, lang=lang: _text(r, lang, domain)[key], "{:.3f}") for lang in languages]

    heads = ["", *languages]
    lines = [["base", *cells(of_seeds, "base_bits_per_byte")]]
    lines += [[f"`{name}`", *cells(runs, "bits_per_byte")] for name, runs in groups.items()]
    return markdown(heads, lines)


def variants_table(results: dict) -> str:
    """A line a variant, below the first seed of the method that it is like."""
    about = results["about"]
    methods, variants = _groups(results, "method"), _groups(results, "variant")
    where = domains(results)
    heads = ["", f"new: {where[0]}", "change", *(f"new: {d}" for d in where[1:]), *(f"old: {d}" for d in where)]
    heads += ["old documents identical", "trained"]
    lines = []
    seeds = {run["seed"] for runs in variants.values() for run in runs}  # one: the first
    for like in dict.fromkeys(about[name]["like"] for name in variants):
        first = next((run for run in methods.get(like, []) if run["seed"] in seeds), None)
        if first:
            lines.append([f"**`{like}`**", *_variant_cells(first, first, where)])
        lines += [
            [f"`{name}`", *_variant_cells(runs[0], first, where)]
            for name, runs in variants.items()
            if about[name]["like"] == like
        ]
    return markdown(heads, lines)


def lengths_table(results: dict, method: str) -> str:
    """The share of old documents with bit-identical logits, by their length in tokens, over all seeds that have ended.

    Raises:
        DataError: the study has no such method.
    """
    counts: dict[tuple[str, int, int], list[int]] = {}
    if method not in results["about"]:
        raise DataError(f"the study has no method {method!r}; there are {', '.join(results['about'])}")
    for run in _groups(results, "method").get(method, []):
        for text in run["texts"]:
            for part in text.get("exact", {}).get("by_length", []) if text["role"] == "old" else []:
                at = counts.setdefault((text["domain"], part["from"], part["to"]), [0, 0])
                at[0] += part["identical_documents"]
                at[1] += part["documents"]
    heads = ["text", "tokens", "documents", "identical"]
    lines = [
        [domain, f"{low} to {high}", f"{total:,}", f"{same / total:.1%}"]
        for (domain, low, high), (same, total) in sorted(counts.items())
    ]
    return markdown(heads, lines)


def lifelong_table(results: dict, domain: str) -> str:
    """What runs kept that learned a second set of languages: a line each, below the method that learned all at once.

    A language of the first set has what it had before and after the second run.
    """
    about, methods = results["about"], _groups(results, "method")
    runs = [run for run in _measured(results) if any(t["role"] == "learnt" for t in run["texts"])]
    if runs:
        _check_domain(results, domain)
    texts = runs[0]["texts"] if runs else []
    languages = [t["lang"] for t in texts if t["role"] != "old" and t["domain"] == domain]

    def cells(run: Run) -> list[str]:
        texts = [_text(run, lang, domain) for lang in languages]
        befores = [f"{t['base_bits_per_byte']:.3f} → " if t["role"] == "learnt" else "" for t in texts]
        learned = [f"{before}{t['bits_per_byte']:.3f}" for before, t in zip(befores, texts, strict=True)]
        return [*learned, _figure(change(run, "old", domain), "{:+.2%}"), _figure(identical(run), "{:.1%}")]

    lines = []
    for like in dict.fromkeys(about[run["method"]]["like"] for run in runs):
        lines += [[f"**`{like}`**", *cells(run)] for run in methods.get(like, []) if run["seed"] == runs[0]["seed"]]
        lines += [[f"`{run['method']}`", *cells(run)] for run in runs if about[run["method"]]["like"] == like]
    return markdown(["", *languages, f"old: {domain}", "old documents identical"], lines)


def rates_table(results: dict) -> str:
    """What the pilots came to at each learning rate; the best in bold."""
    groups = _groups(results, "pilot")
    rates = sorted({run["rate"] for runs in groups.values() for run in runs})
    lines = []
    for name, runs in groups.items():
        tried = {run["rate"]: run["bits_per_byte"] for run in runs}
        best = min((rate for rate in tried if tried[rate] is not None), key=lambda r: (tried[r], r), default=None)
        told = {rate: "diverged" if bits is None else f"{bits:.3f}" for rate, bits in tried.items()}
        lines.append([f"`{name}`", *(f"**{told[r]}**" if r == best else told.get(r, "") for r in rates)])
    return markdown(["", *(f"{rate:g}" for rate in rates)], lines)


def domains(results: dict) -> list[str]:
    """The domains of the texts that were measured.

    Raises:
        DataError: no run has ended.
    """
    found = list(dict.fromkeys(t["domain"] for run in _measured(results) for t in run["texts"]))
    if not found:
        raise DataError("no run of the study has ended: there is nothing to show")
    return found


def bits(run: Run, role: str, domain: str) -> float | None:
    """The mean bits per byte over the languages of a role; None: it has none in this domain."""
    found = [t["bits_per_byte"] for t in _texts(run, role, domain)]
    return mean(found) if found else None


def change(run: Run, role: str, domain: str) -> float | None:
    """The mean change against the base, a share."""
    texts = [t for t in _texts(run, role, domain) if t["role"] != "learnt"]  # whose reference is no base
    found = [t["bits_per_byte"] / t["base_bits_per_byte"] - 1 for t in texts]
    return mean(found) if found else None


def identical(run: Run) -> float | None:
    """The share of old documents whose logits are the base's, bit for bit."""
    found = [t["exact"] for t in run["texts"] if t["role"] == "old" and "exact" in t]
    total = sum(e["documents"] for e in found)
    return sum(e["identical_documents"] for e in found) / total if total else None


def _check_domain(results: dict, domain: str | None) -> None:
    if domain not in domains(results):
        raise DataError(f"no text of the study has the domain {domain!r}; there are {', '.join(domains(results))}")


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table whose first column is text, and the others figures."""
    rows = [heads, [":--", *["--:"] * (len(heads) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _variant_cells(run: Run, like: Run | None, where: list[str]) -> list[str]:
    new = bits(run, "new", where[0])
    against = None if like is None or like is run else new / bits(like, "new", where[0]) - 1
    return [
        _figure(new, "{:.3f}"),
        _figure(against, "{:+.1%}"),
        *(_figure(bits(run, "new", d), "{:.3f}") for d in where[1:]),
        *(_figure(change(run, "old", d), "{:+.2%}") for d in where),
        _figure(identical(run), "{:.1%}"),
        _millions(run["trainable"]),
    ]


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _texts(run: Run, role: str, domain: str) -> list[dict]:
    roles = ("new", "learnt") if role == "new" else (role,)
    return [t for t in run["texts"] if t["role"] in roles and t["domain"] == domain]


def _measured(results: dict) -> list[Run]:
    """The runs that count."""
    return [run for run in results["runs"] if run["kind"] != "pilot"]


def _groups(results: dict, kind: str) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in results["runs"]:
        if run["kind"] == kind:
            groups.setdefault(run["method"], []).append(run)
    return groups


def _text(run: Run, lang: str, domain: str) -> dict:
    return next(t for t in run["texts"] if (t["lang"], t["domain"]) == (lang, domain))


def _spread(runs: list[Run], value: Callable[[Run], float | None], form: str, spread: bool = True) -> str:
    values = [v for v in map(value, runs) if v is not None]
    if not values:
        return ""
    told = form.format(mean(values))
    return f"{told} ± {form.replace('+', '').format(stdev(values))}" if spread and len(values) > 1 else told


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M"
