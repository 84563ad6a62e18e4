"""The model card: what the model is, what training did to each language, how exact it is, how to load and serve it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from moect.config import RunConfig
from moect.export.proof.comparison import Comparison
from moect.export.targets.base_form import BaseForm
from moect.export.targets.form import Subject, Target
from moect.export.targets.own import Own

ROLES = {"old": "to keep", "learnt": "to keep", "new": "to learn"}


def make_card(
    config: RunConfig,
    info: dict,
    rows: list[dict],
    target: Target,
    subject: Subject,
    comparison: Comparison | None = None,
    instruct: str | None = None,
    licence: str | None = None,
) -> str:
    """README.md of an exported model.

    Args:
        config: the run.
        info: of the exported checkpoint: `step`, `base_fingerprint`.
        rows: the monitor's measurements of this step; none: the card says so.
        target: the architecture that it is written as.
        subject: what it is.
        comparison: how its logits compare with the trained model's; None: they were not compared.
        instruct: the chat model whose difference to the base was added.
        licence: of the base, as its own card names it.
    """
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(config, licence), sort_keys=False, allow_unicode=True)}---",
        f"# {config.name}",
        _origin(config, info, isinstance(target, Own) and not instruct),
        *([_chat(instruct)] if instruct else []),
        "## Languages",
        "\n".join(f"- {lang}: {role} ({ROLES[role]})" for lang, role in config.data.languages.items()),
        "## Data",
        _data(config),
        "## Forgetting",
        _forgetting(rows),
        "## Exactness",
        _exactness(target, subject, comparison),
        "## Use",
        _usage(target, subject),
        "## Licence",
        f"The weights of the base keep the licence of the base{f' (`{licence}`)' if licence else ''}, and so does "
        "everything derived from them."
        + (" `modeling_moect.py` is licensed under Apache-2.0." if isinstance(target, Own) else ""),
    ]
    return "\n\n".join(sections) + "\n"


def base_name(config: RunConfig) -> str | None:
    """A hub name as it is; of a folder its own name only."""
    base = config.model.base
    return Path(base).resolve().name if base and os.path.isdir(base) else base


def _front_matter(config: RunConfig, licence: str | None) -> dict:
    values = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["moect", config.method]}
    if codes := [lang for lang in config.data.languages if re.fullmatch("[a-z]{2,3}", lang)]:
        values["language"] = codes
    if config.model.base and not os.path.isdir(config.model.base):
        values["base_model"] = config.model.base
    if licence:
        values["license"] = licence
    return values


def _origin(config: RunConfig, info: dict, gives_back: bool) -> str:
    base = base_name(config)
    of = f"of `{base}`" if base else "from scratch"
    print_of_base = f" (fingerprint of the base: `{info['base_fingerprint'][:16]}`)"
    if config.method == "full":
        return f"Training {of}, all parameters, {info['step']} steps, with moect{print_of_base}."
    if config.method == "lora":
        return (
            f"Continual training {of} by low-rank updates of rank {config.lora.rank}, merged into the weights, "
            f"{info['step']} steps, with moect{print_of_base}."
        )
    if config.method == "block-expansion":
        return (
            f"Continual training {of} by copies inserted after some of its blocks (`{config.expansion.layers}`), which "
            f"alone trained, {info['step']} steps, with moect{print_of_base}."
        )
    moe = config.moe
    inside = ", and is inside unchanged: `model.base_only()` gives it back bit for bit" if gives_back else ""
    gated = ", and a language gate that decides for each token whether they are used" if moe.language_gate else ""
    return (
        f"Continual training {of} by an appended mixture of experts, {info['step']} steps, with moect{print_of_base}. "
        f"The base was frozen{inside}.{_rows(config)} "
        f"Each chosen block (`{moe.layers}`) has {moe.experts_told} experts, {moe.top_k} of them for a token, joined "
        f"by fusion `{moe.fusion}`{gated}."
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
        verdict = "gain" if row["role"] == "new" else "retention"
        share = f"{verdict} {row[verdict]:.2%}" if row.get(verdict) is not None else ""
        text = row["domain"].replace("|", "\\|").replace("\n", " ")
        lines.append(
            f"| {row['lang']} | {row['role']} | {text} | {row['base_bits_per_byte']:.4f} | {row['bits_per_byte']:.4f} "
            f"| {row['delta']:+.4f} | {share} | {row['bytes']:,} |"
        )
    if any(row["role"] == "learnt" for row in rows):
        lines += ["", "Of a learnt language `base` is the model with what an earlier run had taught it."]
    return "\n".join(lines)


def _chat(instruct: str) -> str:
    name = Path(instruct).resolve().name if os.path.isdir(instruct) else instruct
    return (
        f"The difference between `{name}` and the base was added after training, to the base's weights and to experts "
        "that began as copies of its FFN: nothing was trained on chats."
    )


def _data(config: RunConfig) -> str:
    data, train = config.data, config.train
    tokens = train.batch_size * data.sequence_length
    replay = "" if data.replay is None else f" {data.replay:.1%} of the rows are of the languages to keep."
    lines = [f"{tokens:,} tokens a step.{replay} Text to train on:", ""]
    for source in data.train:
        name = source.dataset or Path(source.path).name
        subset = f" ({source.subset})" if getattr(source, "subset", None) else ""
        lines.append(f"- {source.lang}: `{name}`{subset}")
    return "\n".join(lines).strip()


def _exactness(target: Target, subject: Subject, comparison: Comparison | None) -> str:
    support = target.supports(subject)
    form = "the base's own architecture" if isinstance(target, BaseForm) else f"the architecture `{target.name}`"
    kind = "bit for bit" if support.bitwise else "to rounding"
    said = f"Written in {subject.dtype} as {form}, which computes what was trained {kind} in fp32."
    if comparison is None:
        return f"{said} Logits were not compared when it was exported."
    return f"{said} When it was exported, loaded again and compared with the trained model: {comparison.sentence()}."


def _usage(target: Target, subject: Subject) -> str:
    load = 'model = AutoModelForCausalLM.from_pretrained("FOLDER"{})'
    served = "vLLM and SGLang, as their documentation has it:"
    note = target.supports(subject).note
    if isinstance(target, Own):
        flags = " --model-impl transformers --trust-remote-code"
        serve = (
            f"{served}\n\n```bash\nvllm serve FOLDER{flags} --enforce-eager\n"
            f"python -m sglang.launch_server --model-path FOLDER{flags}\n```"
        )
        if subject.rows:
            serve = "vLLM and SGLang put a head of their own on a model, which does not know its rows of tokens."
        return (
            f"With moect installed:\n\n```python\nimport moect\nfrom transformers import AutoModelForCausalLM\n\n"
            f"{load.format('')}\n```\n\n"
            "Without it, from the modelling file in this folder (transformers 5 or later):\n\n```python\n"
            f"{load.format(', trust_remote_code=True')}\n```\n\n"
            f"{serve}"
        )
    flag = f" {match[0]}" if (match := re.search(r"--disable-[a-z-]+", note)) else ""
    return (
        "A stock architecture:\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f"{load.format('')}\n```\n\n"
        f"{served}\n\n```bash\nvllm serve FOLDER\npython -m sglang.launch_server --model-path FOLDER{flag}\n```"
        + (f"\n\nTo know: {note}." if note else "")
    )


def licence_of(folder: Path | None) -> str | None:
    """The licence that a model's card names; None where there is no card, or it names none."""
    card = folder and folder / "README.md"
    if not card or not card.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    name = values.get("license") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None
