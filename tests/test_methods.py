"""Methods as one key, and what a stage trains of them: against formulas, and by what moves."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import REPOSITORY, assert_same_bits, launch, tensors
from tiny import disturb, logits, tiny_model, tokens

from moect.config import NAMED, config_from_dict
from moect.errors import ConfigError
from moect.export.run import ExportOptions, export_run
from moect.model import ForwardRecord, MoeConfig, append_moe, losses
from moect.model.append import PARTS
from moect.model.embeddings import append_rows, rows_of
from moect.model.record import BlockRecord
from moect.monitor.rows import read_rows
from moect.stages import load_stages, run_stages
from moect.train.loop import train
from moect.train.objective import Objective, StepCounts

COUNTS = {"fusion": "add", "language_gate": True, "gate_sees": "pairs"}
ROUTED = {"fusion": "routed", "experts": 4}


def module(folder):
    return {name.removeprefix("module:"): tensor for name, tensor in tensors(folder, 6, "module").items()}


@pytest.mark.parametrize("method", NAMED)
def test_a_named_method_is_the_module_that_it_stands_for(place, method):
    values = place.values(method=method)
    values["moe"] = {"experts": 3}
    config = config_from_dict(values)
    assert config.method == "moe-ct" and config.moe.experts == 3
    assert {key: getattr(config.moe, key) for key in NAMED[method]} == NAMED[method]
    values["moe"] = {"fusion": "discrete"}
    with pytest.raises(ConfigError, match=f"`method: {method}` has moe.fusion: .*says 'discrete'"):
        config_from_dict(values)


def test_language_prior_is_the_cross_entropy_toward_the_frozen_ffn_on_old_tokens():
    torch.manual_seed(0)
    logits = [torch.randn(30, 4, requires_grad=True) for _ in range(2)]
    record = ForwardRecord(blocks={i: BlockRecord(x.topk(2).indices, x) for i, x in enumerate(logits)})
    role = torch.tensor([0, 1, -1] * 10, dtype=torch.int8)
    got = losses.language_prior_sum(record, role)
    target = torch.zeros(10, dtype=torch.int64)
    expected = sum(torch.nn.functional.cross_entropy(x[role == 0], target, reduction="sum") for x in logits) / 2
    assert torch.allclose(got, expected, rtol=1e-6)
    got.backward()
    assert (logits[0].grad[role != 0] == 0).all() and (logits[0].grad[role == 0][:, 0] < 0).all()
    assert losses.language_prior_sum(record, torch.ones_like(role)).item() == 0  # and not NaN


@pytest.mark.parametrize("gate", [False, True])
def test_divergence_from_the_base_is_that_of_two_models_in_parts_or_whole(monkeypatch, gate):
    """Zero at the start, without gradient into the base's side, and none where no text is old."""
    model = append_moe(tiny_model("qwen3"), MoeConfig(fusion="add", width=16, language_gate=gate))
    append_rows(model, [5, 9], 96, [[3, 4]])
    config = config_from_dict(
        {
            "model": {"base": "x"},
            "moe": {"fusion": "add", "language_gate": gate},
            "loss": {"base_kl": 1.0},
            "data": {"languages": {"en": "old", "cy": "new"}, "train": [{"path": p, "lang": p} for p in ("en", "cy")]},
        }
    )
    objective, ids = Objective(model.train(), config), tokens(4, 12)
    role, places = torch.tensor([[0] * 12, [1] * 12, [1] * 6 + [0] * 6, [-1] * 12], dtype=torch.int8), torch.arange(12)

    def loss(role):
        objective.sums.clear()
        objective(ids, ids, places.expand(4, -1), role, StepCounts(44, 36, 18, 18), 1.0).backward()
        return objective.sums["base_kl"].item()

    with torch.no_grad():
        rows_of(model)[-1].delta[-1] = -100 * model.lm_head.weight.sum(0)  # what is added is not the base's
    start = loss(role)
    disturb(model, scale=0.3)
    model.zero_grad()
    whole, gradients = loss(role), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        base_TV = logits(tiny_model("qwen3"), ids)[role == 0].log_softmax(-1)
        model_TV = logits(model, ids)[role == 0].log_softmax(-1)[:, :96]
    assert whole == pytest.approx((base_TV.exp() * (base_TV - model_TV)).sum().item(), rel=1e-4) and whole > start
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 500)
    model.zero_grad()
    assert loss(role) == pytest.approx(whole, rel=1e-5)
    for name, p in model.named_parameters():
        assert p.grad is None or torch.allclose(p.grad, gradients[name], atol=1e-5), name
    assert loss(torch.ones_like(role)) == 0


def test_balance_over_trained_experts_does_not_see_the_frozen_one():
    torch.manual_seed(0)
    logits_TE = torch.randn(50, 4, requires_grad=True)
    record = ForwardRecord(blocks={0: BlockRecord(logits_TE.topk(2).indices, logits_TE)})
    valid = torch.ones(50, dtype=torch.bool)
    load = losses.expert_counts(record, 4, valid)
    loss = losses.balance_loss(
        (load / load.sum()).float(), losses.score_sums(record, "softmax", valid, first=1) / 50, first=1
    )
    f = load[0, 1:] / load[0, 1:].sum()
    p = logits_TE[:, 1:].double().softmax(-1).mean(0)
    assert loss.item() == pytest.approx(3 * (f * p).sum().item(), rel=1e-5)
    loss.backward()
    assert (logits_TE.grad[:, 0] == 0).all() and logits_TE.grad[:, 1:].abs().max() > 0


