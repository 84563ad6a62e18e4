"""`moect bench generate`: that all contestants do the same work, and its figures say what was done. Never how long."""

import dataclasses
import json
import shlex
from functools import partial
from random import Random
from statistics import median

import pytest
import torch
from export_helpers import exported
from small_runs import make_inputs
from tiny import disturb
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moect.bench import generate
from moect.bench.models import (
    AS_IS,
    BASE,
    BASE_ONLY,
    CLOSED,
    FLOOR,
    LAPTOP,
    OPEN,
    STOCK,
    Shape,
    exported_contestants,
    floor_of,
    parse_shape,
    random_contestants,
    share_let_through,
)
from moect.bench.steps import Taken, one_round
from moect.bench.turns import rounds_of
from moect.cli import _parser, main
from moect.errors import ExportError
from moect.model import MoeConfig, append_moe

SMALL = Shape(2, 64, 96, 128, 4, 2, 32)
SHORT = ["--prompt", "6", "--new", "3", "--rounds", "2", "--device", "cpu"]


def bench(*arguments: str) -> int:
    return main(["bench", "generate", *SHORT, *arguments])


@pytest.fixture(scope="module")
def contestants():
    return {c.name: c for c in random_contestants(SMALL, "fp32", "cpu", 1, seed=0)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer and texts, and an export whose gate is open for some of the tokens."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    append_moe(model, MoeConfig(fusion="add", language_gate=True, width=16))
    disturb(model, scale=0.3)
    exported(model, folder / "export")
    PreTrainedTokenizerFast.from_pretrained(folder / "base").save_pretrained(folder / "export")
    return folder


@torch.no_grad()
def logits(contestant, ids):
    with contestant.within():
        return contestant.model(ids, use_cache=False).logits


@torch.no_grad()
def product_flops(call) -> int:
    """Of matrix products with weights: attention is an operator of its own."""
    with FlopCounterMode(display=False) as counted:
        call()
    flops = counted.get_flop_counts()["Global"]
    return sum(
        n for op, n in flops.items() if any(word in str(op) for word in ("aten.mm", "aten.bmm", "addmm", "experts"))
    )


# who takes part


def test_contestants_are_the_base_bit_for_bit_or_differ_as_their_gate_says(contestants):
    ids = torch.randint(SMALL.V, (2, 9), generator=torch.Generator().manual_seed(1))
    assert list(contestants) == [BASE, CLOSED, OPEN, BASE_ONLY, STOCK]
    expected = logits(contestants[BASE], ids)
    for name, same in {CLOSED: True, BASE_ONLY: True, OPEN: False, STOCK: False}.items():
        assert torch.equal(logits(contestants[name], ids), expected) == same, name
    assert [share_let_through(contestants[name], ids) for name in (CLOSED, OPEN)] == [0.0, 1.0]
    assert type(contestants[BASE].model).__module__.startswith("transformers.")
    assert contestants[STOCK].model.config.model_type == "glm4_moe"


def test_base_and_extended_model_hold_the_same_tensors(contestants):
    theirs = dict(contestants[OPEN].model.named_parameters())
    for name, tensor in contestants[BASE].model.named_parameters():
        assert theirs[name].data_ptr() == tensor.data_ptr(), name
    extended = contestants[OPEN].model
    assert extended.lm_head.weight is extended.get_input_embeddings().weight


def test_the_floor_is_the_matrix_products_of_the_base_and_nothing_else(contestants):
    base = contestants[BASE].model
    ids = torch.randint(SMALL.V, (1, 7))
    of_prompt, of_step = floor_of(base, 1, 7)
    whole = product_flops(lambda: base(ids, logits_to_keep=1))
    assert product_flops(of_prompt) == whole > 0
    assert product_flops(of_step) == product_flops(lambda: base(ids[:, :1]))


def test_bytes_of_a_step_are_those_of_the_weights_that_its_products_use(contestants):
    """One token uses each number of a weight once, in a multiplication and an addition."""
    ids = torch.randint(SMALL.V, (1, 1))
    for name in (BASE, CLOSED, OPEN, BASE_ONLY):
        c = contestants[name]
        with c.within():
            flops = product_flops(lambda c=c: c.model(ids))
        vectors = c.step_bytes - 4 * flops // 2  # norms and biases
        assert 0 <= vectors < 4 * 20 * SMALL.D, name


# a round


class Scripted:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def prefill(self):
        self.calls.append((self.name, "prefill"))
        return 10.0

    def step(self, n):
        self.calls.append((self.name, n))
        return float(n)


def test_all_make_each_step_before_anybody_makes_the_next_in_orders_of_their_own():
    calls = []
    runners = {name: Scripted(name, calls) for name in "abc"}
    orders = set()
    for seed in range(30):
        calls.clear()
        assert one_round(runners, 2, Random(seed)) == dict.fromkeys("abc", Taken(10.0, [0.0, 1.0]))
        parts = [calls[n : n + 3] for n in range(0, 9, 3)]
        assert [{what for _, what in part} for part in parts] == [{"prefill"}, {0}, {1}]
        for part in parts:
            assert {name for name, _ in part} == set("abc")
            orders.add("".join(name for name, _ in part))
    assert len(orders) == 6


def test_rounds_are_those_asked_for_after_two_for_warmth():
    numbers = iter(range(100))
    assert rounds_of(lambda draw: next(numbers), rounds=4) == [2, 3, 4, 5]
    assert len(rounds_of(lambda draw: None, seconds=1e-9)) == 5


def test_all_contestants_compute_on_the_same_tokens_with_a_cache_of_their_own(monkeypatch):
    seen, timed, make = {}, [], generate.random_contestants

    def watched(*arguments):
        found = make(*arguments)

        def note(module, args, kwargs):
            if kwargs["use_cache"]:  # not while it is held against the base
                cache = kwargs.get("past_key_values")
                seen.setdefault(timed[-1], []).append((cache.get_seq_length() if cache else 0, args[0].tolist()))

        def within(c):
            timed.append(c.name)
            return c.within()

        for model in {c.model for c in found}:
            model.register_forward_pre_hook(note, with_kwargs=True)
        return [dataclasses.replace(c, within=partial(within, c)) for c in found]

    monkeypatch.setattr(generate, "random_contestants", watched)
    assert bench("--shape", str(SMALL), "--dtype", "fp32", "--batch", "2") == 0
    assert set(seen) == {BASE, CLOSED, OPEN, BASE_ONLY, STOCK}
    assert all(passes == seen[BASE] for passes in seen.values())
    a_round = seen[BASE][:4]
    assert [length for length, _ in a_round] == [0, 6, 7, 8] and len(seen[BASE]) == 4 * 4
    assert [len(row) for _, ids in a_round for row in ids] == [6, 6, 1, 1, 1, 1, 1, 1]


def test_what_should_be_the_base_and_is_not_is_refused(contestants):
    wrong = contestants[OPEN]
    as_closed = dataclasses.replace(wrong, name=CLOSED)
    ids = torch.randint(SMALL.V, (1, 5))
    with pytest.raises(ExportError, match="`gate closed` has other logits than the base"):
        generate._require_base([contestants[BASE], as_closed], ids)
    generate._require_base(list(contestants.values()), ids)


# what comes out


def test_figures_are_those_of_the_measured_times(capsys, tmp_path):
    output = tmp_path / "out.json"
    assert bench("--shape", str(SMALL), "--batch", "2", "--seed", "3", "--output", str(output)) == 0
    out, written = capsys.readouterr().out, json.loads(output.read_text())
    assert written["complete"] is True and written["seed"] == 3 and written["device"] == "cpu"
    names = [FLOOR, BASE, CLOSED, OPEN, BASE_ONLY, STOCK]
    assert [(r["contestant"], r["dtype"]) for r in written["results"]] == [
        (n, d) for d in ("fp32", "bf16") for n in names
    ]
    for dtype in ("fp32", "bf16"):
        records = {r["contestant"]: r for r in written["results"] if r["dtype"] == dtype}
        for name, record in records.items():
            for part, count, tokens in (("prefill", 2, 2 * 6), ("generation", 2 * 3, 2)):
                figures, base = record[part], records[BASE][part]
                assert len(figures["seconds"]) == count and all(s > 0 for s in figures["seconds"])
                assert figures["tokens_per_s"] == pytest.approx(tokens / median(figures["seconds"]))
                ratios = [b / s for b, s in zip(base["seconds"], figures["seconds"], strict=True)]
                assert figures["x_base"] == pytest.approx(median(ratios))
                low, high = figures["x_base_quartiles"]
                assert min(ratios) <= low <= figures["x_base"] <= high <= max(ratios)
            assert record["bytes_per_token"] == record["step_bytes"] / 2 and record["rounds"] == 2
            assert sum(line.startswith(f"{name}  ") for line in out.splitlines()) == 2
        assert records[BASE]["generation"]["x_base_quartiles"] == [1.0, 1.0]
        shares = {name: record["share_let_through"] for name, record in records.items()}
        assert shares == {**dict.fromkeys(names), CLOSED: 0.0, OPEN: 1.0}
    fp32, bf16 = (next(r["step_bytes"] for r in written["results"] if r["dtype"] == d) for d in ("fp32", "bf16"))
    assert fp32 == 2 * bf16


def test_the_command_that_is_kept_measures_the_same():
    options = generate.read_options(device="cpu", dtypes=["bf16"], batch=3, prompt=7, new=2, rounds=4, seed=9)
    again = _parser().parse_args(shlex.split(options.command())[1:])
    assert parse_shape(again.shape) == LAPTOP and again.dtype == ["bf16"] and again.device == "cpu"
    assert (again.batch, again.prompt, again.new, again.rounds, again.seed) == (3, 7, 2, 4, 9)
    options = generate.read_options(model="some where", text="a b.txt", seconds=2.5)
    again = _parser().parse_args(shlex.split(options.command())[1:])
    assert (str(again.model), again.text, again.seconds) == ("some where", "a b.txt", 2.5)
    assert (again.rounds, again.shape, again.dtype) == (None, None, None)


# an exported model


def test_an_exported_model_is_timed_on_a_text_with_the_share_that_its_gate_lets_through(inputs, capsys, tmp_path):
    output = tmp_path / "out.json"
    words = ["--model", str(inputs / "export"), "--text", str(inputs / "cy.test.jsonl"), "--batch", "2"]
    assert bench(*words, "--output", str(output)) == 0
    written = json.loads(output.read_text())
    records = {r["contestant"]: r for r in written["results"]}
    assert list(records) == [FLOOR, BASE, AS_IS, CLOSED, OPEN, BASE_ONLY] and records[BASE]["dtype"] == "fp32"

    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs / "base")
    texts = [json.loads(line)["text"] for line in (inputs / "cy.test.jsonl").read_text().splitlines()]
    ids = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]][:18]).view(2, 9)
    model = AutoModelForCausalLM.from_pretrained(inputs / "export").eval()
    gate, seen = model.model.layers[0].moe.language_gate, []
    gate.register_forward_hook(lambda module, args, logit: seen.append(logit))
    with torch.no_grad():
        model(ids)
    share = (seen[0] > 0).float().mean().item()
    assert 0 < share < 1
    assert records[AS_IS]["share_let_through"] == pytest.approx(share)
    assert f"the gate lets {100 * share:.2f}% of the tokens through" in capsys.readouterr().out


