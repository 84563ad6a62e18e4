"""Stores and packing, against plain loops."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from data_helpers import WORDS, Words, write_corpus

from moect.data import store as store_module
from moect.data.packing import PackedCorpus
from moect.data.store import build_store
from moect.data_config import DataConfig, SourceConfig
from moect.errors import DataError

BOS, EOS = WORDS, WORDS + 1


def build(folder, tokenizer=None, path="c.jsonl", **options):
    config = DataConfig(root=str(folder), languages={"en": "old"}, max_bad_fraction=options.pop("bad", 0.0))
    source = SourceConfig(path=path, lang="en", **options)
    return build_store(source, config, tokenizer or Words(), folder / "cache")


@pytest.mark.parametrize(("bos", "eos"), [("<s>", "</s>"), (None, "</s>"), ("<s>", None), (None, None)])
def test_a_store_holds_every_document_with_the_special_tokens_there_are(tmp_path, monkeypatch, bos, eos):
    monkeypatch.setattr(store_module, "DOCUMENTS_AT_ONCE", 7)  # several batches
    documents = write_corpus(tmp_path / "c.jsonl", 40, seed=1)
    store = build(tmp_path, Words(bos, eos))
    expected = [[BOS] * (bos is not None) + d + [EOS] * (eos is not None) for d in documents]
    got = [store.tokens[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    assert got == expected
    texts = [json.loads(line)["text"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert store.document_bytes.tolist() == [len(t.encode()) for t in texts]
    assert (store.n_documents, store.n_tokens) == (40, sum(map(len, expected)))
    assert (store.n_bytes, store.max_token) == (sum(store.document_bytes), max(map(max, expected)))
    assert (store.tokens.dtype, store.offsets.dtype, store.document_bytes.dtype) == (np.uint32, np.int64, np.int64)
    assert isinstance(store.tokens, np.memmap)


def test_bytes_are_those_of_utf8_and_long_documents_are_not_truncated(tmp_path):
    (tmp_path / "c.txt").write_text("w1 þrjú 三\n" + "w2 " * 5000 + "\n", encoding="utf-8")
    tokenizer = Words()
    tokenizer.inner.model_max_length = 10
    tokenizer.inner.backend_tokenizer.enable_truncation(10)
    store = build(tmp_path, tokenizer, "c.txt")
    assert store.document_bytes.tolist() == [len("w1 þrjú 三".encode()), 15000]
    assert np.diff(store.offsets).tolist() == [5, 5002]


def test_a_store_is_written_once_and_rebuilt_when_anything_it_depends_on_changes(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    tokenizer = Words()
    first = build(tmp_path, tokenizer)
    again = build(tmp_path, tokenizer)
    assert tokenizer.documents == 10
    assert np.array_equal(first.tokens, again.tokens) and first.fingerprint == again.fingerprint
    assert build(tmp_path, tokenizer, limit=4).n_documents == 4
    no_eos = Words(eos=None)
    assert build(tmp_path, no_eos).n_tokens == first.n_tokens - 10 and no_eos.documents == 10
    write_corpus(tmp_path / "c.jsonl", 10, seed=2)
    assert build(tmp_path, tokenizer).fingerprint != first.fingerprint
    assert tokenizer.documents == 10 + 4 + 10


def test_a_store_does_not_depend_on_where_the_corpus_lies_or_on_truncation_settings(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    (tmp_path / "d.jsonl").write_bytes((tmp_path / "c.jsonl").read_bytes())
    tokenizer = Words()
    build(tmp_path, tokenizer)
    tokenizer.inner.backend_tokenizer.enable_truncation(5)
    build(tmp_path, tokenizer, "d.jsonl")
    assert tokenizer.documents == 10


@pytest.mark.parametrize("damage", ["no meta", "bad meta", "old meta", "no tokens", "short tokens", "empty offsets"])
def test_a_damaged_store_is_rebuilt_with_a_log_line(tmp_path, caplog, damage):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)
    expected = np.array(build(tmp_path).tokens)
    (folder,) = (tmp_path / "cache").iterdir()
    kind, name = damage.split()
    path = folder / {"meta": "meta.json", "tokens": "tokens.npy", "offsets": "offsets.npy"}[name]
    if kind == "no":
        path.unlink()
    else:
        path.write_bytes({"bad": b"{", "old": b"{}", "short": path.read_bytes()[:-4], "empty": b""}[kind])
    tokenizer = Words()
    with caplog.at_level(logging.WARNING, "moect.data"):
        store = build(tmp_path, tokenizer)
    assert tokenizer.documents == 10 and np.array_equal(store.tokens, expected)
    assert "damaged cache entry" in caplog.text
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize("leave", ["good", "damaged"])
def test_two_processes_that_build_the_same_store_both_succeed(tmp_path, leave):
    write_corpus(tmp_path / "c.jsonl", 10, seed=1)

    class Interrupted(Words):
        def __call__(self, texts, **options):
            store = build(tmp_path)  # the other process, from start to end, while this one tokenizes
            if leave == "damaged":
                (tmp_path / "cache" / store.fingerprint / "meta.json").unlink()
            return super().__call__(texts, **options)

    store = build(tmp_path, Interrupted())
    assert np.array_equal(store.tokens, build(tmp_path).tokens) and store.n_documents == 10
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [store.fingerprint]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"w1 w2\n\xff\n")
    with pytest.raises(DataError, match=r"c\.txt:2"):
        build(tmp_path, path="c.txt")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 3, seed=1)
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(DataError, match=r"cache.*cannot be written"):
        build(tmp_path)


def test_a_corpus_with_nothing_to_predict_is_refused(tmp_path):
    (tmp_path / "c.txt").write_text("w1\nw2\n")
    with pytest.raises(DataError, match=r"c\.txt: no document has two tokens"):
        build(tmp_path, Words(None, None), "c.txt")


def test_the_header_of_a_token_file_has_room_for_any_length(tmp_path):
    sizes = set()
    for n in (0, 1, 10**6, 10**15):
        with (tmp_path / "header").open("wb") as file:
            store_module._write_header(file, n)
            sizes.add(file.tell())
    assert len(sizes) == 1


def rows_by_loop(store, order, S):
    """The definition of packing, a token at a time."""
    stream = [(d, t, i) for d in order for i, t in enumerate(store.tokens[store.offsets[d] : store.offsets[d + 1]])]
    rows = []
    for start in range(0, max(1, len(stream) - 1), S):
        inputs, labels, positions, valid = [], [], [], []
        for at in range(start, start + S):
            here = stream[at] if at < len(stream) else (None, 0, 0)
            after = stream[at + 1] if at + 1 < len(stream) else (None, 0, 0)
            before = stream[at - 1][0] if start < at <= len(stream) else "row start"
            inputs.append(int(here[1]))
            labels.append(int(after[1]) if here[0] is not None and here[0] == after[0] else -100)
            continues = before == here[0] if at <= len(stream) else True
            positions.append(positions[-1] + 1 if positions and continues else 0)
            valid.append(at < len(stream))
        rows.append((inputs, labels, positions, valid))
    return rows


@pytest.mark.parametrize("S", [2, 3, 16, 64, 5000])
@pytest.mark.parametrize("bos", ["<s>", None])
def test_rows_are_those_of_a_plain_loop(tmp_path, S, bos):
    write_corpus(tmp_path / "c.jsonl", 60, seed=4, longest=40)
    store = build(tmp_path, Words(bos, None))
    corpus = PackedCorpus(store, S, seed=5)
    orders = set()
    for epoch in range(3):
        first = corpus.row(epoch * corpus.rows_per_epoch)
        assert first.input_ids_S.dtype == first.labels_S.dtype == first.position_ids_S.dtype == np.int64
        order = corpus._order.tolist()
        assert sorted(order) == list(range(60))
        orders.add(tuple(order))
        expected = rows_by_loop(store, order, S)
        assert len(expected) == corpus.rows_per_epoch
        for k, (inputs, labels, positions, valid) in enumerate(expected):
            row = corpus.row(epoch * corpus.rows_per_epoch + k)
            assert row.input_ids_S.tolist() == inputs
            assert row.labels_S.tolist() == labels
            assert row.position_ids_S.tolist() == positions
            assert row.valid_S.tolist() == valid
    assert len(orders) == 3


@pytest.mark.parametrize("S", [2, 7, 16, 300])
def test_every_token_but_the_first_of_each_document_is_a_label_exactly_once_an_epoch(tmp_path, S):
    documents = write_corpus(tmp_path / "c.jsonl", 80, seed=6)
    corpus = PackedCorpus(build(tmp_path), S, seed=0)
    expected = Counter((a, b) for d in documents for a, b in zip([BOS] + d, d + [EOS], strict=True))
    for epoch in range(2):
        seen = Counter()
        for k in range(corpus.rows_per_epoch):
            row = corpus.row(epoch * corpus.rows_per_epoch + k)
            labelled = row.labels_S != -100
            seen.update(zip(row.input_ids_S[labelled].tolist(), row.labels_S[labelled].tolist(), strict=True))
            assert not labelled[~row.valid_S].any()
        assert seen == expected


@pytest.mark.parametrize(("n_tokens", "rows"), [(1, 1), (4, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_the_number_of_rows_wastes_none_on_a_token_that_can_only_be_a_label(tmp_path, n_tokens, rows):
    (tmp_path / "c.txt").write_text(" ".join(["w1"] * max(2, n_tokens)) + "\n")
    store = build(tmp_path, Words(None, None), "c.txt")
    store.n_tokens = n_tokens
    assert PackedCorpus(store, 4, seed=0).rows_per_epoch == rows


def test_a_row_is_a_function_of_seed_and_index_alone(tmp_path):
    write_corpus(tmp_path / "c.jsonl", 50, seed=7)
    store = build(tmp_path)
    forward, backward = PackedCorpus(store, 16, seed=1), PackedCorpus(store, 16, seed=1)
    indices = range(2 * forward.rows_per_epoch)
    one = [forward.row(i).input_ids_S.tolist() for i in indices]
    assert one == [backward.row(i).input_ids_S.tolist() for i in reversed(indices)][::-1]
    other = PackedCorpus(store, 16, seed=-2)
    assert one != [other.row(i).input_ids_S.tolist() for i in indices]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_documents_in_one_row_cannot_see_one_another(tmp_path, family, attention):
    import transformers

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=WORDS + 3)
    config = getattr(transformers, f"{family}Config")(**shape, num_key_value_heads=2, head_dim=8)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()

    write_corpus(tmp_path / "c.jsonl", 12, seed=8, longest=12)
    corpus = PackedCorpus(build(tmp_path), 48, seed=0)
    rows = [corpus.row(k) for k in range(corpus.rows_per_epoch)]
    batch = {n: torch.from_numpy(np.stack([getattr(r, f"{n}_S") for r in rows])) for n in ("input_ids", "position_ids")}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        fragments = 0
        for row, logits_SV in zip(rows, packed, strict=True):
            edges = [*np.flatnonzero(row.position_ids_S == 0), len(row.input_ids_S)]
            for start, end in zip(edges[:-1], edges[1:], strict=True):
                alone = model(torch.from_numpy(row.input_ids_S[None, start:end]), use_cache=False).logits[0]
                torch.testing.assert_close(logits_SV[start:end], alone, atol=1e-5, rtol=0)
                fragments += 1
        without_positions = model(batch["input_ids"], use_cache=False).logits
    assert not rows[-1].valid_S.all() and fragments > 12  # padding and cut documents were among them
    assert (without_positions - packed).abs().max() > 1e-3  # and the bound could have failed
