"""Extended tokenizers against plain Python, against the base's own tokenizer, and as a run makes them."""

import functools
import gzip
import itertools
import json
import logging
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizer_bases import FORMS, NEW, OLD, ON_BYTES, SlowTokenizer, make_base, spec_of, write_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moect.config import ModelConfig, config_from_dict
from moect.data.vocabulary import kept_pairs
from moect.data.vocabulary.continued_bpe import continue_bpe
from moect.data.vocabulary.extended_tokenizer import extend_tokenizer, extension_of
from moect.data.vocabulary.fragmentation import fragmentation, fragmentation_table
from moect.data.vocabulary.tokenizer import (
    find_tokenizer,
    keep_tokenizer,
    kept_tokenizer,
    load_tokenizer,
    run_tokenizer,
)
from moect.errors import DataError

ADDED = ("<s>", "</s>", "<|end|>", "    ", "<think>")
SHARED = Path(os.environ.get("MOECT_DATA", "nowhere"))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def in_old_ids(tokenizer, text):
    """The ids of a text with every new token replaced by its pieces."""
    extension = extension_of(tokenizer)
    pieces = lambda i: extension.pieces[i - extension.first_id] if i >= extension.first_id else [i]  # noqa: E731
    return [old for i in ids(tokenizer, text) for old in pieces(i)]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """form -> base and extended tokenizer."""

    @functools.cache
    def make(form):
        base = make_base(form, write_text(OLD, 100))
        folder = tmp_path_factory.mktemp(form)
        extend_tokenizer(base, {"new": write_text(NEW, 100, seed=1)}, 100, folder)
        return base, AutoTokenizer.from_pretrained(folder)

    return make


HELD_OUT = write_text(NEW, 12, seed=1) + write_text(OLD, 12, seed=0) + write_text(OLD + NEW, 12, seed=7)


@pytest.mark.parametrize("form", FORMS)
def test_extended_tokenizer_cuts_as_bpe_in_plain_python_does(extended, form):
    base, after = extended(form)
    for tokenizer in (base, after):  # the twin itself is held to the base
        slow = SlowTokenizer(tokenizer)
        for text in HELD_OUT:
            assert ids(tokenizer, text) == slow.ids(text)


@pytest.mark.parametrize("form", FORMS)
def test_new_tokens_only_join_the_old_tokens_of_a_text(extended, form):
    base, after = extended(form)
    assert len(after) == len(base) + 100
    joined = 0
    for text in HELD_OUT:
        assert in_old_ids(after, text) == ids(base, text)
        joined += len(ids(base, text)) - len(ids(after, text))
    assert joined > 0


@pytest.mark.parametrize("form", FORMS)
def test_old_text_stays_cut_as_it_is_although_new_text_is_full_of_its_words(tmp_path, form):
    base = make_base(form, write_text(OLD, 100))
    # words of the old language, some with endings of their own, and letters that it has as well
    mixed = [
        f"{old} {new}{old}" for old, new in zip(write_text(OLD, 80, seed=2), write_text(NEW, 80, seed=3), strict=True)
    ]
    old = write_text(OLD, 100, seed=5)
    new = {"new": mixed + write_text(NEW, 60, seed=1)}
    extend_tokenizer(base, new, 150, tmp_path / "free")
    extend_tokenizer(base, new, 150, tmp_path / "kept", {"old": old})
    free, kept = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("free", "kept"))
    assert any(ids(free, text) != ids(base, text) for text in old)
    assert [ids(kept, text) for text in old] == [ids(base, text) for text in old]
    fewer = sum(len(ids(base, text)) - len(ids(kept, text)) for text in write_text(NEW, 60, seed=9))
    assert fewer > 0 and extension_of(kept).pieces


def test_pairs_are_those_of_counting_in_plain_python(tmp_path, monkeypatch):
    base = make_base(FORMS[0], write_text(OLD, 100))
    texts = write_text(OLD, 40, seed=5)
    encodings = base.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    seen = Counter()
    for e in encodings:
        seen.update((a, b) for a, b, v, w in zip(e.ids, e.ids[1:], e.word_ids, e.word_ids[1:], strict=False) if v == w)
    monkeypatch.setattr(kept_pairs, "AT_ONCE", 50)  # counted many times
    for share in (0.0, 0.005):
        monkeypatch.setattr(kept_pairs, "SHARE", share)
        kept = kept_pairs.KeptPairs(len(base))
        kept.add(encodings)
        kept.finish()
        frequent = {pair for pair, n in seen.items() if n > share * sum(len(e.ids) for e in encodings)}
        assert frequent and (share == 0 or len(frequent) < len(seen))
        for a, b in itertools.product(range(len(base)), repeat=2):
            if (a + b) % 7 == 0 or (a, b) in seen:
                assert kept.between(np.array([a, b])).tolist() == [(a, b) in frequent]


