"""Text written by a model, for `data.train` where there is no text of its old languages: what it says is what it knows.

A document begins where the model's own training had documents begin, and each token is drawn from its distribution.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moect.config import ModelConfig
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.errors import ConfigError
from moect.locks import locked
from moect.model.build import load_base
from moect.progress import Progress

log = logging.getLogger("moect")


@dataclass(frozen=True)
class SampleOptions:
    """How text is drawn.

    Attributes:
        documents: how many.
        tokens: of a document, at most.
        batch: documents drawn side by side; with another size others come out.
        temperature: by which logits are divided; below 1 the text is more usual than what the model knows.
        seed: of all of it.
    """

    documents: int
    tokens: int = 256
    batch: int = 16
    temperature: float = 1.0
    seed: int = 0


def sample(base: str, lang: str, output: Path, options: SampleOptions) -> int:
    """Write documents that a model wrote as JSON lines of `text`, `lang`, `source`; interrupted, it goes on.

    Args:
        base: folder or hub name of a causal LM.
        lang: what to call the language; the model chooses the languages, by what it was trained on.
        output: the file; it appears when it is complete.
        options: how many, and how.

    Returns:
        Documents; those without text are left out.

    Raises:
        ConfigError: the file exists or cannot be written, or the model cannot be loaded or has no token that begins a
            document.
    """
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output}: exists; give another --output, or move it away")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.absolute().parent}; make it first")
    config = ModelConfig(base=base)
    tokenizer = load_tokenizer(config)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise ConfigError(f"{base}: its tokenizer has no token that begins or ends a document, so none can be begun")
    from transformers import GenerationConfig

    model = load_base(config, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config = GenerationConfig()  # the model's own may favour some tokens
    part = output.with_name(f".{output.name}.part")
    values = {"base": base, "lang": lang, **vars(options), "device": model.device.type}
    lock = output.with_name(f".{output.name}.lock")
    try:
        with locked(lock, lambda: log.info("%s: another process writes it", output)):
            if output.exists():  # it has, while this one waited
                raise ConfigError(f"{output}: exists; give another --output, or move it away")
            written = _write(model, tokenizer, begin, part, output, values, options)
            lock.unlink()
            return written
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}; give another --output") from error


def _write(model, tokenizer, begin: int, part: Path, output: Path, values: dict, options: SampleOptions) -> int:
    done = _take_up(part, values)
    progress = Progress("sampling", options.documents, min(done * options.batch, options.documents), "documents")
    with part.open("a", encoding="utf-8") as file:
        for texts in _batches(model, tokenizer, begin, options, done):
            file.write(json.dumps(texts, ensure_ascii=False) + "\n")
            file.flush()
            progress.add(len(texts))
    progress.end()
    with part.open(encoding="utf-8") as file:
        written = [text for line in file.readlines()[1:] for text in json.loads(line) if text.strip()]
    whole = part.with_suffix(".whole")
    with whole.open("w", encoding="utf-8") as file:
        for text in written:
            document = {"text": text, "lang": values["lang"], "source": values["base"]}
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    os.link(whole, output)  # unlike a rename, not over a file that has come to be
    whole.unlink()
    part.unlink()
    return len(written)


def _take_up(part: Path, values: dict) -> int:
    """How many batches an interrupted run of the same command has written; a line cut short is none."""
    lines = part.read_bytes().splitlines(keepends=True) if part.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    first = (json.dumps(values) + "\n").encode()
    if whole and whole[0] != first:
        raise ConfigError(
            f"{part}: was begun by another command, or on another device; remove it, or give another --output"
        )
    whole = whole or [first]
    part.write_bytes(b"".join(whole))
    return len(whole) - 1


@torch.no_grad()
def _batches(model: nn.Module, tokenizer, begin: int, options: SampleOptions, done: int) -> Iterator[list[str]]:
    """The documents of each batch after the first `done`; each batch has a seed of its own."""
    end = tokenizer.eos_token_id
    for number in range(done, -(-options.documents // options.batch)):
        rows = min(options.batch, options.documents - number * options.batch)
        torch.manual_seed(options.seed * 1_000_003 + number)
        ids_BS = model.generate(
            input_ids=torch.full((rows, 1), begin, device=model.device),
            attention_mask=torch.ones((rows, 1), dtype=torch.int64, device=model.device),
            max_new_tokens=options.tokens,
            do_sample=True,
            temperature=options.temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=end,
            pad_token_id=begin if end is None else end,
        )
        yield tokenizer.batch_decode(ids_BS[:, 1:], skip_special_tokens=True)
