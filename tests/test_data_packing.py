"""Rows of joined documents, against plain loops, and what a model sees of them."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_helpers import WORDS, Words, write_corpus

from moect.data.batches.best_fit import BestFitRows
from moect.data.batches.corpus import Documents
from moect.data.batches.packing import JoinedRows
from moect.data.tokens.store import build_store
from moect.data_config import DataConfig, SourceConfig

BOS, EOS = WORDS, WORDS + 1
BOTH = pytest.mark.parametrize("packing", [JoinedRows, BestFitRows])


def build(folder, tokenizer=None, *paths):
    config = DataConfig(root=str(folder), languages={"en": "old"}, max_bad_fraction=0.0)
    sources = [SourceConfig(path=path, lang="en") for path in paths or ("c.jsonl",)]
    return Documents([build_store(s, config, tokenizer or Words(), folder / "cache", workers=1) for s in sources])


def rows_by_loop(documents, order, S):
    """The definition of packing, a token at a time."""
    offsets = documents.offsets
    tokens = documents.read(np.arange(documents.n_tokens))
    stream = [(d, t, i) for d in order for i, t in enumerate(tokens[offsets[d] : offsets[d + 1]])]
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
    documents = build(tmp_path, Words(bos, None))
    corpus = JoinedRows(documents, S, seed=5)
    orders = set()
    for epoch in range(3):
        first = corpus.row(epoch * corpus.rows_per_epoch)
        assert first.input_ids_S.dtype == first.labels_S.dtype == first.position_ids_S.dtype == np.int64
        order = corpus._order.tolist()
        assert sorted(order) == list(range(60))
        orders.add(tuple(order))
        expected = rows_by_loop(documents, order, S)
        assert len(expected) == corpus.rows_per_epoch
        for k, (inputs, labels, positions, valid) in enumerate(expected):
            row = corpus.row(epoch * corpus.rows_per_epoch + k)
            assert row.input_ids_S.tolist() == inputs
            assert row.labels_S.tolist() == labels
            assert row.position_ids_S.tolist() == positions
            assert row.valid_S.tolist() == valid
    assert len(orders) == 3


@BOTH
@pytest.mark.parametrize("S", [2, 7, 16, 300])
def test_every_token_but_the_first_of_each_document_is_a_label_exactly_once_an_epoch(tmp_path, packing, S):
    written = write_corpus(tmp_path / "c.jsonl", 80, seed=6)
    corpus = packing(build(tmp_path), S, seed=0)
    expected = Counter((a, b) for d in written for a, b in zip([BOS] + d, d + [EOS], strict=True))
    for epoch in range(2):
        seen = Counter()
        for k in range(corpus.rows_per_epoch):
            row = corpus.row(epoch * corpus.rows_per_epoch + k)
            labelled = row.labels_S != -100
            seen.update(zip(row.input_ids_S[labelled].tolist(), row.labels_S[labelled].tolist(), strict=True))
            assert not labelled[~row.valid_S].any()
        assert seen == expected


@BOTH
@pytest.mark.parametrize("S", [2, 7, 16, 300])
def test_fragments_say_which_tokens_of_which_document_a_row_holds(tmp_path, packing, S):
    write_corpus(tmp_path / "a.jsonl", 30, seed=6, longest=50)
    write_corpus(tmp_path / "b.jsonl", 20, seed=7, longest=50)
    documents = build(tmp_path, None, "a.jsonl", "b.jsonl")
    corpus = packing(documents, S, seed=0)
    labels = Counter()
    for k in range(corpus.rows_per_epoch):
        row = corpus.row(k)
        inputs, wanted, positions = [], [], []
        for which, document, first, last in row.fragments_F4.tolist():
            store = documents.stores[which]
            start, stop = store.offsets[document : document + 2].tolist()
            held = store.tokens[start + first : start + last + 1].tolist()
            ends_here = packing is JoinedRows and start + last + 1 == stop and len(inputs) + len(held) <= S
            inputs += held if ends_here else held[:-1]
            wanted += held[1:] + [-100] * ends_here
            positions += range(len(held) if ends_here else len(held) - 1)
            labels.update((which, document, place) for place in range(first + 1, last + 1))
        n = int(row.valid_S.sum())
        assert row.input_ids_S[:n].tolist() == inputs and row.labels_S[:n].tolist() == wanted
        assert row.position_ids_S[:n].tolist() == positions
    expected = [
        (which, document, place)
        for which, store in enumerate(documents.stores)
        for document, length in enumerate(np.diff(store.offsets).tolist())
        for place in range(1, length)
    ]
    assert labels == Counter(expected)


@BOTH
def test_tokens_before_a_row_are_counted_as_by_reading_them(tmp_path, packing):
    write_corpus(tmp_path / "c.jsonl", 30, seed=3, longest=40)
    corpus = packing(build(tmp_path), 16, seed=0)
    seen = 0
    for k in range(2 * corpus.rows_per_epoch + 3):
        assert corpus.tokens_before(k) == seen
        seen += int(corpus.row(k).valid_S.sum())
    assert corpus.tokens_before(corpus.rows_per_epoch) == corpus.tokens_per_epoch


@BOTH
@pytest.mark.parametrize("S", [8, 20])
def test_the_share_of_documents_that_are_cut_is_that_of_those_with_labels_in_several_rows(tmp_path, packing, S):
    write_corpus(tmp_path / "c.jsonl", 50, seed=3, longest=24)
    corpus = packing(build(tmp_path), S, seed=0)
    rows = Counter()
    for k in range(corpus.rows_per_epoch):
        held = corpus.row(k).fragments_F4
        rows.update(held[held[:, 3] > held[:, 2], 1].tolist())
    assert 0 < corpus.share_cut() < 1 and corpus.share_cut() == sum(n > 1 for n in rows.values()) / 50


@pytest.mark.parametrize(("n_tokens", "rows"), [(1, 1), (4, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_the_number_of_rows_wastes_none_on_a_token_that_can_only_be_a_label(tmp_path, n_tokens, rows):
    (tmp_path / "c.txt").write_text(" ".join(["w1"] * max(2, n_tokens)) + "\n")
    documents = build(tmp_path, Words(None, None), "c.txt")
    documents.n_tokens = n_tokens
    assert JoinedRows(documents, 4, seed=0).rows_per_epoch == rows


@BOTH
def test_a_row_is_a_function_of_seed_and_index_alone(tmp_path, packing):
    write_corpus(tmp_path / "c.jsonl", 50, seed=7)
    documents = build(tmp_path)
    forward, backward = packing(documents, 16, seed=1), packing(documents, 16, seed=1)
    indices = range(2 * forward.rows_per_epoch)
    one = [forward.row(i).input_ids_S.tolist() for i in indices]
    assert one == [backward.row(i).input_ids_S.tolist() for i in reversed(indices)][::-1]
    other = packing(documents, 16, seed=-2)
    assert one != [other.row(i).input_ids_S.tolist() for i in indices]
    half = forward.rows_per_epoch
    assert sorted(map(tuple, one[:half])) != sorted(map(tuple, one[half:]))  # each epoch anew


def packed_logits(folder, packing, family, attention, device="cpu", dtype=torch.float32):
    """A small random model, rows of a corpus, and its logits of all rows at once."""
    import transformers

    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=WORDS + 3)
    config = getattr(transformers, f"{family}Config")(**shape, num_key_value_heads=2, head_dim=8)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(device, dtype)

    write_corpus(folder / "c.jsonl", 12, seed=8, longest=12)
    corpus = packing(build(folder), 48, seed=0)
    rows = [corpus.row(k) for k in range(corpus.rows_per_epoch)]
    return model, rows


@BOTH
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_documents_in_one_row_cannot_see_one_another(tmp_path, family, attention, packing):
    model, rows = packed_logits(tmp_path, packing, family, attention)
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
    assert not all(row.valid_S.all() for row in rows) and fragments > 12  # padding was among them
    assert (without_positions - packed).abs().max() > 1e-3  # and the bound could have failed


@BOTH
def test_documents_in_one_row_cannot_see_one_another_under_flash_attention(tmp_path, packing):
    if not torch.cuda.is_available():
        pytest.skip("flash attention needs a GPU, and there is none")
    pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")
    model, rows = packed_logits(tmp_path, packing, "Qwen3", "flash_attention_2", "cuda", torch.bfloat16)
    plain, _ = packed_logits(tmp_path, packing, "Qwen3", "eager", "cuda", torch.bfloat16)
    cuda = lambda array: torch.from_numpy(array[None]).cuda()  # noqa: E731
    with torch.no_grad():
        for row in rows:  # single rows: see `model.attention`
            packed = model(cuda(row.input_ids_S), position_ids=cuda(row.position_ids_S), use_cache=False).logits[0]
            edges = [*np.flatnonzero(row.position_ids_S == 0), len(row.input_ids_S)]
            for start, end in zip(edges[:-1], edges[1:], strict=True):
                alone = plain(cuda(row.input_ids_S[start:end]), use_cache=False).logits[0]
                torch.testing.assert_close(packed[start:end].float(), alone.float(), atol=0.02, rtol=0.02)
