"""Blocks with different numbers of experts, and the probe that proposes them."""

import json
import math

import pytest
import torch
import yaml
from small_runs import assert_same_bits, figures, tensors
from torch import nn

from moect.cli import main
from moect.config import load_config
from moect.data.tokens.store import build_store
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.errors import ConfigError, ExportError
from moect.export.run import ExportOptions, export_run
from moect.model import ForwardRecord, losses
from moect.model.build import build_model, load_base, parameter_counts
from moect.model.record import BlockRecord
from moect.monitor.reporting.experts import even_share, load_entropy, load_of, mean_load, odd_experts
from moect.monitor.rows import read_rows
from moect.probe import TOKENS, allocate, documents, mean_inputs, most_moved, probe, similarity
from moect.train.loop import train

COUNTS = [2, 5, 3]
UNEVEN = {"experts": COUNTS, "top_k": 2, "fusion": "add"}


def test_losses_of_uneven_blocks_are_the_means_of_those_of_each():
    generator = torch.Generator().manual_seed(0)
    logits_L = [torch.randn(40, E, generator=generator) for E in COUNTS]
    blocks = {i: BlockRecord(logits.topk(2).indices, logits) for i, logits in enumerate(logits_L)}
    valid = torch.arange(40) % 5 != 0
    counts_LE = losses.expert_counts(ForwardRecord(blocks=blocks), 5, valid)
    load_LE = counts_LE / counts_LE.sum(1, keepdim=True)
    scores_LE = losses.score_sums(ForwardRecord(blocks=blocks), "softmax", valid) / valid.sum()
    assert counts_LE.shape == scores_LE.shape == (3, 5) and not counts_LE[0, 2:].any() and not scores_LE[2, 3:].any()
    got = losses.balance_loss(load_LE.float(), scores_LE, experts_L=torch.tensor(COUNTS))
    alone = []
    for i, E in enumerate(COUNTS):
        record = ForwardRecord(blocks={0: blocks[i]})
        counts = losses.expert_counts(record, E, valid)
        alone.append(
            losses.balance_loss((counts / counts.sum()).float(), losses.score_sums(record, "softmax", valid) / 32)
        )
    assert got.item() == pytest.approx(sum(alone).item() / 3, rel=1e-6)


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_run_trains_resumes_measures_and_exports_them(place, balance, tmp_path):
    sections = {"moe": {**UNEVEN, "balance": balance}, "monitor": {"enabled": True}}
    run = train(place.config("whole", **sections))
    module = tensors(run, 6, "module")
    for index, E in enumerate(COUNTS):
        start = f"module:model.layers.{index}.moe"
        assert len(module[f"{start}.experts.down_proj"]) == len(module[f"{start}.router.weight"]) == E
        assert balance == "loss" or E == 2 or module[f"{start}.router.selection_bias"].abs().sum() > 0
    steps = figures(run).values()
    assert all(1 <= step["greatest_load"] <= 2.5 for step in steps)  # 5 experts, 2 a token: all for one is 5/2
    assert balance == "bias" or all(0.9 < step["balance"] < 2 for step in steps)
    train(place.config("parts", **sections, train={"stop_after": 3}))
    parts = train(place.config("parts", **sections, resume="auto"))
    assert_same_bits(run, parts, 6)

    row = next(row for row in read_rows(run / "monitor") if row["step"] == 6)
    assert [len(load_E) for load_E in row["expert_load"]] == COUNTS
    assert all(sum(load_E) == pytest.approx(1, abs=1e-3) for load_E in row["expert_load"])
    main(["report", str(run)])
    assert (run / "plots" / "load.png").is_file() and "2 to 5 experts" in (run / "report.md").read_text()
    written = export_run(run, ExportOptions(output=tmp_path / "export"))
    assert json.loads((written.folder / "config.json").read_text())["moe"]["experts"] == COUNTS


def test_counts_and_costs_are_those_of_each_block(place):
    config = place.config(moe=UNEVEN)
    counts = parameter_counts(build_model(config))
    even = parameter_counts(build_model(place.config(moe={**UNEVEN, "experts": 2})))
    expert = 3 * 32 * load_base(config.model, torch.float32).config.intermediate_size
    assert counts["active"] - even["active"] == (3 + 1) * 32  # routers
    assert counts["trainable"] - even["trainable"] == (3 + 1) * (expert + 32)


