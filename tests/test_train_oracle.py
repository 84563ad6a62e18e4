"""The trainer against a plain loop, and against itself run in another way: what must not change the result."""

import pytest
import torch
from plain_loop import train_plainly
from small_runs import figures, losses, tensors

from moect.model.build import build_model
from moect.train.loop import train

GATE = {"fusion": "gate", "experts": 4, "top_k": 2}
LANGUAGE_GATE = {"fusion": "add", "experts": 3, "top_k": 1, "router": "sigmoid", "language_gate": True}
LANGUAGE_GATE |= {"renormalise": False}
WEIGHTS = {"balance": 0.05, "z": 0.01, "gate": 0.5, "bias_rate": 0.01}
VARIANTS = {
    "gate and balance loss": {"moe": GATE, "loss": WEIGHTS},
    "language gate and balance loss": {"moe": LANGUAGE_GATE, "loss": WEIGHTS},
    "language gate, no old text in some steps": {"moe": LANGUAGE_GATE, "loss": WEIGHTS, "data": {"replay": 0.1}},
    "counting gate": {"moe": {**LANGUAGE_GATE, "gate_sees": "pairs"}, "loss": WEIGHTS},
    "language gate and the base's predictions": {"moe": LANGUAGE_GATE, "loss": {**WEIGHTS, "base_kl": 0.5}},
    "language gate and selection bias": {"moe": {**LANGUAGE_GATE, "balance": "bias"}, "loss": WEIGHTS},
    "discrete in one block": {"moe": {**GATE, "fusion": "discrete", "layers": [1], "width": 16}, "loss": WEIGHTS},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "block-expansion": {"method": "block-expansion", "expansion": {"layers": [1]}, "loss": {"base_kl": 0.5}},
}


def different(mine: dict, theirs: dict) -> list[str]:
    """Names of tensors of the same keys that do not have the same bits."""
    assert mine.keys() == theirs.keys() and mine
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_trainer_computes_what_a_plain_loop_written_from_the_formulas_computes(place, variant):
    settings = {"steps": 5, "schedule": "constant", "weight_decay": 0.1, "clip": 0.05, "micro_batch": 2}
    config = place.config(**VARIANTS[variant])
    for key, value in settings.items():
        setattr(config.train, key, value)
    config.data.sequence_length = 20
    run = train(config)
    steps, trained = train_plainly(config, place.output / "plain")

    got = figures(run)
    assert sorted(got) == [1, 2, 3, 4, 5]
    assert steps[4]["loss"] < steps[0]["loss"] - 0.03
    assert min(s["grad_norm"] for s in steps) > 0.05, "the clipping has nothing to do"
    for step, expected in enumerate(steps, start=1):
        keys = expected.keys() - {"total"}
        assert keys >= {"loss", "grad_norm"} and keys <= got[step].keys()
        for key in keys:
            assert got[step][key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (step, key)
    module = tensors(run, 5, "module")
    assert module.keys() == {f"module:{name}" for name in trained}
    for name, tensor in trained.items():
        # the weights of a gate that adds up are hundreds, whose last bit is 3e-5
        assert (module[f"module:{name}"] - tensor).abs().max() < 1e-5 * max(1, tensor.abs().max() / 10), name


def test_every_loss_takes_part_in_the_plain_loop(place):
    config = place.config(moe=LANGUAGE_GATE, loss=WEIGHTS)
    steps, _ = train_plainly(config, place.output / "plain")
    assert steps[0].keys() == {"loss", "balance", "z", "gate", "grad_norm", "total"}
    parts = steps[0]["loss"] + 0.05 * 1.0 + 0.01 * steps[0]["z"] + 0.5 * steps[0]["gate"]
    assert steps[0]["total"] == pytest.approx(parts, abs=1e-5), "before the first step the load counts as uniform"
    assert all(abs(step["balance"] - 1) > 1e-3 for step in steps)


@pytest.mark.parametrize(
    "variant",
    ["gate and balance loss", "language gate and balance loss", "language gate and the base's predictions"],
)
def test_accumulation_does_not_change_the_losses(place, variant):
    runs = {
        size: losses(train(place.config(f"micro-{size}", **VARIANTS[variant], train={"micro_batch": size})))
        for size in (8, 4, 2)
    }
    assert runs[4] == pytest.approx(runs[8], abs=2e-5) and runs[2] == pytest.approx(runs[8], abs=2e-5)
    assert len(set(runs[8])) == 6


def test_zero_stages_give_the_same_losses_and_module(place):
    runs = [
        train(place.config(f"zero-{stage}", **VARIANTS["gate and balance loss"], train={"zero_stage": stage}))
        for stage in range(4)
    ]
    expected = tensors(runs[0], 6)
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), abs=1e-5)
        found = tensors(run, 6)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() < 1e-5, (run.name, name)


def test_zero_stages_take_the_same_steps_in_bf16(place):
    """Rounding apart: AdamW's first step moves every entry by lr, so one that counts from elsewhere shows at once."""
    settings = {"precision": "bf16", "warmup": 0, "eps": 1e-12, "schedule": "constant", "stop_after": 1}
    runs = [train(place.config(f"zero-{stage}", train={**settings, "zero_stage": stage})) for stage in range(4)]
    start = {name: p.detach().float() for name, p in build_model(place.config(train=settings)).named_parameters()}
    for run in runs:
        for name, tensor in tensors(run, 1, "module").items():
            step = (tensor - start[name.removeprefix("module:")]).abs()
            assert step.median() == pytest.approx(0.01, rel=1e-2) or step.median() == 0, (run.name, name)
            assert step.max() < 0.0101, (run.name, name)


@pytest.mark.parametrize("variant", ["gate and balance loss", "language gate and balance loss", "full"])
def test_activation_checkpointing_changes_no_bit(place, variant):
    kept = train(place.config("kept", **VARIANTS[variant]))
    again = train(place.config("again", **VARIANTS[variant], train={"activation_checkpointing": True}))
    assert losses(kept) == losses(again)
    assert different(tensors(kept, 6), tensors(again, 6)) == []


def test_the_same_run_twice_gives_the_same_bits_and_another_seed_others(place):
    first, second = train(place.config("first")), train(place.config("second"))
    other = train(place.config("other", seed=6))
    assert losses(first) == losses(second) != losses(other)
    assert different(tensors(first, 6), tensors(second, 6)) == []
    assert different(tensors(first, 6), tensors(other, 6))
