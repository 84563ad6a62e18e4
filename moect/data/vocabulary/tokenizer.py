"""Tokenizers: load the base's, extend it, or train a small one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from moect.config import ModelConfig, RunConfig
from moect.data.reading.fingerprint import source_fingerprint
from moect.data.reading.sources import read_documents
from moect.data.vocabulary.extended_tokenizer import EXTENSION, extend_tokenizer, extension_of, head
from moect.data.vocabulary.fragmentation import fragmentation, fragmentation_table
from moect.data_config import Role
from moect.errors import DataError

log = logging.getLogger("moect.data")

BYTES = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
ORIGIN = "trained_on.json"
KEPT = "tokenizer"  # in a run's folder: the extended tokenizer
EXTENSION_VERSION = 2  # of what `extend_tokenizer` learns from a text
SAMPLE_BYTES = 1_000_000  # of each language, to compare tokenizers on
# what pre-tokenizers treat differently
PROBE = " It's 2026, naïve: 1,234.5  e\u0301 don't\r\n\n\tλόγος 中文 தமிழ் __init__(x)   \n"


def run_tokenizer(config: RunConfig):
    """The tokenizer of a run; with `model.train_tokenizer` it is trained on the run's corpora, with
    `model.extend_tokenizer` extended for their new languages, unless it is there. What goes on from a checkpoint, its
    own or that of `model.start`, has the tokenizer of that.

    Raises:
        DataError: as `load_tokenizer`, `read_documents` and `extend_tokenizer`; or the one that is there was trained on
            other sources. Whether the text of the same sources has changed is not looked at.
    """
    if config.model.train_tokenizer is not None:
        _train_once(config)
    if kept := _goes_on_with(config):
        return kept_tokenizer(config, kept)
    tokenizer = load_tokenizer(config.model)
    if config.model.extend_tokenizer is None:
        return tokenizer
    folder = _extension_folder(config, tokenizer)
    _extend_once(config, tokenizer, folder)
    return _load_extended(config, folder)


def find_tokenizer(config: RunConfig):
    """The tokenizer of a run if it is there; None if it is still to be trained or extended. Nothing is made.

    Raises:
        DataError: as `load_tokenizer`; or a source cannot be found.
    """
    if config.model.train_tokenizer is not None and not Path(os.path.expanduser(config.model.tokenizer)).exists():
        return None
    if kept := _goes_on_with(config):
        return kept_tokenizer(config, kept)
    tokenizer = load_tokenizer(config.model)
    if config.model.extend_tokenizer is None:
        return tokenizer
    folder = _extension_folder(config, tokenizer, online=False)
    return _load_extended(config, folder) if folder and folder.exists() else None


def keep_tokenizer(tokenizer, run_folder: Path) -> None:
    """Copy an extended tokenizer into a run's folder, where an export finds it without the corpora. One that is there
    from an attempt that ended before its first checkpoint gives way."""
    folder = Path(run_folder) / KEPT
    made = Path(tokenizer.name_or_path or "")
    if extension_of(tokenizer) is None or made == folder:
        return
    if folder.exists():
        if all(file.read_bytes() == _bytes(folder / file.name) for file in made.iterdir()):
            return
        shutil.rmtree(folder)
    with _beside(folder) as temporary:
        shutil.copytree(made, temporary, dirs_exist_ok=True)
        _rename(temporary, folder)


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _goes_on_with(config: RunConfig) -> Path | None:
    """The run's folder whose extended tokenizer this run goes on with: its own, or that of `model.start`."""
    if config.model.extend_tokenizer is None:
        return None
    begun = config.resume == "auto" and any((config.folder / "checkpoints").glob("step-*"))
    places = [config.folder] if begun else []
    if config.model.start:
        places.append(Path(config.model.start))
    return next((place for place in places if (place / KEPT / EXTENSION).is_file()), None)


def kept_tokenizer(config: RunConfig, run_folder: Path):
    """The tokenizer that a run was made with: the extended one in its folder, else as `load_tokenizer`.

    Raises:
        DataError: as `load_tokenizer`; or it was extended, and is not in the run's folder.
    """
    if config.model.extend_tokenizer is None:
        return load_tokenizer(config.model)
    folder = Path(run_folder) / KEPT
    if not (folder / EXTENSION).is_file():
        raise DataError(f"{folder}: the run's extended tokenizer is not there; resume the run, which writes it again")
    return _load_extended(config, folder)