def test_measurements_of_uneven_blocks():
    loads = [[0.5, 0.5], [0.01, 0.9, 0.03, 0.03, 0.03], [0.0, 0.0, 0.0]]
    row = {"expert_load": loads, "tokens": 10, "blocks": [0, 1, 4]}
    assert load_of(row).shape == (3, 5) and even_share(load_of(row)).tolist() == [1 / 2, 1 / 5, 1 / 3]
    entropy_L = load_entropy(row)
    expected = -sum(p * math.log(p) for p in loads[1]) / math.log(5)
    assert entropy_L[:2].tolist() == pytest.approx([1.0, expected]) and math.isnan(entropy_L[2])
    dead, overloaded = odd_experts([row])
    assert [(e.block, e.expert) for e in dead] == [(1, 0)] and [(e.block, e.expert) for e in overloaded] == [(1, 1)]
    assert mean_load([row, row])[1].tolist() == pytest.approx(loads[1])


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"experts": [4, 4]}, "has 2 numbers, and moe.layers chooses 3 of the base's 3 blocks"),
        ({"experts": [4, 1, 4]}, "moe.top_k is 2 but a block has only 1 experts"),
        ({"experts": []}, "is an empty list"),
        ({"experts": [0, 2, 2], "top_k": 1}, "must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(place, moe, words):
    with pytest.raises(ConfigError, match=words):
        build_model(place.config(moe=moe), meta=True)


def test_an_architecture_with_one_number_for_all_blocks_says_so(place, tmp_path):
    run = train(place.config("run", moe={**UNEVEN, "router": "sigmoid"}))
    with pytest.raises(ExportError, match="its blocks have one number of experts"):
        export_run(run, ExportOptions(output=tmp_path / "export", target="glm4_moe"))


def test_mean_inputs_and_their_similarity_against_the_model_s_own_states(place):
    """The input of an FFN is the norm of what attention leaves; here from outputs that transformers gives."""
    config = place.config()
    model = load_base(config.model, torch.float32)
    store = build_store(config.data.train[0], config.data, load_tokenizer(config.model), place.output / "cache")
    texts = list(documents([store], 16))
    assert sum(map(len, texts)) <= TOKENS and max(map(len, texts)) == 16
    got_LD = mean_inputs(model, iter(texts[:20]))
    seen = {index: [] for index in range(3)}
    for index, block in enumerate(model.model.layers):
        block.post_attention_layernorm.register_forward_hook(lambda *a, i=index: seen[i].append(a[2][0].double()))
    with torch.no_grad():
        for ids in texts[:20]:
            model(torch.from_numpy(ids)[None])
    for index in range(3):
        assert torch.allclose(got_LD[index], torch.cat(seen[index]).mean(0), atol=1e-6)
    vectors = torch.randn(3, 2, 8, dtype=torch.float64)
    cosine = nn.functional.cosine_similarity
    by_hand = [
        sum(cosine(vectors[a, i], vectors[b, i], dim=0) for a, b in ((0, 1), (0, 2), (1, 2))) / 3 for i in (0, 1)
    ]
    assert similarity(vectors) == pytest.approx([s.item() for s in by_hand])


def test_experts_are_allocated_by_the_inverse_of_similarity():
    # 1/0.5 : 1/0.25 : 1/1 = 2 : 4 : 1 of 14
    assert allocate([0.5, 0.25, 1.0], 14) == [4, 8, 2]
    assert allocate([0.5, 0.25, 1.0], 15) == [5, 9, 3] and allocate([0.5, 0.5], 8) == [4, 4]
    assert allocate([0.9, 0.01], 4, least=2) == [2, 4]
    assert most_moved([0.1, 0.2, 0.15, 0.17]) == [1, 3] and most_moved([0.2, 0.2]) == [0, 1]


def test_the_probe_s_answer_is_a_configuration(place, capsys):
    """The blocks that moved are those of a real run, by their tensors."""
    moved = train(place.config("moved", method="full", train={"steps": 2, "warmup": 0, "save_every": 2}))
    path = place.write(place.config("target", moe=UNEVEN | {"experts": 4}))
    main(["probe", "--config", str(path), "--moved", str(moved)])
    printed = capsys.readouterr().out
    moe = yaml.safe_load(printed[printed.index("moe:") :])["moe"]
    found = probe(load_config(path), moved=moved)
    base, trained = load_base(load_config(path).model, torch.float32), tensors(moved, 2, "module")
    for index, block in enumerate(base.model.layers):
        both = [(trained[f"module:model.layers.{index}.mlp.{n}"], w) for n, w in block.mlp.named_parameters()]
        share = sum((a - b).square().sum() for a, b in both) / sum(b.square().sum() for _, b in both)
        assert found.moved_L[index] == pytest.approx(share.sqrt().item(), rel=1e-4)
    assert moe["experts"] == found.experts and len(found.experts) == len(found.layers)
    config = place.config("given", moe={**UNEVEN, **moe})
    assert build_model(config, meta=True) is not None
    assert all(f"{s:.4f}" in printed for s in found.similarity_L) and "similarity of en, cy" in printed
    whole = probe(load_config(path), experts=3)
    assert whole.layers == [0, 1, 2] and whole.moved_L is None and 9 <= sum(whole.experts) <= 12


def test_a_run_that_tells_nothing_of_what_moves_is_refused(place):
    config = place.config("target")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        probe(config, moved=place.output / "nothing")
    other = train(place.config("other", train={"steps": 2, "warmup": 0, "save_every": 2}))
    with pytest.raises(ConfigError, match="only with `full` do FFNs move"):
        probe(config, moved=other)
    lonely = place.config("lonely", data={"train": [{"path": "cy.train.jsonl", "lang": "cy"}], "replay": None})
    with pytest.raises(ConfigError, match="has one language"):
        probe(lonely)
