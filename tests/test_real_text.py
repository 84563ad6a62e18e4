"""The whole path on real text in seven languages: nothing of the quick start is special."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from export_helpers import export_run
from transformers import AutoModelForCausalLM

import moect  # noqa: F401  (registers the exported class)
from moect.model.build import load_base
from moect.monitor.rows import read_rows
from moect.stages import load_stages, run_stages

ROOT = Path(__file__).resolve().parent.parent
TEXT = Path(os.environ.get("MOECT_DATA", ROOT.parent / "shared" / "data"))
LANGUAGES = {"en": "old", "de": "old", "zh": "old", "sw": "new", "eu": "new", "is": "new", "ta": "new"}

pytestmark = pytest.mark.skipif(
    not (TEXT / "corpus" / "web").is_dir(), reason="needs real text: set MOECT_DATA to a folder with corpus/web"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base on all seven languages, and the same extended on real text: the shipped configuration, but small."""
    folder = tmp_path_factory.mktemp("real")
    shape = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    small = [
        f"output={folder}",
        f"data.root={TEXT}",
        "data.sequence_length=128",
        "train.batch_size=16",
        "train.micro_batch=16",
        "train.precision=fp32",
        "train.warmup=2",
        "train.log_every=10",
        f"stages.base.model.tokenizer={folder}/tokenizer",
        "stages.base.model.train_tokenizer=1024",
        *(f"stages.base.model.from_config.{key}={value}" for key, value in shape.items()),
        "stages.base.train.steps=40",
        "stages.base.train.save_every=40",
        "stages.extend.gate.max_touched_old_documents=null",
        "stages.extend.moe.width=null",
        "stages.extend.train.lr=0.01",
        "stages.extend.train.steps=80",
        "stages.extend.train.save_every=40",
    ]
    stages = load_stages(ROOT / "configs" / "real-small.yaml", small)
    for config in stages:
        for source in config.data.train + config.data.evaluation:
            source.limit = min(source.limit or 200, 200 if source in config.data.train else 8)
    run_stages(stages)
    return stages


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
    _, extended = runs
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