def _load_extended(config: RunConfig, folder: Path):
    return load_tokenizer(replace(config.model, tokenizer=str(folder)))


def _extension_folder(config: RunConfig, tokenizer, online: bool = True) -> Path | None:
    """Where the cache has, or will have, the extended tokenizer: named after all that decides about it.

    None: a dataset's commit is not known, and `online` does not allow to ask.
    """
    cache = Path(config.output) / ".cache"
    sources = config.data.train
    parts = [source_fingerprint(source, config.data, tokenizer, cache, online) for source in sources]
    if None in parts:
        return None
    languages = [(source.lang, config.data.languages[source.lang]) for source in sources]
    whole = json.dumps([EXTENSION_VERSION, config.model.extend_tokenizer, languages, parts])
    return cache / "tokenizers" / hashlib.sha256(whole.encode("utf-8")).hexdigest()


def _extend_once(config: RunConfig, tokenizer, folder: Path) -> None:
    """Make the extended tokenizer, with a count of what it changes; written beside its place and renamed."""
    if folder.exists():
        return
    texts, old_texts = _texts(config, "new"), _texts(config, "old")
    log.info(
        "adding %d tokens to the tokenizer, learned from %s",
        config.model.extend_tokenizer,
        ", ".join(texts),
    )
    try:
        with _beside(folder) as temporary:
            extend_tokenizer(tokenizer, texts, config.model.extend_tokenizer, temporary, old_texts)
            counts = fragmentation(tokenizer, _load_extended(config, temporary), _samples(config))
            (temporary / "fragmentation.json").write_text(json.dumps(counts, indent=1), encoding="utf-8")
            _rename(temporary, folder)
    except OSError as error:
        raise DataError(f"{folder}: the tokenizer cannot be written ({error.strerror or error})") from error
    log.info("the tokenizer before and after:\n%s", fragmentation_table(counts))


def _texts(config: RunConfig, role: Role) -> dict[str, Iterator[str]]:
    """Text of the languages of a role in `data.train`; the sources of a language take turns."""
    by_language = {}
    for source in config.data.train:
        if config.data.languages[source.lang] == role:
            by_language.setdefault(source.lang, []).append(_read(config, source))
    return {language: take_turns(own) for language, own in by_language.items()}


def _samples(config: RunConfig) -> dict[str, Iterator[str]]:
    """The beginning of every language's text: held-out text where there is some."""
    by_language = {}
    held_out = config.data.evaluation if config.monitor.enabled else []
    for source in [*held_out, *config.data.train]:
        by_language.setdefault(source.lang, source)
    return {language: head(_read(config, source), SAMPLE_BYTES) for language, source in sorted(by_language.items())}


def _read(config: RunConfig, source) -> Iterator[str]:
    """The texts of a source; a prompt with its answer."""
    cache = Path(config.output) / ".cache"
    answer = getattr(source, "answer_field", None)
    for document in read_documents(source, config.data.root, config.data.max_bad_fraction, cache):
        yield document.text + (document.fields[answer] if answer else "")


def take_turns(texts: list[Iterable[str]]) -> Iterator[str]:
    """A text of each in turn, until all are used up."""
    running = [iter(own) for own in texts]
    nothing = object()
    while running:
        taken = [(own, next(own, nothing)) for own in running]
        yield from (text for _, text in taken if text is not nothing)
        running = [own for own, text in taken if text is not nothing]


