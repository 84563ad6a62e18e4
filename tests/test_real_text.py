"""The whole path on real text in seven languages: nothing of the quick start is special."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moect  # noqa: F401  (registers the exported class)
from moect.config import load_config
from moect.data.tokenizer import train_tokenizer
from moect.export.merged import export_run
from moect.model.build import load_base
from moect.monitor.rows import read_rows
from moect.train.loop import train

ROOT = Path(__file__).resolve().parent.parent
TEXT = Path(os.environ.get("MOECT_DATA", ROOT.parent / "shared" / "data"))
LANGUAGES = {"en": "old", "de": "old", "zh": "old", "sw": "new", "eu": "new", "is": "new", "ta": "new"}

pytestmark = pytest.mark.skipif(
    not (TEXT / "corpus" / "web").is_dir(), reason="needs real text: set MOECT_DATA to a folder with corpus/web"
)


def lines(lang, count):
    with gzip.open(TEXT / "corpus" / "web" / f"{lang}.train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in itertools.islice(file, count)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base on all seven languages, and the same extended on real text; both as the shipped configs say, but small."""
    folder = tmp_path_factory.mktemp("real")
    train_tokenizer(itertools.chain(*(lines(lang, 40) for lang in LANGUAGES)), 1024, folder / "tokenizer")
    small = [
        f"output={folder}",
        f"data.root={TEXT}",
        "data.sequence_length=128",
        "train.batch_size=16",
        "train.micro_batch=16",
        "train.warmup=2",
        "train.log_every=10",
    ]
    base = load_config(
        ROOT / "configs" / "real-small-base.yaml",
        [
            *small,
            "name=base",
            f"model.tokenizer={folder}/tokenizer",
            "model.from_config.vocab_size=1024",
            "model.from_config.hidden_size=64",
            "model.from_config.intermediate_size=128",
            "model.from_config.num_hidden_layers=3",
            "train.steps=40",
            "train.save_every=40",
        ],
    )
    extended = load_config(
        ROOT / "configs" / "real-small.yaml",
        [
            *small,
            "name=extended",
            f"model.base={folder}/base/export",
            "moe.language_gate=false",  # so few steps do not train a gate
            "train.lr=0.01",
            "train.steps=80",
            "train.save_every=40",
        ],
    )
    for config in (base, extended):
        for source in config.data.train + config.data.evaluation:
            source.limit = 200 if source in config.data.train else 8
    train(base)
    export_run(base.folder)
    train(extended)
    return base, extended


def test_new_languages_are_learned_on_real_text(runs):
    rows = {(r["lang"], r["domain"]): r for r in read_rows(runs[1].folder / "monitor") if r["step"] == 80}
    assert {lang for lang, _ in rows} == set(LANGUAGES)
    assert all(r["role"] == LANGUAGES[r["lang"]] for r in rows.values())
    new = [r for r in rows.values() if r["role"] == "new" and r["domain"] == "web"]
    assert sum(r["delta"] for r in new) / len(new) < -0.01


def test_the_scored_bytes_are_those_of_the_text(runs):
    row = next(r for r in read_rows(runs[1].folder / "monitor") if (r["lang"], r["domain"]) == ("ta", "web"))
    with gzip.open(TEXT / "corpus" / "web" / "ta.test.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 8)]
    assert row["bytes"] == sum(len(text.encode("utf-8")) for text in texts)


def test_the_export_of_a_real_run_is_its_base_with_the_module_off(runs):
    base, extended = runs
    path = export_run(extended.folder)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    original = load_base(extended.model, torch.float32)
    for loaded in (model, original):  # loaded tensors may lie unaligned, and kernels then round differently
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        expected = original(ids, use_cache=False).logits
        assert not torch.equal(model(ids, use_cache=False).logits, expected)
        with model.base_only():
            assert torch.equal(model(ids, use_cache=False).logits, expected)
