"""`moect prepare`: the report against plain counting, and that training has nothing left to tokenize."""

import json
import re
import tempfile

import pytest
import yaml
from data_helpers import Words, run_config, write_corpus

from moect.bench import data as bench
from moect.cli import main
from moect.data.reading.numbers import write_numbers
from moect.data.tokens.prepare import prepare, render
from moect.data.vocabulary.tokenizer import run_tokenizer, train_tokenizer
from moect.locks import locked
from moect.stages import load_stages


def test_the_report_says_what_plain_counting_says(tmp_path):
    languages = {"en": "old", "te": "new", "is": "new"}
    write_numbers(tmp_path / "numbers", languages, train_numbers=200, test_numbers=10)
    texts = {
        lang: [json.loads(x)["text"] for x in (tmp_path / "numbers" / "train" / f"{lang}.jsonl").open()]
        for lang in languages
    }
    tokenizer = train_tokenizer(texts["en"] + texts["is"], 400, tmp_path / "tokenizer")
    files = [{"path": f"numbers/train/{lang}.jsonl", "lang": lang} for lang in languages]
    halves = [{"path": "half.jsonl", "lang": "te"}]
    (tmp_path / "half.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts["te"][:100]) + "no json\n"
    )
    config = run_config(tmp_path, languages=languages, sources=files + halves)
    config.output, config.data.max_bad_fraction = str(tmp_path / "out"), 0.1
    result = prepare(config, tokenizer, workers=1)
    texts["te"] += texts["te"][:100]
    piece = {i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])}
    for record in result["languages"]:
        lang = record["lang"]
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[lang]]
        tokens = sum(map(len, ids)) + 2 * len(ids)  # each has a beginning and an end
        assert (record["documents"], record["tokens"]) == (len(ids), tokens)
        assert record["bytes"] == sum(len(t.encode()) for t in texts[lang])
        assert record["bytes_per_token"] == pytest.approx(record["bytes"] / tokens)
        assert record["piece_share"] == pytest.approx(sum(i in piece for row in ids for i in row) / tokens)
        if lang != "te":  # whose vowel signs are no letters to `re`
            sample = range(0, 200, 16)
            words = sum(len(re.findall(r"\w+", texts[lang][d])) for d in sample)
            assert record["tokens_per_word"] == pytest.approx(sum(len(ids[d]) for d in sample) / words)
        english = result["languages"][0]["tokens_per_word"]
        assert record["against_english"] == pytest.approx(record["tokens_per_word"] / english)
    by_lang = {record["lang"]: record for record in result["languages"]}
    assert by_lang["te"]["piece_share"] > 0.5 > by_lang["is"]["piece_share"]  # its letters were not in the vocabulary
    assert by_lang["te"]["against_english"] > 2 * by_lang["is"]["against_english"]
    assert by_lang["te"]["faults"] == {"malformed JSON": 1} and by_lang["te"]["bad"] == 1
    assert [source["documents"] for source in result["sources"]] == [200, 200, 200, 100]
    assert by_lang["te"]["bad_examples"][0].endswith("half.jsonl:101: malformed JSON (Expecting value, column 1)")
    assert f"bad: {tmp_path}/half.jsonl:101: malformed JSON" in render(result)
    table = render(result).splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["en", "te", "is"] and len({len(x) for x in table[:1]}) == 1


def test_without_english_nothing_is_compared_with_it(tmp_path):
    write_corpus(tmp_path / "old.jsonl", 20, seed=1)
    config = run_config(tmp_path, languages={"de": "old"}, sources=[{"path": "old.jsonl", "lang": "de"}])
    config.output = str(tmp_path / "out")
    (record,) = prepare(config, Words())["languages"]
    assert record["against_english"] is None and record["tokens_per_word"] == 1.0