@pytest.mark.parametrize("form", FORMS)
def test_old_ids_added_tokens_and_decoding_stay(extended, form):
    base, after = extended(form)
    assert base.get_vocab().items() <= after.get_vocab().items()
    for text in [*HELD_OUT, "kwe<|end|>nya    <think>mba</s> x"]:
        assert after.decode(ids(after, text)) == base.decode(ids(base, text))
    mixed = "".join(f"kwe{token}" for token in ADDED)
    assert [i for i in ids(after, mixed) if i in after.added_tokens_decoder] == [
        base.convert_tokens_to_ids(token) for token in ADDED
    ]
    assert after("x")["input_ids"][0] == base("x")["input_ids"][0] == base.bos_token_id


@pytest.mark.parametrize("form", FORMS)
def test_library_and_transformers_read_the_same_tokenizer_from_the_folder(extended, form, tmp_path):
    _, after = extended(form)
    bare = Tokenizer.from_file(f"{after.name_or_path}/tokenizer.json")
    after.save_pretrained(tmp_path)  # as an export does
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in HELD_OUT:
        assert bare.encode(text).ids == after(text)["input_ids"] == again(text)["input_ids"]
    assert extension_of(again) is None  # whose tokens are new there is nothing that the folder says


def test_a_family_s_own_class_gives_way_to_the_file(tmp_path):
    base = make_base("metaspace", write_text(OLD, 60))
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    base = load_tokenizer(ModelConfig(base=str(tmp_path / "base")))
    assert type(base).__name__ == "LlamaTokenizer"
    extend_tokenizer(base, {"new": write_text(NEW, 60, seed=1)}, 50, tmp_path / "extended")
    after = AutoTokenizer.from_pretrained(tmp_path / "extended")
    assert type(after) is PreTrainedTokenizerFast
    assert (after.bos_token, after.eos_token) == (base.bos_token, base.eos_token)
    for text in HELD_OUT:
        assert in_old_ids(after, text) == ids(base, text)


@pytest.mark.parametrize("form", ("llama2", "metaspace"))
def test_tokens_that_hold_their_space_end_where_words_do(extended, form):
    _, after = extended(form)
    new = after.convert_ids_to_tokens(list(range(extension_of(after).first_id, len(after))))
    assert any(token.startswith("▁") and len(token) > 3 for token in new)
    for token in new:
        assert "▁" not in token[1:] and "<0x" not in token
        assert len({c.isalnum() or unicodedata.category(c) == "Mc" for c in token.removeprefix("▁")}) <= 1


def test_merges_are_those_of_counting_in_plain_python():
    base = make_base("gpt2", write_text(OLD, 60))
    texts = write_text(NEW[:6], 30, seed=3)
    words = Counter()
    for text in texts:
        encoding = base.backend_tokenizer.encode(text, add_special_tokens=False)
        for _, own in itertools.groupby(zip(encoding.word_ids, encoding.tokens, strict=True), lambda item: item[0]):
            words[tuple(token for _, token in own)] += 1
    vocab = base.get_vocab()
    rank = dict(vocab)  # equally frequent pairs: the one whose tokens are older
    expected = []
    while len(expected) < 30:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], rank[pair[0]], rank[pair[1]]))
        expected.append(best)
        rank.setdefault("".join(best), len(rank) + 1000)
        words = _merged(words, best)
    assert continue_bpe(spec_of(base), {"new": texts}, 30).merges == expected


def _merged(words, pair):
    result = Counter()
    for word, n in words.items():
        symbols = list(word)
        i = 0
        while i + 1 < len(symbols):
            if tuple(symbols[i : i + 2]) == pair:
                symbols[i : i + 2] = ["".join(pair)]
            i += 1
        result[tuple(symbols)] += n
    return result


