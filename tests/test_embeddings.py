"""Rows of embedding and head that train: against plain transformers models with the same matrices."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import exported, python
from tiny import disturb, logits, tiny_model, tokens
from transformers import AutoModelForCausalLM

from moect.config import config_from_dict
from moect.data.tokens.unseen import telling_tokens, unseen_tokens
from moect.data.vocabulary.extended_tokenizer import Extension
from moect.data_config import DataConfig, SourceConfig
from moect.errors import ConfigError
from moect.model import ForwardRecord, MoeConfig, append_moe, base_only, losses, modules_of, remove_moe
from moect.model.build import build_model, parameter_counts
from moect.model.embeddings import append_rows, logits_of, rows_of
from moect.model.flops import training_flops_per_token
from moect.model.language_gate import LIMIT
from moect.monitor.measuring.score import score
from moect.monitor.measuring.windows import TokenisedDocument

V = 96
CHOSEN = [5, 7, 50, 95]
PIECES = [[3, 4], [5, 6, 7]]
EVERYTHING = list(range(V))


def base(tied: bool, family="qwen3", **changes):
    # without a padding token, whose row of zeros would hide what happens to row 0
    return tiny_model(family, initializer_range=0.2, tie_word_embeddings=tied, pad_token_id=None, **changes)


def with_rows(
    tied=False, ids=CHOSEN, first_id=V, pieces=PIECES, gate=False, disturbed=True, family="qwen3", opening=(), **changes
):
    """A tiny model with rows, whose experts do nothing as yet; `disturbed`: everything that trains has moved."""
    model = append_moe(base(tied, family, **changes), MoeConfig(fusion="add", language_gate=gate, width=16))
    append_rows(model, ids, first_id, pieces, opening=opening)
    if disturbed:
        disturb(model, scale=0.3)
    return model.eval()


def ids_with_added(model, length=17):
    return torch.randint(3, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def matrices(model) -> list[torch.Tensor]:
    """What embedding and head amount to, (V + A, D) each, by loops."""
    made = []
    rows = rows_of(model)
    for place, own in ((model.model.embed_tokens, rows[0]), (model.lm_head, rows[-1])):
        zeros = torch.zeros(own.added, place.weight.shape[1])
        matrix = torch.cat([place.weight.detach(), zeros.to(place.weight)])
        for token, delta_D in zip(own.ids.tolist(), own.delta.detach(), strict=True):
            matrix[token] += delta_D
        made.append(matrix)
    return made


def plain_twin(model, tied: bool):
    """A plain transformers model with those matrices."""
    twin = base(tied, vocab_size=model.config.vocab_size)
    own = {name: t for name, t in model.state_dict().items() if ".moe." not in name and ".rows." not in name}
    own["model.embed_tokens.weight"], own["lm_head.weight"] = matrices(model)
    twin.load_state_dict(own)
    return twin


def set_gate(model, value: float) -> None:
    """Make the language gate's logit the same for every token."""
    gate = modules_of(model)[0].language_gate
    with torch.no_grad():
        gate.evidence.weight.zero_()
        gate.evidence.bias.fill_(LIMIT * math.atanh(value / LIMIT))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ids", [CHOSEN, EVERYTHING], ids=["unseen", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_model_with_rows_computes_the_base_bit_for_bit_before_training(family, ids, tied):
    for dtype in (torch.float32, torch.bfloat16):
        expected = logits(base(tied, family, dtype=dtype), tokens())
        for training in (False, True):
            model = with_rows(tied, ids, pieces=[], disturbed=False, family=family, dtype=dtype).train(training)
            assert torch.equal(logits(model, tokens()), expected)
        added = with_rows(tied, ids, disturbed=False, family=family, dtype=dtype)
        assert torch.equal(logits(added, tokens())[..., :V], expected), "added tokens only add columns"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("first_id", "spare"), [(V, 0), (V - 1, 1), (V - 2, 2)])
def test_rows_of_added_tokens_begin_as_the_mean_of_their_pieces(tied, first_id, spare):
    model = with_rows(tied, CHOSEN[:2], first_id, PIECES, disturbed=False)
    assert model.config.vocab_size == V + 2 - spare and len(rows_of(model)) == (1 if tied else 2)
    for matrix, weight in zip(matrices(model), (model.model.embed_tokens.weight, model.lm_head.weight), strict=True):
        for token, pieces in enumerate(PIECES, start=first_id):
            assert (matrix[token].double() - weight.double()[pieces].mean(0)).abs().max() < 1e-7