def test_the_base_of_an_exported_model_is_the_one_it_was_made_from(inputs):
    base, decides, closed, opened, base_only = exported_contestants(inputs / "export", None, "cpu", 1)
    ids = torch.randint(300, (2, 8))
    original = AutoModelForCausalLM.from_pretrained(inputs / "base").eval()
    assert type(base.model) is type(original)
    with torch.no_grad():
        expected = original(ids).logits
    for c in (base, closed, base_only):
        assert torch.allclose(logits(c, ids), expected, atol=1e-5), c.name
    before = logits(decides, ids)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert not torch.equal(logits(opened, ids), before)
    assert torch.equal(logits(decides, ids), before)  # the gate was put back


def test_an_export_without_a_language_gate_is_timed_with_all_its_experts(inputs, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(inputs / "base").eval()
    exported(append_moe(model, MoeConfig(fusion="gate", width=16)), tmp_path / "export")
    assert bench("--model", str(tmp_path / "export"), "--dtype", "bf16") == 0
    out = capsys.readouterr().out
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert [r for r in rows if r in (FLOOR, BASE, "experts", CLOSED, BASE_ONLY)] == [FLOOR, BASE, "experts", BASE_ONLY]
    assert ", bf16: batch 1" in out and "the gate lets" not in out


# bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "2,64,96,128,4,2"], "--shape 2,64,96,128,4,2: expected L,D,F,V,E,K,W"),
        (["--shape", "2,64,96,128,4,two,8"], "seven whole numbers from 1"),
        (["--shape", "0,64,96,128,4,2,8"], "seven whole numbers from 1"),
        (["--shape", "2,96,96,128,4,2,8"], "the width D=96 must be a multiple of 64"),
        (["--shape", "2,64,96,128,4,2,9"], "experts of width W=9; the kernels need a multiple of 8"),
        (["--shape", "2,64,96,128,4,5,8"], "K=5 experts, but there are E=4"),
        (["--shape", "99,16384,65536,200000,64,2,65536"], "GiB free; give a smaller one"),
        (["--dtype", "fp64"], "--dtype fp64: there are fp32, bf16, fp16"),
        (["--seconds", "nan"], "--seconds nan: expected a number above 0"),
        (["--seed", str(2**63)], "expected a whole number of 64 bits"),
        (["--output", "no/such/folder/out.json"], "there is no folder"),
        (["--text", "english.txt"], "--text is for the tokenizer and the gate of a trained model; give --model too"),
        (["--model", "DIR", "--shape", str(SMALL)], "leave one of them out"),
        (["--model", "no/such/folder"], "--model no/such/folder: no exported model there (no config.json)"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(words, said, capsys):
    assert bench(*words) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("moect: error: ") == 1 and "Traceback" not in err
    assert "x base" not in out


def test_a_model_that_is_no_export_of_ours_and_a_text_that_is_too_short_are_refused(inputs, capsys):
    assert bench("--model", str(inputs / "base")) == 2
    assert "a `qwen3`, which holds no base to time beside it" in capsys.readouterr().err
    words = ["--model", str(inputs / "export"), "--text", str(inputs / "cy.test.jsonl")]
    assert bench(*words, "--batch", "500") == 2
    err = capsys.readouterr().err
    assert "--batch 500 of --prompt 6 and --new 3 need 4500; give more text or a smaller number" in err


def test_default_shape_is_one_that_the_command_line_takes_and_its_help_says():
    assert parse_shape(str(LAPTOP)) == LAPTOP
    bench_parser = _parser()._subparsers._group_actions[0].choices["bench"]
    assert str(LAPTOP) in bench_parser._subparsers._group_actions[0].choices["generate"].format_help().replace("\n", "")