def test_no_merge_leads_to_a_token_that_was_there(tmp_path):
    vocab = {t: i for i, t in enumerate(["b", "c", "d", "e", "Ġ", "cd", "bc", "bcd", "bcde"])}
    merges = [("c", "d"), ("b", "c"), ("bc", "d"), ("bcd", "e")]  # so "bcd" is cut into "b" and "cd", never found
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens(["Ġb"])
    base = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "bcd bcde cdcde b"
    assert ids(base, text) == [0, 5, 4, 0, 5, 3, 4, 5, 5, 3, 4, 0]
    extension = extend_tokenizer(base, {"new": ["bcd bcd bcde bcde cdcd cdcde b b b"] * 3}, 9, tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert in_old_ids(after, text) == ids(base, text) != ids(after, text)
    assert ids(after, text) == SlowTokenizer(after).ids(text)
    assert extension.first_id == 10 and after.convert_tokens_to_ids("Ġb") == 9
    assert "Ġbcd" not in after.get_vocab()  # without "bcd" nothing could make it
    learned = [tuple(pair) for pair in spec_of(after)["model"]["merges"]]
    assert learned[:4] == merges and {"".join(pair) for pair in learned[4:]}.isdisjoint(vocab | {"Ġb": 9})
    assert len(set(map("".join, learned))) == len(learned)


def test_characters_that_stay_bytes_are_not_joined(tmp_path):
    base = make_base("llama2", write_text(OLD, 60))
    text = "லைலைலை கிகிகிகி கிகிகிகி þóþó"
    extend_tokenizer(base, {"new": [text] * 5}, 6, tmp_path)  # room for three characters of six
    after = AutoTokenizer.from_pretrained(tmp_path)
    new = after.convert_ids_to_tokens(list(range(len(base), len(after))))
    assert new[:3] == ["க", "ி", "ல"] and not any("<0x" in token for token in new)
    assert ids(after, text) == SlowTokenizer(after).ids(text)
    assert after.decode(ids(after, text)) == text


@pytest.mark.parametrize("form", ON_BYTES)
def test_no_new_token_crosses_what_the_pre_tokenizer_separates(form):
    base = make_base(form, write_text(OLD, 60))
    new = continue_bpe(spec_of(base), {"new": ["mba,kwe mba,kwe\n"] * 20}, 60).pieces
    assert "Ġmba" in new and "mba" in new
    for token in new:
        assert not ({"Ġ", "Ċ"} & set(token[1:])) and "a," not in token


def test_languages_with_unequal_text_count_the_same_up_to_a_limit(caplog):
    caplog.set_level(logging.INFO, "moect")
    spec = spec_of(make_base("gpt2", write_text(OLD, 60)))
    little = write_text(["ka", "lo", "mu"], 20, seed=1)
    other = [text.translate(str.maketrans("kalomu", "xyzqjw")) for text in little]
    learned = lambda **texts: continue_bpe(spec, texts, 40).merges  # noqa: E731
    assert learned(a=4 * other, b=little) == learned(both=4 * other + 4 * little)
    assert learned(a=4 * other, b=little) != learned(both=4 * other + little)
    assert not caplog.text
    assert learned(a=15 * other, b=little) == learned(both=15 * other + 10 * little)
    assert "b: so little text that it counts 10 times" in caplog.text


def test_other_kinds_of_tokenizers_are_refused_by_name(tmp_path):
    unigram = models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
    word_piece = models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    for model, reason in (
        (unigram, "is a Unigram model, which has no merges"),
        (word_piece, "is a WordPiece model, which has no merges"),
        (models.BPE({"a": 0, "b": 1}, []), "cannot write every byte"),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        with pytest.raises(DataError, match=f"{reason}.*model.extend_tokenizer"):
            extend_tokenizer(tokenizer, {"new": ["ab"]}, 3, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_fewer_tokens_than_asked_are_told_and_none_at_all_refused(tmp_path, caplog):
    base = make_base("gpt2", write_text(OLD, 60))
    assert len(extend_tokenizer(base, {"new": ["kwe zz", "kwe"]}, 50, tmp_path).pieces) == 2
    assert "2 tokens added instead of 50" in caplog.text
    with pytest.raises(DataError, match="no pair of tokens occurs twice"):
        extend_tokenizer(base, {"new": ["kwe"]}, 50, tmp_path)


def test_fragmentation_counts_by_hand(tmp_path):
    base = make_base("gpt2", write_text(OLD, 60))
    extend_tokenizer(base, {"new": ["kwekwe mba"] * 4}, 20, tmp_path)
    counts = fragmentation(base, AutoTokenizer.from_pretrained(tmp_path), {"new": ["kwekwe mba", "7"], "odd": ["!"]})
    assert counts["new"] == {
        "documents": 2,
        "bytes": 11,
        "words": 3,
        "tokens": [11, 3],
        "bytes_per_token": [1.0, 11 / 3],
        "tokens_per_word": [11 / 3, 1.0],
        "documents_changed": 0.5,
    }
    assert counts["odd"]["tokens_per_word"] is None
    lines = fragmentation_table(counts).splitlines()
    assert lines[0].startswith("language") and lines[2].split() == "new 2 1.00 3.67 3.67 1.00 50.0%".split()


@pytest.fixture
def run(tmp_path):
    """A run that extends the tokenizer of a small base, on two files of one new language and one of an old one."""
    make_base("neox", write_text(OLD, 100)).save_pretrained(tmp_path / "base")
    texts = {"old": write_text(OLD, 20), "new-a": write_text(NEW, 60, seed=1), "new-b": write_text(NEW, 60, seed=1)}
    for name, own in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    return {
        "output": str(tmp_path / "runs"),
        "model": {"base": str(tmp_path / "base"), "extend_tokenizer": 40},
        "data": {
            "root": str(tmp_path),
            "languages": {"x": "old", "y": "new"},
            "train": [{"path": f"{name}.jsonl", "lang": "x" if name == "old" else "y"} for name in sorted(texts)[::-1]],
        },
    }


def test_a_run_extends_its_tokenizer_once_and_finds_it_again(run, caplog):
    caplog.set_level(logging.INFO, "moect")
    config = config_from_dict(run)
    assert find_tokenizer(config) is None
    made = run_tokenizer(config)
    assert caplog.text.count("adding 40 tokens") == caplog.text.count("documents changed") == 1
    found, again = find_tokenizer(config), run_tokenizer(config)
    assert caplog.text.count("adding 40 tokens") == 1
    assert extension_of(made) == extension_of(found) == extension_of(again)
    assert len(made) == len(load_tokenizer(config.model)) + 40
    counts = json.loads((Path(made.name_or_path) / "fragmentation.json").read_text())
    assert counts["y"]["tokens"][1] < counts["y"]["tokens"][0]
    assert counts["x"]["documents_changed"] == 0
    folders = Path(made.name_or_path).parent
    assert len(list(folders.iterdir())) == 1
    (Path(run["data"]["root"]) / "new-a.jsonl").write_text('{"text": "kwekwe kwekwe mba mba"}\n')
    assert find_tokenizer(config) is None
    run_tokenizer(config)
    assert len(list(folders.iterdir())) == 2


def test_a_run_keeps_its_extended_tokenizer_without_the_corpora(run, tmp_path):
    config = config_from_dict(run)
    made = run_tokenizer(config)
    folder = tmp_path / "runs" / "run"
    with pytest.raises(DataError, match="extended tokenizer is not there"):
        kept_tokenizer(config, folder)
    keep_tokenizer(made, folder)
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    kept = kept_tokenizer(config, folder)
    assert kept.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    assert extension_of(kept) == extension_of(made)
    assert [p.name for p in folder.iterdir()] == ["tokenizer"]


@pytest.mark.skipif(not (SHARED / "tokenizers").is_dir(), reason="needs real text: set MOECT_DATA")
def test_a_real_tokenizer_learns_swahili_and_tamil_and_keeps_english_and_chinese(tmp_path):
    def texts(lang, split, n):
        with gzip.open(SHARED / "corpus" / "web" / f"{lang}.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in itertools.islice(file, n)]

    base = PreTrainedTokenizerFast(tokenizer_file=str(SHARED / "tokenizers" / "gpt_neox_20B_tokenizer.json"))
    extend_tokenizer(base, {lang: texts(lang, "train", 200) for lang in ("sw", "ta")}, 1000, tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    held_out = {lang: texts(lang, "test", 60) for lang in ("sw", "ta", "en", "zh")}
    slow = SlowTokenizer(after)
    for own in held_out.values():
        for text in own[:10]:
            if not any(token in text for token in base.get_added_vocab()):
                assert ids(after, text) == slow.ids(text)
            assert after.decode(ids(after, text)) == base.decode(ids(base, text))
    counts = fragmentation(base, after, held_out)
    shorter = {lang: own["tokens"][1] / own["tokens"][0] for lang, own in counts.items()}
    assert shorter["sw"] < 0.85 and shorter["ta"] < 0.7
    assert shorter["en"] > 0.99 and counts["zh"]["documents_changed"] == 0