def _train_once(config: RunConfig) -> None:
    """Train `model.tokenizer`, with a note of what on; written beside its place and renamed."""
    folder = Path(os.path.expanduser(config.model.tokenizer))
    sources = [{key: v for key, v in asdict(source).items() if key != "weight"} for source in config.data.train]
    origin = {"vocab_size": config.model.train_tokenizer, "sources": sources}
    if folder.exists():
        try:
            found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found != origin:
            raise DataError(
                f"{folder}: holds something other than a tokenizer of {config.model.train_tokenizer} tokens trained on "
                "this `data.train`; choose another folder as `model.tokenizer`, or remove `model.train_tokenizer` to "
                "take what is there"
            )
        return
    log.info("%s: training a tokenizer of %d tokens on data.train", folder, config.model.train_tokenizer)
    texts = (text for source in config.data.train for text in _read(config, source))
    try:
        with _beside(folder) as temporary:
            train_tokenizer(texts, config.model.train_tokenizer, temporary)
            (temporary / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
            os.rename(temporary, folder)
    except OSError as error:
        if (folder / ORIGIN).exists():  # another run was faster
            return _train_once(config)
        raise DataError(f"{folder}: the tokenizer cannot be written ({error.strerror or error})") from error


def _rename(temporary: Path, folder: Path) -> None:
    """Put a folder in its place, unless another run was faster with the same."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside a place, to be renamed into it; removed if it was not."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tokenizer(config: ModelConfig):
    """The run's tokenizer: `model.tokenizer`, else the base's own. A folder, a hub name, or a bare `tokenizer.json`.

    Raises:
        DataError: it cannot be loaded, or is not a fast tokenizer.
    """
    name = config.tokenizer or config.base
    path = Path(os.path.expanduser(name))
    if not path.exists() and name.startswith(("/", "./", "../", "~")):
        raise DataError(f"tokenizer {name}: there is no such file or folder; check `model.tokenizer` or `model.base`")
    if path.is_dir() and not any((path / file).is_file() for file in TOKENIZER_FILES):
        # for some families transformers would make an empty tokenizer instead of saying so
        raise DataError(
            f"tokenizer {name}: the folder holds none of {', '.join(TOKENIZER_FILES)}; set `model.tokenizer` to a "
            "Hugging Face tokenizer folder, a hub name or a tokenizer.json"
        )
    try:
        if path.is_file():
            return _load_file(path)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name,
            revision=None if config.tokenizer or path.is_dir() else config.revision,
            local_files_only=path.is_dir(),
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # whatever the libraries raise: it is about the files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"tokenizer {name}: cannot be loaded ({reason}); set `model.tokenizer` to a Hugging Face tokenizer folder, "
            "a hub name or a tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {name}: has no fast version; convert it to a tokenizer.json and set `model.tokenizer`"
        )
    return _as_in_its_file(tokenizer, path)


def _as_in_its_file(tokenizer, folder: Path):
    """The tokenizer as the folder's tokenizer.json describes it.

    transformers picks some classes by the model type in config.json; these put their own pre-tokenizer in its place.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    ids = Tokenizer.from_file(str(file)).encode(PROBE, add_special_tokens=False).ids
    if tokenizer(PROBE, add_special_tokens=False)["input_ids"] == ids:
        return tokenizer
    log.warning("%s: %s would give other tokens than the file; reading the file", file, type(tokenizer).__name__)
    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _load_file(path: Path):
    """A bare tokenizer.json does not say which tokens begin and end a text: take the usual names, and say so."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    bos = next((t for t in ("<s>", "<|endoftext|>") if t in special), None)
    eos = next((t for t in ("</s>", "<|endoftext|>") if t in special), None)
    tokenizer.add_special_tokens({k: v for k, v in (("bos_token", bos), ("eos_token", eos)) if v})
    log.info("%s: bare tokenizer file; documents begin with %s and end with %s", path, bos, eos)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path):
    """Train a byte-level BPE with `<s>`, `</s>` and `<pad>`, and save it as a Hugging Face tokenizer folder.

    Args:
        texts: what to learn merges from.
        vocab_size: the greatest number of tokens; there are fewer when `texts` hold no more pairs to merge.
        folder: made if need be.

    Returns:
        The tokenizer. `tokenizer(text)` begins with `<s>`, as the documents of training do.

    Raises:
        DataError: `vocab_size` has no room for the bytes and special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    if vocab_size < BYTES + len(special):
        raise DataError(
            f"a tokenizer of {vocab_size} tokens: bytes and special tokens alone are {BYTES + len(special)}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(str(folder))
    return tokenizer
