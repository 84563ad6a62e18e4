"""What a run leaves behind: in memory, in its checkpoints, and in the files that people read."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from small_runs import ROLES, Place, checkpoint, events, figures, losses, tensors

from moect import distributed
from moect.config import load_config
from moect.errors import TrainingError
from moect.model import build
from moect.train.loop import Run, train

METHODS = {
    "moe-ct, gate": {"moe": {"fusion": "gate", "balance": "bias"}},
    "moe-ct, language gate": {"moe": {"fusion": "add", "language_gate": True, "router": "sigmoid"}},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "block-expansion": {"method": "block-expansion", "expansion": {"layers": [1]}},
}
ROW_KEYS = {"step", "lang", "role", "domain", "bits_per_byte", "base_bits_per_byte", "delta", "bytes"}


def digests(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def go(config) -> tuple[Run, dict, dict]:
    """The run after its training, and all tensors of its model before and after."""
    run = Run(config, *distributed.start())
    model = run.objective.model
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    try:
        run.go()
    finally:
        run.close()
    return run, before, {name: t.detach().clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_moves_and_nothing_else_does(place, method):
    on_disk = digests(place.inputs)
    config = place.config(**METHODS[method], train={"steps": 8, "zero_stage": 0})
    run, before, after = go(config)
    assert digests(place.inputs) == on_disk and on_disk
    trains = {name for name, p in run.objective.model.named_parameters() if p.requires_grad}
    if config.method == "full":
        assert trains == {name for name, _ in run.objective.model.named_parameters()}
    else:
        mark = {"moe-ct": ".moe.", "lora": ".lora_", "block-expansion": ".inserted."}[config.method]
        assert trains == {name for name in before if mark in name and "selection_bias" not in name}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if config.method == "full":  # the embedding of the output is counted once in parameters, if it is tied
        assert trains <= moved
    else:
        assert moved - {name for name in moved if "selection_bias" in name} == trains
        base = load_file(place.inputs / "base" / "model.safetensors")
        names = {name.replace(".base_layer", ""): name for name in after}
        assert base.keys() <= names.keys() and all(torch.equal(base[name], after[names[name]]) for name in base)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_holds_what_trains_and_nothing_else(place, method):
    run, _, after = go(place.config(**METHODS[method]))
    trains = {name for name, p in run.objective.model.named_parameters() if p.requires_grad}
    buffers = {name for name in after if "selection_bias" in name}
    module = tensors(run.folder, 6, "module")
    assert module.keys() == {f"module:{name}" for name in trains | buffers}
    assert all(torch.equal(tensor, after[name.removeprefix("module:")]) for name, tensor in module.items())
    moments = {f"optimizer:{moment}.{name}" for name in trains for moment in ("exp_avg", "exp_avg_sq")}
    assert tensors(run.folder, 6, "optimizer").keys() == moments
    assert bool(buffers) == (method == "moe-ct, gate")


def test_bf16_run_learns_and_keeps_its_masters_selection_bias_and_rotary_frequencies_in_fp32(place):
    config = place.config(**METHODS["moe-ct, gate"], loss={"bias_rate": 0.01}, train={"precision": "bf16", "steps": 12})
    run, _, after = go(config)
    assert sum(losses(run.folder)[-3:]) < sum(losses(run.folder)[:3]) - 0.5
    kinds = {t.dtype for name, t in after.items() if "selection_bias" not in name}
    assert kinds == {torch.bfloat16}
    bias = after["model.layers.0.moe.router.selection_bias"]
    assert bias.dtype == torch.float32 and bias.any()
    rotary = run.objective.model.model.rotary_emb.inv_freq
    expected = build.load_base(config.model, torch.float32).model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32 and torch.equal(rotary, expected)
    saved = tensors(run.folder, 12)
    assert {t.dtype for name, t in saved.items() if not name.startswith("trainer:")} == {torch.float32}
    masters = {name: t for name, t in saved.items() if name.startswith("module:") and "selection_bias" not in name}
    assert all(torch.equal(t.bfloat16(), after[name.removeprefix("module:")]) for name, t in masters.items())
    assert any(not torch.equal(t, t.bfloat16().float()) for t in masters.values())


@pytest.fixture(scope="module")
def measured(inputs, tmp_path_factory):
    """A finished run with everything on: two roles, a language gate, the monitor."""
    place = Place(inputs, tmp_path_factory.mktemp("measured"))
    sections = {**METHODS["moe-ct, language gate"], "loss": {"balance": 0.05, "z": 0.01, "gate": 1.0}}
    return train(place.config(**sections, monitor={"enabled": True}))


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "monitor" / "forgetting.jsonl").read_text().splitlines()]


def test_forgetting_has_one_object_for_every_checkpoint_language_and_domain(measured):
    found = [(row["step"], row["lang"], row["domain"]) for row in rows(measured)]
    assert sorted(found) == sorted((step, lang, "held-out") for step in (0, 3, 6) for lang in ROLES)
    for row in rows(measured):
        assert row.keys() >= ROW_KEYS and row["role"] == ROLES[row["lang"]]
        assert row["delta"] == row["bits_per_byte"] - row["base_bits_per_byte"] and row["bytes"] > 0


def test_before_the_first_step_the_silent_module_changes_nothing_at_all(measured):
    assert [row["delta"] for row in rows(measured) if row["step"] == 0] == [0.0, 0.0]
    assert all(row["delta"] != 0.0 for row in rows(measured) if row["step"] == 6 and row["role"] == "new")


@pytest.mark.parametrize("method", METHODS)
def test_before_the_first_step_every_method_has_the_loss_of_the_base(place, method):
    run = train(place.config(**METHODS[method], monitor={"enabled": True}, train={"stop_after": 1}))
    deltas = [row["delta"] for row in rows(run) if row["step"] == 0]
    assert len(deltas) == 2 and deltas == pytest.approx([0.0, 0.0], abs=1e-5)


def test_log_has_a_line_with_figures_for_every_step_and_one_for_every_event(measured):
    assert sorted(figures(measured)) == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "lr", "grad_norm", "old_share", "greatest_load", "balance", "z", "gate"}
    wanted |= {"tokens_per_second", "mfu", "step_seconds"}
    for line in figures(measured).values():
        assert line.keys() >= wanted and all(math.isfinite(line[key]) for key in wanted)
        assert 0 < line["old_share"] < 1 and line["greatest_load"] >= 1
    told = [(line["event"], line["step"]) for line in events(measured)]
    seen = lambda step: [("monitor", step), ("verdict", step)]  # noqa: E731
    of_base, *rest = told
    assert of_base == ("monitor", 0)
    saved = [("checkpoint", 3), *seen(3), ("checkpoint", 6), *seen(6)]
    assert rest == [("start", 0), *seen(0), *saved, ("base", 6), ("end", 6)]
    assert events(measured)[1]["plan"] == json.loads((measured / "plan.json").read_text())


def test_lines_are_written_every_so_many_steps_and_at_the_last(place):
    run = train(place.config(train={"log_every": 4}))
    assert sorted(figures(run)) == [4, 6]


def test_tensorboard_holds_the_scalars_of_the_log_and_of_the_monitor(measured):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events_of = EventAccumulator(str(measured / "tensorboard"))
    events_of.Reload()
    tags = set(events_of.Tags()["scalars"])
    assert tags >= {
        f"train/{name}" for name in ("loss", "lr", "grad_norm", "balance", "gate", "tokens_per_second", "mfu")
    }
    assert tags >= {f"monitor/{lang}/held-out/{name}" for lang in ROLES for name in ("bits_per_byte", "delta")}
    assert tags >= {f"routing/{lang}/held-out/gate" for lang in ROLES}
    loss = {event.step: event.value for event in events_of.Scalars("train/loss")}
    assert loss == pytest.approx({step: line["loss"] for step, line in figures(measured).items()}, rel=1e-6)


def test_run_s_configuration_is_read_back_as_it_was(measured, place):
    config = load_config(measured / "config.yaml")
    assert config.folder == measured and config.train.steps == 6 and config.moe.language_gate


def test_only_the_newest_checkpoints_are_kept(place):
    run = train(place.config(train={"save_every": 1, "keep_last": 2}))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-5", "step-6"]
    run = train(place.config("all", train={"save_every": 1, "keep_last": 0}))
    assert len(list((run / "checkpoints").iterdir())) == 6


def test_run_that_diverges_stops_with_advice_and_makes_no_checkpoint_of_it(place):
    train_ = {"lr": 1e30, "warmup": 0, "log_every": 6, "save_every": 1, "keep_last": 0}
    config = place.config(method="full", train=train_, health={"max_skips": 2, "max_rollbacks": 0})
    with pytest.raises(TrainingError, match=r"2 steps were skipped in a row \(the last: loss (nan|inf)\).*train.lr"):
        train(config)
    paths = list((config.folder / "checkpoints").iterdir())
    assert len(paths) < 6
    assert all(t.isfinite().all() for path in paths for t in load_file(path / "module.safetensors").values())


def test_existing_folder_is_not_trained_into(place):
    run = train(place.config())
    before = digests(run)
    with pytest.raises(Exception, match="exists: go on from it with resume=auto, or choose another name"):
        train(place.config())
    assert digests(run) == before and checkpoint(run, 6).is_dir()
