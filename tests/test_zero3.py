"""ZeRO-3 with a base that is divided while it is loaded: who holds what, and that nothing else is different."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_helpers import export_run
from safetensors.torch import load_file, save_file
from small_runs import REPOSITORY, VOCABULARY, Place, checkpoint, copy_run, free_port, losses, tensors
from tiny import SHAPE, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from moect.config import config_from_dict
from moect.errors import ConfigError
from moect.model.build import load_base
from moect.train.loop import train

LANGUAGE_GATE = {"fusion": "add", "experts": 4, "top_k": 2, "language_gate": True}
# 16 experts for 24 tokens of a row, one each: on some ranks some have nothing to do
IDLE = {"experts": 16, "top_k": 1, "renormalise": False}
LOSSES = {"balance": 0.05, "z": 0.01, "gate": 1.0}
AGAIN = {"activation_checkpointing": True}
VARIANTS = {
    "gate from copies, tied head, recomputed": {"model": "tied", "train": AGAIN},
    "one block, idle experts, recomputed": {
        "moe": {**LANGUAGE_GATE, **IDLE, "layers": [1]},
        "loss": LOSSES,
        "train": AGAIN,
        "monitor": {"enabled": True},
    },
    "counting gate, recomputed": {"moe": {**LANGUAGE_GATE, "gate_sees": "pairs"}, "loss": LOSSES, "train": AGAIN},
    "low rank": {"method": "lora"},
}
MORE_VARIANTS = {
    "everything, tied head": {"method": "full", "model": "tied"},
    "gate from copies": {},
    "gate from copies, idle experts": {"moe": IDLE, "loss": LOSSES},
    "language gate": {"moe": LANGUAGE_GATE, "loss": LOSSES, "monitor": {"enabled": True}},
    "language gate, recomputed": {"moe": LANGUAGE_GATE, "loss": LOSSES, "train": AGAIN},
    "selection bias": {"moe": {**LANGUAGE_GATE, "balance": "bias"}, "loss": {**LOSSES, "bias_rate": 0.01}},
    "discrete in one block": {"moe": {"fusion": "discrete", "layers": [1], "width": 16}},
    "everything": {"method": "full"},
    "everything, recomputed": {"method": "full", "train": AGAIN},
    "everything, from scratch": {"method": "full", "model": "scratch"},
    "language gate, the base's predictions": {"moe": LANGUAGE_GATE, "loss": {**LOSSES, "base_kl": 0.3}},
    "inserted blocks": {"method": "block-expansion", "expansion": {"layers": "all"}},
    "inserted blocks, recomputed": {"method": "block-expansion", "expansion": {"layers": [0]}, "train": AGAIN},
    "low rank, recomputed": {"method": "lora", "train": AGAIN},
    "bf16": {"train": {"precision": "bf16"}},
}


def configured(place: Place, name: str, run: str, stage: int, steps: int, **keys) -> dict:
    """A run of a variant, as plain values."""
    variant = (VARIANTS | MORE_VARIANTS)[name]
    train = {"steps": steps, "save_every": steps // 2, "micro_batch": 2, "weight_decay": 0.1, "zero_stage": stage}
    train |= variant.get("train", {})
    model = models(place)[variant.get("model", "base")]
    return place.values(f"{name} {run}", **{**variant, "model": model, "train": train}, **keys)


def train_everything(place: Place, variants: dict, steps: int, ranks: int) -> None:
    """Every variant four times: `2`, under ZeRO-2 on one rank; `3`, under ZeRO-3 on several; and each of the two from
    the middle on as the other."""
    for name in variants:
        train(config_from_dict(configured(place, name, "2", 2, steps)))
        to_the_middle(place, f"{name} 2", f"{name} 2 to 3", steps)
    wanted = []
    for name in variants:
        wanted.append({"train": configured(place, name, "3", 3, steps)})
        wanted.append({"train": configured(place, name, "2 to 3", 3, steps, resume="auto")})
    launch(place, wanted, ranks)
    for name in variants:
        to_the_middle(place, f"{name} 3", f"{name} 3 to 2", steps)
        train(config_from_dict(configured(place, name, "3 to 2", 2, steps, resume="auto")))


def to_the_middle(place: Place, run: str, name: str, steps: int) -> None:
    """A copy of a run without its last checkpoint."""
    shutil.rmtree(checkpoint(copy_run(place.output / run, name), steps))


def models(place: Place) -> dict[str, dict]:
    """The bases of the variants."""
    tied = place.output / "tied"
    if not tied.exists():
        shutil.copytree(place.inputs / "base", tied)
        tiny_model("llama", vocab_size=VOCABULARY, initializer_range=0.2, tie_word_embeddings=True).save_pretrained(
            tied
        )
    shape = {**SHAPE, "model_type": "qwen3", "vocab_size": VOCABULARY}
    return {
        "base": {},
        "tied": {"base": str(tied)},
        "scratch": {"base": None, "tokenizer": str(place.inputs / "base"), "from_config": shape},
    }


def launch(place: Place, wanted: list[dict], ranks: int, **environment: str) -> None:
    """Do all jobs in one process a rank."""
    path = place.output / "jobs.json"
    path.write_text(json.dumps(wanted))
    launcher = Path(sys.executable).parent / "deepspeed"
    worker = REPOSITORY / "tests" / "zero3_worker.py"
    command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), worker, path]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launched}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def built(place: Place, name: str) -> list[dict]:
    """What each rank told of a run's model."""
    return [json.loads(path.read_text()) for path in sorted(place.output.glob(f"{name}-[0-9].json"))]


