"""The model card: what the model is, what training did to each language, how to load it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from moect.config import RunConfig

ROLES = {"old": "to keep", "new": "to learn"}


def make_card(config: RunConfig, info: dict, rows: list[dict]) -> str:
    """README.md of an exported model.

    Args:
        config: the run.
        info: of the exported checkpoint: `step`, `base_fingerprint`.
        rows: the monitor's measurements of this step; none: the card says so.
    """
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(config), sort_keys=False, allow_unicode=True)}---",
        f"# {config.name}",
        _origin(config, info),
        "## Languages",
        "\n".join(f"- {lang}: {role} ({ROLES[role]})" for lang, role in config.data.languages.items()),
        "## Forgetting",
        _forgetting(rows),
        "## Use",
        _usage(config),
        "## Licence",
        "The weights of the base keep the licence of the base, and so does everything derived from them."
        + (" `modeling_moect.py` is licensed under Apache-2.0." if config.method == "moe-ct" else ""),
    ]
    return "\n\n".join(sections) + "\n"


def _base_name(config: RunConfig) -> str | None:
    """A hub name as it is; of a folder its own name only."""
    base = config.model.base
    return Path(base).resolve().name if base and os.path.isdir(base) else base


def _front_matter(config: RunConfig) -> dict:
    values = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["moect", config.method]}
    if codes := [lang for lang in config.data.languages if re.fullmatch("[a-z]{2,3}", lang)]:
        values["language"] = codes
    if config.model.base and not os.path.isdir(config.model.base):
        values["base_model"] = config.model.base
    return values


def _origin(config: RunConfig, info: dict) -> str:
    base = _base_name(config)
    of = f"of `{base}`" if base else "from scratch"
    print_of_base = f" (fingerprint of the base: `{info['base_fingerprint'][:16]}`)"
    if config.method == "full":
        return f"Training {of}, all parameters, {info['step']} steps, with moect{print_of_base}."
    if config.method == "lora":
        return (
            f"Continual training {of} by low-rank updates of rank {config.lora.rank}, merged into the weights, "
            f"{info['step']} steps, with moect{print_of_base}."
        )
    moe = config.moe
    gated = ", and a language gate that decides for each token whether they are used" if moe.language_gate else ""
    return (
        f"Continual training {of} by an appended mixture of experts, {info['step']} steps, with moect{print_of_base}. "
        f"The base is frozen and inside unchanged: `model.base_only()` gives it back bit for bit.{_rows(config)} "
        f"Each chosen block (`{moe.layers}`) has {moe.experts} experts, {moe.top_k} of them for a token, joined by "
        f"fusion `{moe.fusion}`{gated}."
    )


def _rows(config: RunConfig) -> str:
    """What was done to embedding and head, which stay beside what trained."""
    model = config.model
    tokens = {"unseen": "tokens that the old languages hardly use", "all": "all tokens"}.get(model.train_embeddings)
    said = f" Of {tokens}, rows of embedding and head were trained beside the base's." if tokens else ""
    if model.extend_tokenizer:
        said += " The tokenizer has tokens for the new languages after those of the base."
    return said


def _forgetting(rows: list[dict]) -> str:
    if not rows:
        return "Not measured: the run has no measurements of this step."
    lines = [
        "Bits per byte on held-out text; lower is better. Retention is base / model, gain is 1 - model / base. "
        "Compare a language with itself only.",
        "",
        "| language | role | text | base | model | difference | | bytes |",
        "|---|---|---|---:|---:|---:|---|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["role"] == "new"):
        verdict = "retention" if row["role"] == "old" else "gain"
        share = f"{verdict} {row[verdict]:.2%}" if row.get(verdict) is not None else ""
        text = row["domain"].replace("|", "\\|").replace("\n", " ")
        lines.append(
            f"| {row['lang']} | {row['role']} | {text} | {row['base_bits_per_byte']:.4f} | {row['bits_per_byte']:.4f} "
            f"| {row['delta']:+.4f} | {share} | {row['bytes']:,} |"
        )
    return "\n".join(lines)


def _usage(config: RunConfig) -> str:
    if config.method != "moe-ct":
        return (
            "A stock architecture:\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n```'
        )
    return (
        "With moect installed:\n\n```python\nimport moect\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n```\n\n'
        "Without it, from the modelling file in this folder (transformers 5 or later):\n\n```python\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)\n```'
    )