def test_unfinished_entries_of_other_texts_are_told(tmp_path):
    write_corpus(tmp_path / "old.jsonl", 20, seed=1)
    config = run_config(tmp_path, sources=[{"path": "old.jsonl", "lang": "en"}])
    config.output = str(tmp_path / "out")
    left = tmp_path / "out" / ".cache" / "0123.unfinished"
    left.mkdir(parents=True)
    (left / "tokens.npy").write_bytes(b"x" * 1_500_000)
    lock = left.parent / "locks" / "0123"
    lock.parent.mkdir()
    with locked(lock):  # somebody is at it
        assert prepare(config, Words())["leftovers"] is None
    result = prepare(config, Words())
    assert result["leftovers"]["entries"] == 1
    assert f"1 unfinished entries of other texts or settings, 2 MB, lie in {left.parent}" in render(result)


def test_the_command_prepares_all_stages_so_that_their_training_tokenizes_nothing(tmp_path, capsys, tokenized):
    write_numbers(tmp_path / "numbers", {"en": "old", "cy": "new"}, train_numbers=60, test_numbers=5)
    shape = {"model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    base = {"tokenizer": str(tmp_path / "tokenizer"), "train_tokenizer": 300, "from_config": shape}
    sources = [{"path": f"train/{lang}.jsonl", "lang": lang} for lang in ("en", "cy")]
    values = {
        "name": "two",
        "output": str(tmp_path / "runs"),
        "data": {
            "root": str(tmp_path / "numbers"),
            "languages": {"en": "old", "cy": "new"},
            "evaluation": [{"path": "test/en.jsonl", "lang": "en", "answer_field": "answer"}],
            "sequence_length": 16,
        },
        "train": {"steps": 2, "batch_size": 4, "micro_batch": 2},
        "stages": [
            {"name": "base", "method": "full", "model": base, "data": {"train": sources[:1]}},
            {"name": "extend", "model": {"base": "stage:base"}, "data": {"train": sources}},
        ],
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert main(["prepare", "--config", str(path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "stage base" in out and "stage extend" in out and out.count("wrote ") == 2
    report = json.loads((tmp_path / "runs" / "two" / "extend-data" / "prepare.json").read_text())
    assert [record["lang"] for record in report["languages"]] == ["en", "cy"]
    assert tokenized.total() == 120  # English once
    assert main(["prepare", "--config", str(path)]) == 0 and tokenized.total() == 120
    assert len(run_tokenizer(load_stages(path)[0])) == 300
    assert not (tmp_path / "runs" / "two" / "base").exists()  # no run is begun


def test_a_source_that_is_missing_is_one_line_before_anything_is_tokenized(tmp_path, capsys, tokenized):
    write_corpus(tmp_path / "old.jsonl", 20, seed=1)
    sources = [{"path": "old.jsonl", "lang": "en"}, {"path": "gone.jsonl", "lang": "en"}]
    data = {"root": str(tmp_path), "languages": {"en": "old"}, "train": sources}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"base": str(tmp_path)}, "data": data}))
    assert main(["prepare", "--config", str(tmp_path / "c.yaml"), f"output={tmp_path}/runs"]) == 2
    error = capsys.readouterr().err
    assert "gone.jsonl: no file matches" in error and error.count("\n") == 1 and not tokenized


def test_the_benchmark_measures_both_in_turns_and_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SENTENCES", 60)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "false" if name.startswith("T") else "1")
    out = tmp_path / "data.json"
    assert main(["bench", "data", "--megabytes", "0.05", "--rounds", "2", "--workers", "1", "--output", str(out)]) == 0
    result = json.loads(out.read_text())
    rates = result["bytes_per_second"]
    assert {name: len(values) for name, values in rates.items()} == {bench.LIBRARY: 2, bench.STORE: 2}
    assert result["bytes"] >= 50_000 and min(map(min, rates.values())) > 0 and result["peak_memory_bytes"] > 2**20
    printed = capsys.readouterr().out
    assert "round 2 of 2" in printed and f"{result['share']:.2f}" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
