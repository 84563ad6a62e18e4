"""The numbers that a run announces, against counting."""

import json
from contextlib import nullcontext

import pytest
import torch
from small_runs import VOCABULARY
from tiny import FAMILIES, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from moect.cli import main
from moect.data.batches.loader import Loader
from moect.data.reading import evaluation
from moect.data.reading.evaluation import load_evaluation
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.model import losses
from moect.model.append import base_only, modules_of
from moect.model.build import build_model, parameter_counts
from moect.model.flops import training_flops_per_token
from moect.monitor.measuring.cost import count_passes, forward_flops, planned_lengths
from moect.monitor.measuring.score import score
from moect.monitor.measuring.windows import tokenise
from moect.plan import make_plan, memory_per_rank, render
from moect.train.loop import train
from moect.train.meters import GPUS
from moect.train.objective import Objective, StepCounts

D, F, V, L, E, K = 32, 64, VOCABULARY, 3, 4, 2  # width, FFN width, vocabulary, blocks, experts, experts per token


def brute_force(method: str) -> dict[str, int]:
    """Parameters of the tiny Qwen3 and of what is added to it, from the shapes by hand."""
    heads, kv_heads, head = 4, 2, 8
    attention = D * heads * head * 2 + D * kv_heads * head * 2 + 2 * head  # q and o, k and v, their two norms
    base = V * D * 2 + D + L * (attention + 3 * D * F + 2 * D)
    if method == "full":
        return {"total": base, "trainable": base, "active": base}
    expert = 3 * D * F
    gate = 2 * (D * (D // 4) + D // 4) + (D // 4 + 1)
    module = L * (E * D + E * expert + gate)
    return {"total": base + module, "trainable": module, "active": base + module - L * (E - K) * expert}


@pytest.mark.parametrize("method", ["full", "moe-ct"])
def test_parameters_are_counted_as_by_hand(place, method):
    config = place.config(method=method)
    for meta in (False, True):
        assert parameter_counts(build_model(config, meta=meta)) == brute_force(method)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_are_counted_once(family):
    tied, untied = (tiny_model(family, tie_word_embeddings=t).requires_grad_(True) for t in (True, False))
    assert parameter_counts(untied)["total"] - parameter_counts(tied)["total"] == untied.lm_head.weight.numel()


@pytest.mark.parametrize(
    "moe", [{"fusion": "gate"}, {"fusion": "add", "layers": [1, 2]}, {"fusion": "add", "width": 16}]
)
@pytest.mark.parametrize("method", ["full", "moe-ct", "block-expansion"])
def test_flops_of_training_are_those_that_torch_counts(place, method, moe):
    """Torch counts the products of attention over whole squares: the formula's half is for the causal mask.

    Left out on both sides: everything element-wise. Counted by the formula only: in the lowest block with a module, the
    gradients of the module's inputs, which nothing needs; here some 6 per cent.
    """
    config = place.config(
        method=method, moe={**moe, "experts": E, "top_k": K}, expansion={"layers": moe.get("layers", "all")}
    )
    config.model.attention = "eager"
    model = build_model(config).train()
    S = 64
    ids = torch.randint(3, V, (1, S), generator=torch.Generator().manual_seed(0))
    for module in modules_of(model)[:1]:
        module.experts.choose()  # the counter knows those operators only that there are when it is made
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    squares = counts.pop("aten.bmm")
    assert squares > 0 and counts
    counted = (sum(counts.values()) + squares / 2) / S
    assert 0.99 * counted < training_flops_per_token(model, S, recompute=False) < 1.08 * counted


def test_activation_checkpointing_adds_one_forward_of_the_blocks(place):
    model = build_model(place.config(method="full"))
    once, twice = (training_flops_per_token(model, 64, recompute) for recompute in (False, True))
    head = 2 * V * D
    assert twice - once == pytest.approx((once - 3 * head) / 3, abs=2)  # a step is three forwards


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_follows_the_formula_of_the_stage(place, precision, stage, ranks):
    config = place.config(train={"precision": precision, "zero_stage": stage, "micro_batch": 2})
    memory = memory_per_rank(config, build_model(config), ranks)
    count = brute_force("moe-ct")
    element = {"fp32": 4, "bf16": 2}[precision]
    states = 2 if (precision, stage) == ("fp32", 0) else 3  # moments, and a master copy where the weights are not it
    share = {purpose: ranks if stage >= least else 1 for purpose, least in (("o", 1), ("g", 2), ("w", 3))}
    assert memory["weights"] == count["total"] * element // share["w"]
    low_precision = 2 * count["trainable"] if precision == "bf16" and stage < 2 else 0
    assert memory["gradients"] == count["trainable"] * 4 // share["g"] + low_precision
    assert memory["optimizer"] == count["trainable"] * 4 * states // share["o"]
    assert memory["activations"] > 0


def objective_flops(place, chunk_elements: int, monkeypatch, **sections) -> tuple[float, int]:
    """Operations a token of a training's forward and backward: as torch counts them, and by the formula."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_elements)
    config = place.config(moe={"fusion": "add", "layers": [1, 2], "experts": E, "top_k": K}, **sections)
    config.model.attention = "eager"
    model = build_model(config).train()
    recompute = config.train.activation_checkpointing
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    S = 64
    ids = torch.randint(3, V, (1, S), generator=torch.Generator().manual_seed(0))
    positions, role = torch.arange(S)[None], torch.ones(1, S, dtype=torch.int8)
    modules_of(model)[0].experts.choose()  # the counter knows those operators only that there are when it is made
    with FlopCounterMode(display=False) as counter:
        Objective(model, config)(ids, ids, positions, role, StepCounts(S, S, 0, S), 1.0).backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    squares = counts.pop("aten.bmm")
    counted = (sum(counts.values()) + squares / 2) / S
    return counted, training_flops_per_token(model, S, recompute, chunk_elements < S * V)


@pytest.mark.parametrize("chunk_elements", [2**26, 16 * V])
@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_flops_are_those_that_torch_counts(place, monkeypatch, recompute, chunk_elements):
    """With a block below the modules, which backward passes too. Logits in chunks recompute the LM head."""
    counted, planned = objective_flops(
        place, chunk_elements, monkeypatch, train={"activation_checkpointing": recompute}
    )
    assert 0.99 * counted < planned < 1.08 * counted


def test_activations_shrink_when_they_are_recomputed(place):
    sizes = []
    for recompute in (False, True):
        config = place.config(train={"activation_checkpointing": recompute})
        sizes.append(memory_per_rank(config, build_model(config, meta=True), 1)["activations"])
    assert sizes[1] < sizes[0]


def test_derived_numbers_of_a_step_and_of_the_run(place):
    config = place.config(train={"batch_size": 8, "micro_batch": 2, "steps": 6})
    loader = Loader(config, load_tokenizer(config.model), place.output / "cache", 0, 2)
    plan = make_plan(config, build_model(config, meta=True), loader.summary(), world_size=2)
    assert plan["accumulation_steps"] == 2 and plan["tokens_per_step"] == 8 * 24 and plan["tokens"] == 6 * 8 * 24
    assert plan["flops"] == plan["flops_per_token"] * plan["tokens"]
    assert [row["weight"] for row in plan["mixture"]] == [0.25, 0.75]
    text = render(plan)
    for part in ("6 steps", "192 tokens", "2, ZeRO 2, fp32", "2 accumulation step(s)", "25.0%", "cy.train.jsonl"):
        assert part in text


def test_planned_time_is_operations_by_the_assumed_rate(place):
    config = place.config(train={"precision": "bf16"})
    plan = make_plan(config, build_model(config, meta=True), [], world_size=4, gpu="L4", mfu=0.5)
    assert plan["seconds"] == pytest.approx(plan["flops"] / (4 * 0.5 * 121e12))
    assert plan["fits"] and plan["gpu_memory_gib"] == GPUS["L4"].memory
    config = place.config()  # fp32, of which the table has no rate
    assert "not known for fp32" in render(make_plan(config, build_model(config, meta=True), [], 4, gpu="L4"))


def test_what_is_not_known_of_a_corpus_is_a_question_mark(place):
    config = place.config()
    known = dict.fromkeys(("documents", "tokens", "bytes", "weight", "rows_per_epoch", "epochs"))
    known |= dict.fromkeys(("tokens_drawn", "padding", "cut"))
    mixture = [
        {**known, "source": "a/b", "lang": "en", "role": "old", "weight": 0.25},
        {**known, "source": "c", "lang": "cy", "role": "new", "documents": 1200, "tokens": 34_000, "weight": 0.75},
    ]
    text = render(make_plan(config, build_model(config, meta=True), mixture, world_size=1)).splitlines()
    assert text[-3].split() == ["en", "old", "?", "?", "25.0%", "?", "?", "?", "?", "a/b"]
    assert text[-2].split() == ["cy", "new", "1,200", "34.00", "k", "75.0%", "?", "?", "?", "?", "c"]
    assert text[-1].startswith("?: 1 of 2 corpora")


def table(text: str) -> list[list[str]]:
    """The words of the lines of the mixture's table, without its heading."""
    lines = text.partition("language  ")[2].partition("\n\n")[0].splitlines()[1:]
    return [line.replace(" k", "k").split() for line in lines]


def test_the_table_shows_each_language_and_its_sources_below_it_where_it_has_several(place):
    halves = [place.output / name for name in ("first.jsonl", "second.jsonl")]
    lines = (place.inputs / "cy.train.jsonl").read_text().splitlines(keepends=True)
    for half, part in zip(halves, (lines[:80], lines[80:]), strict=True):
        half.write_text("".join(part))
    sources = [{"path": "en.train.jsonl", "lang": "en"}, *({"path": str(h), "lang": "cy"} for h in halves)]
    data = {"train": sources, "packing": "best-fit", "sampling": "unimax", "max_epochs": 4}
    config = place.config(data=data)
    loader = Loader(config, load_tokenizer(config.model), place.output / "cache")
    plan = make_plan(config, build_model(config, meta=True), loader.summary(), world_size=1)
    text = render(plan)
    assert (
        "rows of 24 tokens, packed by best fit, 25.0% of them old languages; languages equally, at most 4 epochs"
        in text
    )
    english, welsh, first, second = table(text)
    rows = 6 * 8
    epochs = 0.75 * rows / loader.packed[1].rows_per_epoch
    assert english[:3] == ["en", "old", "120"] and english[4] == "25.0%" and english[-1] == "en.train.jsonl"
    assert welsh[:3] == ["cy", "new", "120"] and welsh[4] == "75.0%" and welsh[-2:] == ["2", "sources"]
    assert welsh[6] == f"{epochs:.2f}" == first[4] == second[4]
    assert (first[0], second[0]) == ("80", "40") and [first[-1], second[-1]] == list(map(str, halves))
    drawn = [record["tokens_drawn"] for record in loader.summary()]
    padding = 1 - loader.packed[1].tokens_per_epoch / (loader.packed[1].rows_per_epoch * 24)
    assert sum(drawn[1:]) == pytest.approx(0.75 * rows * 24 * (1 - padding), abs=2)
    assert welsh[7] == f"{padding:.2%}" and welsh[8] == f"{loader.packed[1].share_cut():.1%}"


def test_moect_plan_shows_a_row_of_each_language_as_the_model_will_see_it(place, capsys):
    config = place.config(data={"packing": "best-fit"})
    assert main(["plan", "--config", str(place.write(config))]) == 0
    out = capsys.readouterr().out
    loader = Loader(config, load_tokenizer(config.model), place.output / ".cache")
    texts = {json.loads(line)["text"] for line in (place.inputs / "cy.train.jsonl").read_text().splitlines()}
    sample = out.partition("a row of cy: ")[2].splitlines()
    held = loader.packed[1].row(0).fragments_F4
    assert sample[0].startswith(f"{len(held)} document")
    shown = [line.strip() for line in sample[1:] if "⟦" in line or "⟧" in line]
    assert shown and any(line.startswith("⟦<s>") for line in shown)
    for line in shown:
        text = line.strip("⟦⟧").removeprefix("<s>").removesuffix("</s>")
        assert any(all(part.strip() in t for part in text.split(" … ")) for t in texts)
    assert "a row of en: " in out and not config.folder.exists()


def test_plan_of_a_run_is_printed_and_kept(place, capsys):
    run = train(place.config())
    plan = json.loads((run / "plan.json").read_text())
    assert plan["parameters"] == brute_force("moe-ct")
    assert [sample["lang"] for sample in plan["samples"]] == ["en", "cy"]
    assert render(plan) in capsys.readouterr().out


def held_out(place, config):
    """The monitor's documents, as tokens."""
    texts = load_evaluation(config.data)
    tokenizer = load_tokenizer(config.model)
    return [tokenise(tokenizer, text.documents) for text in texts]


def monitored(place, **monitor):
    usual = {"enabled": True, "window": 8, "stride": 3, "batch_size": 1, "compare": 2, "samples": 0, "resamples": 0}
    return place.config(moe={"fusion": "add"}, monitor=usual | monitor)


def test_the_monitors_tokens_are_those_of_its_forward_passes(place, monkeypatch):
    """A whole training: the base once, and at step 0 and both checkpoints the model and, where compared, the base."""
    config = monitored(place)
    lengths = planned_lengths(config, load_tokenizer(config.model), place.output / ".cache")
    cost = make_plan(config, build_model(config, meta=True), [], 1, held_out=lengths)["monitor"]
    read = []
    plain = Qwen3Model.forward

    def counting(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None:  # training has none
            read.append(int(attention_mask.sum()))
        return plain(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(Qwen3Model, "forward", counting)
    train(config)
    assert cost["tokens"] > sum(map(sum, lengths)) > 0 < cost["base_tokens"]
    assert sum(read) == cost["tokens"] + 3 * (cost["tokens"] + cost["base_tokens"])
    of_base = len(read) - 4 * cost["passes"]
    assert of_base % 3 == 0 and 0 < of_base // 3 < cost["passes"]
    assert (cost["texts"], cost["documents"], cost["every"]) == (2, 12, 3)


@pytest.mark.parametrize("module", [False, True])
def test_the_monitors_flops_are_those_that_torch_counts(place, module):
    """Of both parts: the decoder, and the head on what is predicted. Torch counts attention over whole squares."""
    config = monitored(place)
    config.model.attention = "eager"
    model = build_model(config).eval()
    documents = [d for text in held_out(place, config) for d in text]
    with (
        FlopCounterMode(display=False) as counter,
        nullcontext() if module else base_only(model),
    ):
        score(model, documents, 8, 3, batch_size=1)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    squares = counts.pop("aten.bmm")
    planned = forward_flops(model, count_passes([len(d.ids) for d in documents], 8, 3), module)
    assert 0.99 < planned / (sum(counts.values()) + squares / 2) < 1.01


def test_the_plan_tells_what_the_monitor_costs_and_how_to_make_it_cheaper(place):
    config = monitored(place)
    config.train.save_every = 6
    model = build_model(config, meta=True)
    plan = make_plan(config, model, [], 1, held_out=[[9, 2], [30]])
    cost = plan["monitor"]
    # windows of 8 tokens that move by 3, counted by hand: 8; 1; 8, then to the ends 11, 14, …, 29
    assert cost["tokens"] == 8 + 1 + 8 * 8 and cost["passes"] == 1 + 1 + 8 and cost["base_tokens"] == cost["tokens"]
    assert cost["share"] == cost["flops"] / (6 * plan["tokens_per_step"] * plan["flops_per_token"])
    assert cost["share"] < 0.05 and "more than the usual" not in render(plan)
    plan = make_plan(config, model, [], 1, held_out=[[9, 2] * 500, [30]])
    assert plan["monitor"]["share"] > 0.05 and plan["monitor"]["base_tokens"] == cost["base_tokens"]
    text = render(plan)
    assert "monitor        a checkpoint: 4.56 k tokens of the model's, 73 of the base's, 1,008 passes" in text
    assert "more than the usual 5%: lower data.evaluation[].limit or monitor.compare, or raise " in text
    config.train.steps = config.train.save_every = int(text.partition("train.save_every to ")[2].split()[0])
    assert 0.049 < make_plan(config, model, [], 1, held_out=[[9, 2] * 500, [30]])["monitor"]["share"] <= 0.05


def test_a_cost_of_the_monitor_that_is_not_known_says_why(place):
    config = monitored(place)
    tokenizer, cache = load_tokenizer(config.model), place.output / ".cache"
    assert planned_lengths(config, None, cache) == "there is no tokenizer yet"
    config.data.evaluation[0].path = "gone.jsonl"
    reason = planned_lengths(config, tokenizer, cache)
    assert "gone.jsonl" in reason
    model = build_model(config, meta=True)
    assert f"its cost is not known: {reason}" in render(make_plan(config, model, [], 1, held_out=reason))
    config.data.evaluation[0].path, config.data.evaluation[0].dataset = "", "someone/text"
    assert planned_lengths(config, tokenizer, cache) == "someone/text is not in the cache yet; training fetches it"
    config.monitor.enabled = False
    plan = make_plan(config, model, [], 1, held_out=[[9]])
    assert plan["monitor"] is None and "\nmonitor" not in render(plan)


def test_a_dataset_counts_among_the_monitors_tokens_where_it_was_read_before(place):
    config = monitored(place)
    tokenizer, cache = load_tokenizer(config.model), place.output / ".cache"
    lengths = planned_lengths(config, tokenizer, cache)
    text = config.data.evaluation[0]
    lines = (place.inputs / text.path).read_text()
    text.path, text.dataset, text.revision = "", "someone/text", "a" * 40
    assert isinstance(planned_lengths(config, tokenizer, cache), str)
    kept = evaluation._kept_file(text, config.data, cache)
    kept.parent.mkdir(parents=True)
    kept.write_text(lines)
    assert planned_lengths(config, tokenizer, cache) == lengths