def test_tokens_that_do_not_follow_the_base_s_are_refused():
    with pytest.raises(ConfigError, match="added tokens begin at 97, the model's embedding ends at 95"):
        with_rows(first_id=V + 1)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_are_those_of_a_plain_model_with_the_same_matrices(tied):
    """The gradient of a row is the dense one's at its token; with tied embeddings both uses of it add up."""
    model = with_rows(tied)
    for moe in modules_of(model):  # silent again: the twin has none
        moe.experts.down_proj.data.zero_()
    twin, ids = plain_twin(model, tied), ids_with_added(model)
    assert (ids >= V).any() and torch.isin(ids, torch.tensor(CHOSEN)).any()
    assert (logits(model, ids) - logits(twin, ids)).abs().max() < 1e-5
    for either in (model, twin):
        either.train()(ids, labels=ids, use_cache=False).loss.backward()
    dense = (twin.model.embed_tokens.weight, twin.lm_head.weight)
    for rows, weight in zip(rows_of(model), dense, strict=False):
        torch.testing.assert_close(rows.delta.grad, weight.grad[rows.ids], rtol=1e-4, atol=1e-6)
        assert rows.delta.grad.abs().max() > 1e-3
    assert model.model.embed_tokens.weight.grad is None and model.lm_head.weight.grad is None


def test_a_token_beyond_the_vocabulary_is_an_error_and_not_a_zero():
    for model in (with_rows(), with_rows(pieces=[])):
        with pytest.raises(IndexError):
            logits(model, torch.tensor([[3, model.config.vocab_size]]))


@pytest.mark.parametrize("tied", [True, False])
def test_base_only_and_removal_give_the_base_with_its_vocabulary(tied):
    expected, plain = logits(base(tied), tokens()), base(tied)
    model = with_rows(tied, gate=True)
    assert not torch.equal(logits(model, tokens())[..., :V], expected)
    with base_only(model):
        assert torch.equal(logits(model, tokens()), expected)
    remove_moe(model)
    assert torch.equal(logits(model, tokens()), expected)
    assert type(model) is type(plain) and type(model.model.embed_tokens) is torch.nn.Embedding
    assert model.state_dict().keys() == plain.state_dict().keys() and model.config.vocab_size == V


@pytest.mark.parametrize("tied", [True, False])
def test_closed_gate_gives_the_base_s_logits_bit_for_bit(tied):
    """Where no token of the text has a row of its own; an added token has its logit, and log q."""
    ids = tokens()
    ids[torch.isin(ids, torch.tensor(CHOSEN))] = 8
    expected = logits(base(tied), ids)
    model = with_rows(tied, gate=True)
    set_gate(model, -3.0)
    got = logits(model, ids)
    assert torch.equal(got[..., :V], expected)
    with torch.no_grad():
        hidden_BSD = base(tied).model(ids).last_hidden_state
    beyond = hidden_BSD @ rows_of(model)[-1].delta.detach()[-2:].T + torch.tensor(-3.0).sigmoid().log()
    assert (got[..., V:] - beyond).abs().max() < 1e-5
    without_added = with_rows(tied, pieces=[], gate=True)
    set_gate(without_added, -3.0)
    assert torch.equal(logits(without_added, ids), expected), "the whole distribution"


def test_open_gate_gives_the_rows_and_a_soft_one_their_share():
    """Each position by the formula, in fp64, from the hidden states and gate values of the model itself."""
    model = with_rows(gate=True)
    ids, record = ids_with_added(model), ForwardRecord()
    for training in (False, True):
        model.train(training)
        record = ForwardRecord()
        with torch.no_grad():
            hidden_TD = model.model(ids, use_cache=False, moect_record=record).last_hidden_state.flatten(0, 1)
            got_TV = logits(model, ids).flatten(0, 1)
        weight_VD, changed_VD = model.lm_head.weight.detach().double(), matrices(model)[1].double()
        n_open = 0
        for h_D, q, got_V in zip(hidden_TD.double(), record.gate_logit_T.double().sigmoid(), got_TV, strict=True):
            open_ = q > 0.5
            n_open += int(open_)
            share = q if training else open_.double()
            inside_V = (1 - share) * (weight_VD @ h_D) + share * (changed_VD[:V] @ h_D)
            beyond_A = changed_VD[V:] @ h_D + (q.log() if training or not open_ else 0)
            assert (got_V - torch.cat([inside_V, beyond_A])).abs().max() < 1e-4
        assert 2 < n_open < len(got_TV) - 2


