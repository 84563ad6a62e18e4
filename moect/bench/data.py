"""`moect bench data`: reading, tokenizing and storing a corpus, beside the tokenizers library alone, in turns.

What the library is timed on lies in memory already, and what it makes is thrown away: on as many threads as we have
processes it is the floor. Ours reads a file of JSON lines and leaves a store; the start of its processes counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from moect.bench.machine import machine, versions
from moect.bench.result_file import result_file
from moect.data.reading.numbers import LANGUAGES, number_in_words
from moect.data.reading.sources import read_documents
from moect.data_config import DataConfig, SourceConfig
from moect.errors import ConfigError
from moect.tables import aligned

LIBRARY, STORE = "tokenizers alone", "prepare (moect)"
IN_MEMORY = 64  # megabytes of text that the library is timed on at most
BATCH = 1000  # documents that it takes at once
POLL = 0.05  # seconds between two looks at the memory
SENTENCES = 4000  # of a language, from which text is made


@dataclass
class Options:
    """What to measure.

    Attributes:
        text: files of documents; None: text is made of numbers in words.
        tokenizer: folder or tokenizer.json; None: a small one is trained on that text.
        megabytes: of text, repeated as often as need be.
        workers: our processes, and the library's threads.
        rounds: of each contestant.
    """

    text: str | None
    tokenizer: str | None
    megabytes: float
    workers: int
    rounds: int
    seed: int
    output: Path | None


def run(options: Options) -> dict:
    """Measure, print the table, and return plain values.

    Raises:
        ConfigError, DataError: text or tokenizer that cannot be read; an output that is there already.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)  # before the library's first batch in this process
    with result_file(options.output) as write, tempfile.TemporaryDirectory(prefix="moect-bench-") as folder:
        corpus, tokenizer_path = _make_inputs(options, Path(folder))
        texts = [json.loads(line)["text"] for line in _first_lines(corpus, IN_MEMORY * 1e6)]
        in_memory = sum(len(text.encode("utf-8")) for text in texts)
        whole = sum(len(json.loads(line)["text"].encode("utf-8")) for line in _first_lines(corpus, float("inf")))
        print(
            f"{whole / 1e6:,.1f} MB of text, {options.workers} processes or threads, {options.rounds} rounds in turns; "
            f"the library is timed on the first {in_memory / 1e6:,.1f} MB",
            flush=True,
        )
        rates: dict[str, list[float]] = {LIBRARY: [], STORE: []}
        memory = []
        draw = random.Random(options.seed)
        for number in range(options.rounds):
            for name in draw.sample([LIBRARY, STORE], 2):
                if name == LIBRARY:
                    rates[name].append(in_memory / _library_seconds(tokenizer_path, texts))
                else:
                    seconds, peak = _store_seconds(corpus, tokenizer_path, options.workers, Path(folder) / "cache")
                    rates[name].append(whole / seconds)
                    memory.append(peak)
            print(f"round {number + 1} of {options.rounds}", flush=True)
        result = {
            "versions": versions(),
            "machine": machine("cpu"),
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            "bytes": whole,
            "bytes_per_second": rates,
            "share": median(rates[STORE]) / median(rates[LIBRARY]),
            "peak_memory_bytes": max(memory),
        }
        write(result)
    print(f"\n{render(result)}")
    return result


def render(result: dict) -> str:
    """A line a contestant; medians."""
    rows = []
    for name, rates in result["bytes_per_second"].items():
        ours = name == STORE
        rows.append(
            [
                name,
                f"{median(rates) / 1e6:.2f}",
                f"{min(rates) / 1e6:.2f}-{max(rates) / 1e6:.2f}",
                f"{result['share']:.2f}" if ours else "1.00",
                f"{result['peak_memory_bytes'] / 2**20:,.0f}" if ours else "",
            ]
        )
    return aligned(["", "MB/s", "from-to", f"x {LIBRARY}", "peak MiB of all processes"], rows)


def _make_inputs(options: Options, folder: Path) -> tuple[Path, Path]:
    """A file of JSON lines with so many megabytes of text, and a tokenizer's folder."""
    from moect.config import ModelConfig
    from moect.data.vocabulary.tokenizer import load_tokenizer, train_tokenizer

    documents = _given(options.text) if options.text else _made(options.seed)
    if options.tokenizer:
        tokenizer = load_tokenizer(ModelConfig(base=None, tokenizer=options.tokenizer))
        tokenizer.save_pretrained(str(folder / "tokenizer"))
    else:
        train_tokenizer(documents[:SENTENCES], 8192, folder / "tokenizer")
    corpus = folder / "corpus.jsonl"
    written = 0.0
    with corpus.open("w", encoding="utf-8") as file:
        while written < options.megabytes * 1e6:
            for text in documents:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode("utf-8"))
                if written >= options.megabytes * 1e6:
                    break
    return corpus, folder / "tokenizer"


def _given(path: str) -> list[str]:
    """Documents of files, in an order that mixes them."""
    source = SourceConfig(path=str(Path(path).absolute()), lang="any")
    data = DataConfig()
    texts, size = [], 0
    for document in read_documents(source, data.root, data.max_bad_fraction):
        texts.append(document.text)
        size += len(document.text)
        if size >= IN_MEMORY * 1e6:
            break
    random.Random(0).shuffle(texts)
    return texts


def _made(seed: int) -> list[str]:
    """Documents of numbers in words, of several languages, from one sentence to sixty."""
    draw = random.Random(seed)
    documents = []
    for lang in LANGUAGES:
        words = [number_in_words(draw.randrange(10**6), lang) for _ in range(SENTENCES)]
        words = [w for w in words if w]
        for _ in range(SENTENCES if words else 0):
            documents.append(", ".join(draw.choices(words, k=draw.randint(1, 60))))
    draw.shuffle(documents)
    if not documents:
        raise ConfigError("num2words gives no words in any language; give --text")
    return documents


def _first_lines(corpus: Path, size: float) -> Iterator[str]:
    read = 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            yield line
            read += len(line.encode("utf-8"))
            if read >= size:
                return


def _library_seconds(tokenizer: Path, texts: list[str]) -> float:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    began = time.perf_counter()
    for start in range(0, len(texts), BATCH):
        backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
    return time.perf_counter() - began


def _store_seconds(corpus: Path, tokenizer: Path, workers: int, cache: Path) -> tuple[float, int]:
    """Seconds, and the greatest sum of resident memory of the process that makes the store and its workers."""
    import psutil

    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_make_store, args=(theirs, corpus, tokenizer, workers, cache))
    process.start()
    mine.recv()  # what it needs is imported
    root = psutil.Process(process.pid)

    def used() -> int:
        total = 0
        for one in [root, *root.children(recursive=True)]:
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    peak, ended = used(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(POLL):
            peak = max(peak, used())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        mine.send("go")
        seconds = mine.recv()
    finally:
        ended.set()
        watcher.join()
        process.join()
        shutil.rmtree(cache, ignore_errors=True)
    return seconds, peak


def _make_store(pipe, corpus: Path, tokenizer: Path, workers: int, cache: Path) -> None:
    """In a process of its own, as `moect prepare` is."""
    from transformers import PreTrainedTokenizerFast

    from moect.data.tokens.store import build_store

    loaded = PreTrainedTokenizerFast.from_pretrained(str(tokenizer), local_files_only=True)
    source = SourceConfig(path=str(corpus), lang="any")
    pipe.send("ready")
    pipe.recv()
    began = time.perf_counter()
    build_store(source, DataConfig(), loaded, cache, workers)
    pipe.send(time.perf_counter() - began)