def check(place: Place, name: str, steps: int, ranks: int) -> None:
    """A variant: no rank held more than its share, and ZeRO-3 changed nothing."""
    told = built(place, f"{name} 3")
    assert len(told) == ranks
    for rank in told:
        # LoRA's own few parameters are divided later, with the optimizer
        assert not [n for n in rank["whole"] if ".lora_" not in n], name
        assert rank["parameters"] > 30_000
        padding = rank["pieces"] * ranks - rank["parameters"]
        assert 0 <= padding <= rank["tensors"] * (ranks - 1), name
        assert rank["different"] == [], name
    runs = [place.output / f"{name} {end}" for end in ("2", "3", "3 to 2", "2 to 3")]
    # bf16 rounds sums of other orders to other values
    near = {"rel": 1e-4} if name != "bf16" else {"rel": 0.05}
    expected = tensors(runs[0], steps)
    for run in runs[1:]:
        assert len(losses(run)) == steps
        assert losses(run) == pytest.approx(losses(runs[0]), **near), run.name
        found = tensors(run, steps)
        assert found.keys() == expected.keys()
        if name != "bf16":
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5, msg=f"{run.name}: {key}")


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """The variants of the default suite, trained on two ranks."""
    place = Place(inputs, tmp_path_factory.mktemp("zero3"))
    train_everything(place, VARIANTS, 4, ranks=2)
    return place


@pytest.mark.parametrize("name", VARIANTS)
def test_each_rank_builds_its_share_of_the_same_model_and_trains_as_under_zero_2(trained, name):
    check(trained, name, 4, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_trained_divided_exports_as_what_was_not(trained, name):
    exports = [export_run(trained.output / f"{name} {run}") for run in ("2", "3")]
    whole, divided = (load_file(path / "model.safetensors") for path in exports)
    assert divided.keys() == whole.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(divided[key], tensor, rtol=0, atol=1e-5, msg=key)


def test_after_a_divided_model_the_same_process_loads_whole_ones(place):
    settings = {"steps": 3, "weight_decay": 0.1}
    divided, whole = (train(place.config(f"zero-{stage}", train={**settings, "zero_stage": stage})) for stage in (3, 2))
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(place.inputs / "base")
    expected = load_file(place.inputs / "base" / "model.safetensors")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def change(tensors: dict, how: str) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "another shape":
        tensors[name] = tensors[name][:, :-8].contiguous()
    else:
        del tensors[name]


@pytest.mark.parametrize("how", ["another shape", "none of that name"])
def test_a_base_whose_files_do_not_fit_its_config_is_refused(place, how):
    base = Path(shutil.copytree(place.inputs / "base", place.output / "base"))
    weights = load_file(base / "model.safetensors")
    change(weights, how)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"(?s)model\.base .*model\.layers\.1\.mlp\.down_proj\.weight"):
        load_base(place.config(model={"base": str(base)}).model, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_variant_on_more_ranks_and_for_longer(place, ranks):
    variants = VARIANTS | MORE_VARIANTS
    train_everything(place, variants, 20, ranks)
    for name in variants:
        check(place, name, 20, ranks)


@pytest.mark.slow
def test_loading_a_base_takes_each_rank_its_share_of_memory(place):
    """Measured by the kernel; the allocator is told to give back at once what is freed. The files are in another dtype,
    as equal ones would only be mapped and not be held by anybody."""
    shape = {**SHAPE, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 7, "vocab_size": 8000}
    base = place.output / "base"
    config = AutoConfig.for_model("qwen3", **{**shape, "num_attention_heads": 8, "head_dim": 128})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="30MB")
    assert len(list(base.glob("*.safetensors"))) > 4
    size = 2 * sum(path.stat().st_size for path in base.glob("*.safetensors"))  # in fp32
    assert size > 300 * 2**20
    small = place.values("small", train={"zero_stage": 3})  # first, so that libraries are there already
    large = place.values("large", train={"zero_stage": 3}, model={"base": str(base)})
    launch(place, [{"weigh": small}, {"weigh": large}], ranks=2, MALLOC_MMAP_THRESHOLD_="65536")
    first, second = built(place, "large")
    for rank in (first, second):
        assert rank["in the end"] < size / 2 + 20 * 2**20
    embeddings = 8000 * 1024 * 4  # the largest tensor, whole for a moment
    assert second["most"] < size / 2 + 3 * embeddings