@pytest.mark.parametrize("value", [-3.0, 0.4])
@pytest.mark.parametrize("training", [False, True])
def test_an_added_token_is_as_likely_in_a_spare_row_of_the_base_as_beyond_it(value, training):
    """However unlikely the base makes its unused rows: two twins whose pieces are the same, one on each side."""
    model = with_rows(ids=[5], first_id=V - 1, pieces=[[3, 4], [3, 4]], gate=True, disturbed=False)
    with torch.no_grad():
        model.lm_head.weight[V - 1] = -3 * model.lm_head.weight[3]  # as a base learns of what never comes
    rows = rows_of(model)[-1]
    rows.start_from_pieces(model.lm_head.weight, V - 1, [[3, 4], [3, 4]])
    set_gate(model, value)
    model.train(training)
    got = logits(model, tokens())
    torch.testing.assert_close(got[..., V - 1], got[..., V], rtol=0, atol=1e-5)
    before = base(False)
    with torch.no_grad():
        before.lm_head.weight[V - 1] = model.lm_head.weight[V - 1]
    if value < 0 and not training:
        assert torch.equal(got[..., : V - 1], logits(before, tokens())[..., : V - 1])


def test_an_exported_model_with_rows_keeps_its_size(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported(with_rows(first_id=V - 1, gate=True), tmp_path / "export"))
    ids = ids_with_added(model)
    before = logits(model, ids)
    model.resize_token_embeddings(model.config.vocab_size)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(V + 40)


def test_tokens_before_the_first_open_one_keep_the_base_s_bits():
    """Whichever rows have moved: they come after the gate."""
    model = with_rows(ids=EVERYTHING, gate=True, pieces=[])
    ids, record = tokens(8, 30), ForwardRecord()
    got, expected = logits(model, ids, moect_record=record), logits(base(False), ids)
    open_BS = (record.gate_logit_T.sigmoid() > 0.5).view(ids.shape)
    untouched_BS = ~open_BS.cummax(1).values
    assert untouched_BS.sum() > 3 and torch.equal(got[untouched_BS], expected[untouched_BS])
    assert not torch.equal(got[open_BS], expected[open_BS])


@pytest.mark.parametrize("opening", [(), (7, 50)], ids=["", "some open it"])
@pytest.mark.parametrize("training", [False, True])
def test_with_a_gate_the_rows_are_added_where_it_decides(training, opening):
    """Against the base with hooks: a stream that gets q·d_i behind its second block, and a head of other rows. Tokens
    that open the gate have their rows in the embedding."""
    moe = MoeConfig(fusion="add", language_gate=True, width=16, layers=[1])
    model = append_rows(append_moe(base(False), moe), CHOSEN, opening=opening)
    disturb(model, scale=0.3)
    model.train(training)
    modules_of(model)[0].experts.down_proj.data.zero_()
    ids, record = tokens(4, 20), ForwardRecord()
    got_BSV = logits(model, ids, moect_record=record)
    q_BS = record.gate_logit_T.sigmoid().view(ids.shape)
    q_BS = q_BS if training else (q_BS > 0.5).float()
    assert q_BS.std() > 0.1
    told_BS = torch.isin(ids, torch.tensor(opening))
    assert told_BS.any() == bool(opening) and (q_BS[told_BS] == 1).all()
    embeddings, head = matrices(model)
    twin = base(False)
    change_BSD = q_BS[..., None] * (embeddings - twin.model.embed_tokens.weight.detach())[ids]
    twin.model.embed_tokens.weight.data[list(opening)] = embeddings[list(opening)]
    change_BSD = change_BSD.masked_fill(told_BS[..., None], 0)
    twin.model.layers[1].register_forward_hook(lambda block, inputs, output: output + change_BSD)
    with torch.no_grad():
        hidden_BSD = twin.model(ids, use_cache=False).last_hidden_state
        weight = twin.lm_head.weight
        expected = hidden_BSD @ weight.T + q_BS[..., None] * (hidden_BSD @ (head - weight).T)
    assert (got_BSV - expected).abs().max() < 1e-4


