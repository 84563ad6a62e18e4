"""`moect export`: from a run's folder to a folder that the ecosystem loads. The story; the parts are beside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moect.config import RunConfig
from moect.errors import DataError
from moect.export.card import licence_of, make_card
from moect.export.folder import Extras, check_free, write_folder
from moect.export.instruct import add_instruct_delta
from moect.export.proof.comparison import Comparison, Text, random_text
from moect.export.shards import SHARD_BYTES
from moect.export.source import open_run
from moect.export.targets.choice import choose
from moect.export.targets.form import Subject
from moect.model.build import weights_folder
from moect.monitor.measuring.windows import tokenise
from moect.monitor.rows import APART, FILE_NAME, Row, read_rows

log = logging.getLogger("moect.export")

ENOUGH = 128  # tokens: with fewer of them random ones are taken too
LONGEST = 4608  # tokens that a text may have to go beyond a sliding window
TEXTS, TOKENS = 3, 256  # documents of each held-out text that logits are compared on, and of each at most so much


@dataclass(frozen=True)
class ExportOptions:
    """What `moect export` is told.

    Attributes:
        checkpoint: `step-N`; None: see `choose_checkpoint`.
        output: folder to write; None: `export` in the run's folder.
        target: `auto`, or the name of an architecture; None: the run's `export.target`.
        dtype: of the weights, `fp32`, `bf16` or `auto`; None: the run's `export.dtype`.
        instruct: a chat model made from the same base, whose difference to it is added. None: none.
        pickle: whether the chat model may be read from pickled weights.
        shard_bytes: of a file of weights.
        verify: compare logits, too.
    """

    checkpoint: str | None = None
    output: Path | None = None
    target: str | None = None
    dtype: str | None = None
    instruct: str | None = None
    pickle: bool = False
    shard_bytes: int = SHARD_BYTES
    verify: bool = True


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where.
        target: name of the architecture.
        comparison: how its logits compare; None: they were not.
    """

    folder: Path
    target: str
    comparison: Comparison | None


def export_run(run_folder: Path, options: ExportOptions | None = None) -> Export:
    """Write a checkpoint of a run as a Hugging Face folder.

    Raises:
        ExportError: the output exists, the base is not the one trained on, or the verification failed.
        CheckpointError, ConfigError, DataError: checkpoint, base or tokenizer cannot be read.
    """
    run_folder, options = Path(run_folder), options or ExportOptions()
    output = Path(options.output) if options.output else run_folder / "export"
    check_free(output)
    source = open_run(run_folder, options.checkpoint, options.dtype)
    config, trained, tokenizer = source.config, source.trained, source.tokenizer
    folder = weights_folder(config.model) if config.model.base else None
    origin = {"files": source.info["files"], "base": source.info["base_fingerprint"], "step": source.info["step"]}
    if options.instruct:
        chat = add_instruct_delta(trained, tokenizer, options.instruct, options.pickle)
        trained, tokenizer, folder, origin["instruct"] = chat.trained, chat.tokenizer, chat.folder, chat.digests
    target = choose(options.target or config.export.target, trained.subject)
    texts = _texts(config, tokenizer, trained.subject) if options.verify else []
    rows = _rows(run_folder, source.info["step"], trained.subject)

    def card(comparison: Comparison | None) -> str:
        return make_card(
            config, source.info, rows, target, trained.subject, comparison, options.instruct, licence_of(folder)
        )

    comparison = write_folder(
        trained,
        target,
        output,
        texts,
        _extras(folder, tokenizer, trained.subject),
        card,
        origin | {"dtype": trained.subject.dtype},
        options.shard_bytes,
        options.verify,
        live=None if options.instruct else source.live,
    )
    return Export(output, target.name, comparison)


def _rows(run_folder: Path, step: int, subject: Subject) -> list[Row]:
    """What was measured of this model, with the threshold that its gate has now; the latest of each text."""
    wanted = subject.moe.gate_threshold if subject.moe else None
    found = {}
    for name in (FILE_NAME, APART):
        for row in read_rows(run_folder / "monitor", name):
            if row["step"] == step and row.get("gate_threshold", wanted) == wanted:
                found[row["lang"], row["domain"]] = row
    if not found and read_rows(run_folder / "monitor"):
        log.warning("the card says nothing of forgetting: step %d was not measured with this gate threshold", step)
    return list(found.values())


def _texts(config: RunConfig, tokenizer, subject: Subject) -> list[Text]:
    """Held-out documents of every language; random tokens where there are none."""
    from moect.data.reading.evaluation import load_evaluation

    longest = min(TOKENS, subject.base.max_position_embeddings)
    vocab = subject.base.vocab_size + (subject.rows or {}).get("added_tokens", 0)
    texts = []
    try:
        held_out = replace(config.data, train=[])  # which may be gone
        for text in load_evaluation(held_out, Path(config.output) / ".cache"):
            for document in tokenise(tokenizer, text.documents[:TEXTS]):
                texts.append(Text(text.lang, torch.tensor([document.ids[:longest]])))
    except DataError as error:
        log.warning("%s; logits are compared on random tokens", error)
    texts = [text for text in texts if text.ids.numel()]
    if sum(text.ids.numel() for text in texts) < ENOUGH:
        texts += [random_text(vocab, min(64, longest), number) for number in range(4)]
    if any(subject.windowed) and (beyond := subject.base.sliding_window + 32) <= LONGEST:
        texts.append(random_text(vocab, min(beyond, subject.base.max_position_embeddings), 4))
    return texts


def _extras(folder: Path | None, tokenizer, subject: Subject) -> Extras:
    """Tokenizer, generation config and licence; the last two as they are in the base's folder, if it has one."""
    from transformers import GenerationConfig

    generation: object = GenerationConfig.from_model_config(subject.base)
    if folder is None:
        return Extras(tokenizer, generation)
    if (folder / "generation_config.json").is_file():
        generation = folder / "generation_config.json"
    named = ("LICENSE", "LICENCE", "NOTICE")  # many licences want themselves passed on
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.upper().startswith(named))
    return Extras(tokenizer, generation, tuple(files))
