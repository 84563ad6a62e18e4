"""Write a trained model as a Hugging Face folder; it appears under its name when it is complete and verified."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

import moect
from moect import locks
from moect.errors import ExportError
from moect.export.bundle import bundle
from moect.export.proof.comparison import Comparison, Text, random_text
from moect.export.proof.verify import check_tensors, verify
from moect.export.shards import SHARD_BYTES, plan_shards, write_shards
from moect.export.targets.choice import choose
from moect.export.targets.form import Subject, Target
from moect.export.targets.own import Own
from moect.export.trained import TrainedModel, fold_rows, of_model
from moect.train.checkpoints.reading import values_digest

log = logging.getLogger("moect.export")
ORIGIN = "writing.json"  # in the folder being written: what it is of


@dataclass(frozen=True)
class Extras:
    """What goes beside the weights.

    Attributes:
        tokenizer: saved with them; None: none.
        generation_config: of transformers; or a file, which is copied as it is. None: none.
        files: copied under their names, the base's licence for one.
    """

    tokenizer: object = None
    generation_config: object = None
    files: tuple[Path, ...] = ()


def export_model(
    model: nn.Module, folder: Path, target: str = "auto", tokenizer=None, card: str = "", by_block: bool | None = None
) -> Comparison:
    """Write a model that is in memory, extended by `append_moe` or plain, and verify it.

    Args:
        model: a causal LM in evaluation mode; written in its dtype, with its generation config.
        folder: must not exist, or be empty.
        target: `auto`, or the name of an architecture (`moect.export.targets.choice`).
        tokenizer: saved with it; None: none.
        card: README.md.
        by_block: see `verify`.

    Returns:
        How its logits compare.

    Raises:
        ExportError: it exists, cannot be written, or what was written is not the model.
    """
    if model.training:
        raise ExportError("the model is in training mode: call model.eval() first")
    trained = of_model(model)
    chosen = choose(target, trained.subject)
    base = trained.subject.base
    texts = [random_text(model.config.vocab_size, min(64, base.max_position_embeddings), n) for n in range(4)]
    extras = Extras(tokenizer, model.generation_config)
    return write_folder(trained, chosen, Path(folder), texts, extras, lambda comparison: card, by_block=by_block)


def write_folder(
    trained: TrainedModel,
    target: Target,
    folder: Path,
    texts: list[Text],
    extras: Extras,
    card: Callable[[Comparison | None], str],
    origin: dict | None = None,
    most: int = SHARD_BYTES,
    proven: bool = True,
    by_block: bool | None = None,
    live: Callable[[], nn.Module] | None = None,
) -> Comparison | None:
    """Write a model, verify it, and give the folder its name.

    Args:
        trained: the model.
        target: what to write it as.
        folder: must not exist, or be empty.
        texts: to compare logits on.
        extras: what goes beside the weights.
        card: README.md, from what the comparison found.
        origin: plain values that decide about every tensor; an interrupted export of the same goes on. None: it
            starts anew.
        most: bytes of a file of weights.
        proven: compare logits too.
        by_block, live: see `verify`.

    Returns:
        How its logits compare; None where they were not compared.

    Raises:
        ExportError: it exists, cannot be written, or what was written is not the model.
    """
    folder = folder.resolve()
    check_free(folder)
    temporary = folder.parent / f".writing-{folder.name}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            check_free(folder)  # another may have written it meanwhile
            _begin(temporary, origin and {**origin, "target": target.name, "most": most, "moect": moect.__version__})
            written = trained if isinstance(target, Own) else fold_rows(trained)
            shards = plan_shards(target, written, most)
            write_shards(shards, written, temporary)
            _write_config(target, written.subject, extras, temporary)
            with _nothing_left(temporary):
                if proven:
                    comparison = verify(temporary, target, trained, written, shards, texts, by_block, live)
                else:
                    comparison = check_tensors(temporary, written, shards)
            (temporary / "README.md").write_text(card(comparison), encoding="utf-8")
            (temporary / ORIGIN).unlink()
            if folder.is_dir():
                folder.rmdir()
            os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    return comparison


def cannot_write(folder: Path, error: Exception) -> ExportError:
    """What is told of a disk that fails: a full one can be helped, and the work goes on."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    remedy = "free space and give the same command again, or choose" if full else "choose"
    return ExportError(f"{folder}: cannot be written: {error}; {remedy} another folder with --output")


def check_free(folder: Path) -> None:
    """Whether nothing is lost where a folder is written.

    Raises:
        ExportError: there is something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists: remove it, or choose another folder with --output")


@contextmanager
def _nothing_left(temporary: Path):
    """A folder that is not what it should be is not kept: nobody is to take it for an export."""
    try:
        yield
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class alone:
    """Nobody else writes this folder at the same time.

    Raises:
        ExportError: somebody does.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder.parent / f".writing-{folder.name}.lock"

    def __enter__(self):
        try:
            self.file = locks.acquire(self.path, 0)
            if os.fstat(self.file.fileno()).st_nlink == 0:  # whoever had it has removed it meanwhile
                raise locks.Held("another process")
        except locks.Held as error:
            raise ExportError(f"{self.folder}: {error} is writing it; wait, or choose another with --output") from error

    def __exit__(self, *_):
        self.path.unlink(missing_ok=True)
        self.file.close()


def _begin(temporary: Path, origin: dict | None) -> None:
    """Keep what an interrupted export of the same has written, else begin with an empty folder."""
    digest = values_digest(origin) if origin else None
    if origin and _digest_of(temporary) == digest:
        count = len(list(temporary.glob("*.safetensors")))
        log.info("%s: goes on with an export that was interrupted, %d files of weights are there", temporary, count)
        return
    if temporary.exists():
        log.info("%s: of another export that was interrupted; it is written anew", temporary)
        shutil.rmtree(temporary)
    temporary.mkdir()
    (temporary / ORIGIN).write_text(json.dumps({"sha256": digest}) + "\n", encoding="utf-8")


def _digest_of(temporary: Path) -> str | None:
    try:
        return json.loads((temporary / ORIGIN).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_config(target: Target, subject: Subject, extras: Extras, folder: Path) -> None:
    config = target.config(subject)
    config.dtype = subject.base.dtype
    config.save_pretrained(folder)
    if isinstance(target, Own):
        (folder / "modeling_moect.py").write_text(bundle(), encoding="utf-8")
    if extras.tokenizer is not None:
        extras.tokenizer.save_pretrained(folder)
    if isinstance(extras.generation_config, Path):
        shutil.copyfile(extras.generation_config, folder / "generation_config.json")
    elif extras.generation_config is not None:
        extras.generation_config.to_json_file(folder / "generation_config.json")
    for path in extras.files:
        shutil.copyfile(path, folder / path.name)