def test_a_token_that_opens_the_gate_does_so_at_every_threshold_and_trains_no_gate():
    model = with_rows(ids=EVERYTHING, pieces=[], gate=True, opening=[9, 60])
    set_gate(model, -9.0)
    model.moe_config.gate_threshold = 1 - 2**-53
    ids, record = tokens(4, 30), ForwardRecord()
    told_BS = torch.isin(ids, torch.tensor([9, 60]))
    got, expected = logits(model, ids, moect_record=record), logits(base(False), ids)
    assert torch.equal(record.open_T, told_BS.flatten()) and told_BS.any()
    before_BS = ~told_BS.cummax(1).values
    assert torch.equal(got[before_BS], expected[before_BS]) and before_BS.any()
    assert (got != expected)[~before_BS].any(-1).all(), "what comes after has seen it"
    with base_only(model):
        assert torch.equal(logits(model, ids), expected)

    model.train()
    record = ForwardRecord()
    model.model(ids, use_cache=False, moect_record=record)
    old, new = losses.gate_sums(record.gate_logit_T, torch.ones(ids.numel(), dtype=torch.int8))
    assert old == 0 and new.item() == pytest.approx((~told_BS).sum().item() * 9.000123, rel=1e-4)


def test_with_all_rows_the_added_tokens_are_still_the_last(place):
    """Where the base has more unused rows than tokens are added, those beyond belong to nobody."""
    extension = Extension(first_id=290, pieces=[[3, 4], [5, 6]])
    moe = {"fusion": "add", "language_gate": True}
    config = place.config(moe=moe, model={"train_embeddings": "all", "extend_tokenizer": 2})
    model = build_model(config, extension=extension)
    rows = rows_of(model)[0]
    assert rows.ids.tolist() == list(range(292)) and rows.spare == 2
    pieces = model.model.embed_tokens.weight[[3, 4]].mean(0)
    with torch.no_grad():
        assert torch.allclose(model.model.embed_tokens(torch.tensor([290]))[0], pieces, atol=1e-6)


def test_embeddings_without_their_tokens_are_refused_where_rows_come_late():
    model = with_rows(gate=True)
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with base_only(model):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_chunks_of_logits_and_their_recomputation_change_no_loss_and_no_gradient(monkeypatch):
    model = with_rows(gate=True).train()
    ids, results = ids_with_added(model), []
    for elements in (2**26, 5 * model.config.vocab_size):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
        model.zero_grad()
        record = ForwardRecord()
        hidden_BSD = model.model(ids, use_cache=False, moect_record=record).last_hidden_state
        loss = losses.cross_entropy_sum(
            hidden_BSD.flatten(0, 1),
            ids.flatten(),
            lambda *inputs: logits_of(model, *inputs),
            model.config.vocab_size,
            record.gate_logit_T,
        )
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (in_chunks, gradients_in_chunks) = results
    assert in_chunks == pytest.approx(loss, rel=1e-6)
    assert sum(".rows." in name for name in gradients) == 2
    assert any("language_gate" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_in_chunks[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_monitor_scores_with_the_model_s_own_head():
    model = with_rows(gate=True)
    ids = ids_with_added(model, 12)
    documents = [TokenisedDocument(ids=row.tolist(), first=1, last=12, n_bytes=30) for row in ids]
    expected = -logits(model, ids)[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
    got = [s.nll for s in score(model, documents, window=16, stride=8, batch_size=2)]
    assert got == pytest.approx(expected.tolist(), rel=1e-5)
    with base_only(model):
        ids = tokens(2, 12)
        documents = [TokenisedDocument(ids=row.tolist(), first=1, last=12, n_bytes=30) for row in ids]
        got = [s.nll for s in score(model, documents, window=16, stride=8, batch_size=2)]
    expected = -logits(base(False), ids)[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))
    assert got == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "gate", "pieces"), [(True, True, PIECES), (False, False, PIECES), (False, True, [])])
def test_exported_model_is_the_same_function_and_holds_the_base(tied, gate, pieces, dtype, tmp_path):
    model = with_rows(tied, gate=gate, pieces=pieces, dtype=dtype)
    folder = exported(model, tmp_path / "export")
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    for again in (reloaded, AutoModelForCausalLM.from_pretrained(resaved(reloaded, tmp_path / "again"))):
        for parameter in again.parameters():  # weights mapped from a file lie at odd addresses
            parameter.data = parameter.data.clone()
        ids = ids_with_added(model)
        assert again.config.vocab_size == V + len(pieces) and again.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(logits(again, ids), logits(model, ids))
        with again.base_only():
            assert torch.equal(logits(again, tokens()), logits(base(tied, dtype=dtype), tokens()))
        assert {n for n, p in again.named_parameters() if p.requires_grad and ".moe." not in n} == {
            n for n, p in model.named_parameters() if p.requires_grad and ".moe." not in n
        }
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        cached = again.generate(ids[:, :9], **options)
        # in bf16, attention over a cache rounds otherwise, and near-ties are common
        assert torch.equal(cached, model.generate(ids[:, :9], use_cache=dtype == torch.bfloat16, **options))