def test_the_review_moves_the_router_alone_and_brings_old_tokens_to_the_frozen_ffn(place):
    first = train(place.config("learn", moe=ROUTED))
    review = {
        "model": {"start": str(first)},
        "data": {"replay": 0.5},
        "train": {"parts": ["router"], "lr": 3e-2},
        "loss": {"language_prior": 1.0, "balance": 0.0},
    }
    second = train(place.config("review", moe=ROUTED, **review))
    before, after = module(first), module(second)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (".router." not in name), name
    lines = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    prior = [line["language_prior"] for line in lines if "language_prior" in line]
    assert prior[-1] < 0.9 * prior[0]
    plan = next(line["plan"] for line in lines if line.get("event") == "start")
    assert plan["parameters"]["trainable"] == sum(after[n].numel() for n in after if ".router." in n)


@pytest.mark.parametrize("part", PARTS)
def test_exactly_the_named_part_trains(place, part):
    moe = {"experts": 3} | ({} if part == "fusion" else {"fusion": "add", "language_gate": True})
    model = {"train_embeddings": "all"}
    first = train(place.config("learn", moe=moe, model=model))
    changed = {"model": {**model, "start": str(first)}, "train": {"parts": [part]}}
    second = train(place.config("second", moe=moe, **changed))
    before, after = module(first), module(second)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and moved == {name for name in before if PARTS[part] in name and not name.endswith((".ids", ".opens"))}


@pytest.mark.parametrize(
    ("stage", "precision", "ranks"),
    [(3, "bf16", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "fp32", 0), (2, "bf16", 0)))],
)
def test_a_stage_of_one_part_resumes_to_the_bit_and_is_exported_whole(place, stage, precision, ranks, tmp_path):
    """With ZeRO-3 what is held is divided among the ranks, as the base is."""
    settings = {"zero_stage": stage, "precision": precision, "batch_size": 4, "micro_batch": 2}

    def run(name, *overrides, **sections):
        launch(place.write(place.config(name, moe=ROUTED, **sections)), ranks, *overrides)
        return place.output / name

    learned = run("learn", train=settings)
    review = {
        "model": {"start": str(learned)},
        "data": {"replay": 0.5},
        "loss": {"language_prior": 0.5},
        "train": {**settings, "parts": ["router"]},
    }
    whole = run("whole", **review)
    resumed = run("resumed", "train.stop_after=3", **review)
    run("resumed", "resume=auto", **review)
    assert_same_bits(whole, resumed, 6)
    held, now = module(learned), module(resumed)
    cast = (lambda t: t.bfloat16().float()) if precision == "bf16" else (lambda t: t)
    assert held.keys() == now.keys()
    assert all(torch.equal(cast(held[n]), now[n]) for n in held if ".router." not in n)
    export_run(resumed, ExportOptions(output=tmp_path / "export", checkpoint="step-6"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train": {"parts": []}}, "`train.parts` is empty"),
        ({"train": {"parts": ["router"]}}, "experts that never learned anything"),
        ({"train": {"parts": ["router"]}, "method": "full"}, "is for `method: moe-ct`"),
        ({"train": {"parts": ["rooter"]}}, "train.parts"),
        ({"train": {"parts": ["gate", "experts"]}, "moe": COUNTS}, "one that sees `pairs` counts and does not train"),
        ({"loss": {"language_prior": 0.1}}, "needs the frozen FFN among the experts"),
        ({"loss": {"language_prior": 0.1}, "moe": ROUTED, "data": {"replay": 0.0}}, "none is read"),
        ({"loss": {"base_kl": 0.1}, "method": "full"}, "needs the frozen base inside the model"),
        ({"loss": {"base_kl": 0.1}, "model": {"base": "x", "extend_tokenizer": 9}}, "which cannot read the tokens of"),
        ({"loss": {"base_kl": 0.1}, "data": {"replay": 0.0}}, "`loss.base_kl` is about text of old languages"),
        ({"loss": {"balance_over": "trained"}}, "needs the frozen FFN among the experts"),
        ({"loss": {"balance_over": "trained"}, "moe": {**ROUTED, "experts": 2}}, "nothing to balance"),
    ],
)
def test_what_makes_no_sense_is_refused(place, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        place.config(**changes)


def test_a_part_that_the_model_does_not_have_is_refused(place):
    first = train(place.config("learn", moe=ROUTED))
    with pytest.raises(ConfigError, match="train.parts names `gate`, and nothing of that was appended; there are expe"):
        train(place.config("second", moe=ROUTED, model={"start": str(first)}, train={"parts": ["gate"]}))


def test_the_shipped_two_stage_configuration_runs(place):
    """configs/moe-lpr.yaml, with this test's base and text."""
    stages = load_stages(REPOSITORY / "configs/moe-lpr.yaml")
    assert [s.train.parts for s in stages] == ["all", ["router"]]
    assert stages[0].data.replay == 0 and stages[1].loss.language_prior == 0.1
    values = place.values()
    del values["data"]["replay"], values["train"]["lr"]
    small = [f"{part}.{key}={json.dumps(value)}" for part in ("data", "train") for key, value in values[part].items()]
    overrides = [f"output={place.output}", "name=lpr", f"model.base={values['model']['base']}", *small]
    stages = load_stages(REPOSITORY / "configs/moe-lpr.yaml", overrides)
    run_stages(stages)
    assert {row["step"] for row in read_rows(place.output / "lpr/review/monitor")} == {0, 3, 6}
