"""Text drawn from a model: from its own distribution, and the same whether interrupted or not."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from small_runs import figures
from tiny import logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from moect.cli import main
from moect.errors import ConfigError
from moect.sample import SampleOptions, sample
from moect.train.loop import train


@pytest.fixture
def base(place) -> str:
    return str(place.inputs / "base")


def test_documents_follow_the_model_s_distribution(base, tmp_path):
    """The first token of 4,000 documents, by its probability after the token that begins one."""
    assert sample(base, "en", tmp_path / "old.jsonl", SampleOptions(4000, tokens=1, batch=500)) <= 4000
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    p_V = logits(model, torch.tensor([[begin]]))[0, -1].double().softmax(-1)
    drawn = Counter(json.loads(line)["text"] for line in (tmp_path / "old.jsonl").read_text().splitlines())
    expected = Counter()
    for token, p in enumerate(p_V.tolist()):
        expected[tokenizer.decode([token], skip_special_tokens=True)] += 4000 * p
    texts = [text for text in expected if text.strip()]
    assert set(drawn) <= set(texts)
    # chi-square: its mean is the number of texts less one, its deviation the root of twice that
    square = sum((drawn[text] - expected[text]) ** 2 / expected[text] for text in texts)
    assert square < len(texts) + 5 * (2 * len(texts)) ** 0.5


def test_an_interrupted_command_goes_on_to_the_same_text(base, tmp_path, monkeypatch):
    options = SampleOptions(10, tokens=6, batch=3, seed=4)
    sample(base, "en", tmp_path / "whole.jsonl", options)
    original, calls = torch.manual_seed, []

    def fails_in_the_third(seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(seed)

    monkeypatch.setattr(torch, "manual_seed", fails_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        sample(base, "en", tmp_path / "again.jsonl", options)
    monkeypatch.undo()
    part = tmp_path / ".again.jsonl.part"
    part.write_bytes(part.read_bytes() + b'["cut sho')
    with pytest.raises(ConfigError, match="begun by another command"):
        sample(base, "en", tmp_path / "again.jsonl", SampleOptions(10, tokens=7, batch=3, seed=4))
    assert sample(base, "en", tmp_path / "again.jsonl", options) == 10
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".again*"))


def test_a_run_replays_what_its_base_wrote(base, place, capsys):
    path = place.output / "old.jsonl"
    command = ["sample", base, "--documents", "80", "--tokens", "16", "--output", str(path), "--lang", "en"]
    assert main(command) == 0 and "79 documents, 1 without text left out" in capsys.readouterr().out
    assert main(command) == 2 and f"{path}: exists" in capsys.readouterr().err
    values = place.values()["data"]["train"]
    own = {"train": [{"path": str(path), "lang": "en"}, values[1]]}
    folder = train(place.config(data=own, loss={"base_kl": 1.0}, train={"steps": 4}))
    last = figures(folder)[4]
    assert last["base_kl"] > 0 and last["old_share"] == pytest.approx(0.25, abs=0.15)