def resaved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_exported_model_without_its_rows_computes_the_base(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = exported(with_rows(pieces=[]), tmp_path / "export")
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".rows." not in n and ".moe." not in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert (
        logits(AutoModelForCausalLM.from_pretrained(folder), tokens()) - logits(base(False), tokens())
    ).abs().max() < 1e-5


@pytest.mark.slow
def test_modelling_file_in_the_export_needs_no_moect(tmp_path):
    model = with_rows(gate=True)
    folder = exported(model, tmp_path / "export")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "moect" not in sys.modules
print(model(torch.arange(3, 98)[None]).logits.double().square().sum().item())
"""
    expected = logits(model, torch.arange(3, 98)[None]).double().square().sum().item()
    assert float(python(code, folder, cwd=tmp_path, isolated=True)) == pytest.approx(expected, rel=1e-5)


def test_copying_a_model_with_rows_copies_its_function():
    model = with_rows(gate=True)
    ids = ids_with_added(model)
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))


class Store:
    """What counting needs of a token store."""

    def __init__(self, tokens, dtype):
        self.tokens, self.n_tokens = np.array(tokens, dtype=dtype), len(tokens)


def test_unseen_tokens_are_those_that_a_count_of_every_token_finds(monkeypatch):
    monkeypatch.setattr("moect.data.tokens.unseen.AT_ONCE", 1000)
    rng = np.random.default_rng(0)
    old = [rng.integers(0, 60, 1_500_000), rng.integers(10, 40, 2_000_500)]
    old[0][:4], old[1][:3] = 70, 71  # 4 of 3.5 million are too many, 3 are not
    new = [rng.integers(30, 90, 3000)]
    new[0][:2] = 70, 71
    config = DataConfig(
        languages={"en": "old", "de": "old", "cy": "new"},
        train=[SourceConfig(path="a", lang=lang) for lang in ("en", "cy", "de")],
    )
    stores = [Store(old[0], np.uint16), Store(new[0], np.uint32), Store(old[1], np.uint16)]
    of_old = np.concatenate(old).tolist()
    counts = {token: 0 for token in range(100)}
    for token in of_old:
        counts[token] += 1
    expected = [t for t in sorted(set(new[0].tolist())) if counts[t] <= len(of_old) / 1e6]
    found = unseen_tokens(config, stores, 100)
    assert found == expected and 71 in found and 70 not in found and len(found) > 20
    assert telling_tokens(config, stores, 100) == [t for t in expected if counts[t] == 0] != expected


def test_without_text_of_old_languages_unseen_is_refused():
    config = DataConfig(languages={"cy": "new"}, train=[SourceConfig(path="a", lang="cy")])
    with pytest.raises(ConfigError, match="compares with text of old languages, and `data.train` has none"):
        unseen_tokens(config, [Store([1, 2], np.uint16)], 5)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"extend_tokenizer": 5}, "method": "full"}, "`model.extend_tokenizer` is for `method: moe-ct`"),
    ],
)
def test_what_cannot_keep_its_promise_is_refused_in_one_line(place, changes, problem):
    with pytest.raises(ConfigError, match=problem) as refusal:
        build_model(place.config(**changes), meta=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ids", [CHOSEN, EVERYTHING], ids=["unseen", "all"])
def test_parameters_and_flops_count_the_rows(ids, tied):
    from torch.utils.flop_counter import FlopCounterMode

    model = with_rows(tied, ids, attn_implementation="eager").train()
    D, U = 32, len(ids) + len(PIECES)
    without = append_moe(base(tied), MoeConfig(fusion="add", width=16))
    added = {key: parameter_counts(model)[key] - count for key, count in parameter_counts(without).items()}
    assert added == dict.fromkeys(("total", "trainable", "active"), U * D * (1 if tied else 2))
    S = 64
    x = torch.randint(3, V, (1, S), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=x, use_cache=False).logits.logsumexp(-1).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    squares = counts.pop("aten.bmm")
    counted = (sum(counts.values()) + squares / 2) / S
    assert 0.99 * counted < training_flops_per_token(model, S, recompute=False) < 1.02 * counted


def test_plan_knows_the_most_rows_and_added_tokens_that_there_can_be(place):
    config = config_from_dict(place.values(model={"train_embeddings": "unseen", "extend_tokenizer": 7}))
    rows = rows_of(build_model(config, meta=True))
    assert [tuple(r.delta.shape) for r in rows] == [(307, 32), (307, 32)] and rows[0].added == 7
