"""Block expansion: the base until something trains, the base again without it, and a deeper stock model at the end."""

from __future__ import annotations

import pytest
import torch
from small_runs import VOCABULARY
from tiny import FAMILIES, disturb, logits, tiny_model, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from moect.errors import ConfigError, ExportError
from moect.expansion_config import ExpansionConfig
from moect.export.adapter import write_adapter
from moect.export.run import ExportOptions, export_run
from moect.export.source import open_run
from moect.model.block_expansion import insert_blocks, inserted_blocks, row_of_blocks, without_inserted
from moect.model.build import DTYPES
from moect.train.loop import train

WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def expanded(family: str = "qwen3", layers="all", **changes):
    return insert_blocks(tiny_model(family, **changes), ExpansionConfig(layers))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_and_is_the_base_without_what_was_inserted(family, recompute):
    ids = tokens()
    of_base = logits(tiny_model(family), ids)
    model = expanded(family, [0, 2])
    assert torch.equal(logits(model, ids), of_base)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if ".inserted." in name}
    if recompute:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, use_cache=False).logits.square().mean().backward()
    moves = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    # all else waits behind a projection that is still zero
    assert moves == {name for name in trains if "o_proj.weight" in name or "down_proj" in name}
    disturb(model.eval())
    assert not torch.allclose(logits(model, ids), of_base, atol=0.01)
    with without_inserted(model):
        assert torch.equal(logits(model, ids), of_base)
    assert not torch.equal(logits(model, ids), of_base)


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in FAMILIES), ("qwen2", WINDOWED), ("qwen3", WINDOWED)]
)
def test_it_computes_what_a_stock_model_with_these_blocks_in_one_row_computes(family, changes):
    model = expanded(family, [0, 1], **changes)
    disturb(model)
    blocks = [part for b in model.model.layers for part in (b, b.inserted) if part is not None]
    assert row_of_blocks(model) == [0, 0, 1, 1, 2] and model.config.num_hidden_layers == 5
    kinds = getattr(tiny_model(family, **changes).config, "layer_types", None)
    extra = {"layer_types": [kinds[i] for i in (0, 0, 1, 1, 2)]} if kinds else {}
    stock = tiny_model(family, **changes | {"num_hidden_layers": 5} | extra)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("model.layers.")}
    for place, block in enumerate(blocks):
        own = {n: t for n, t in block.state_dict().items() if not n.startswith("inserted.")}
        state |= {f"model.layers.{place}.{name}": tensor for name, tensor in own.items()}
    stock.load_state_dict(state)
    ids = tokens(length=24)
    assert torch.equal(logits(model, ids), logits(stock, ids))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, **how)
    assert torch.equal(written, stock.generate(ids, **how))
    assert torch.equal(written, model.generate(ids, use_cache=False, **how))
    cache = DynamicCache(config=model.config)
    first, then = (model(part, past_key_values=cache).logits for part in (ids[:, :10], ids[:, 10:]))
    assert torch.allclose(torch.cat([first, then], 1), logits(stock, ids), atol=1e-5)


def test_the_copies_are_copies_but_for_their_output_projections():
    model = expanded("qwen2", [1])
    block, (copy,) = model.model.layers[1], inserted_blocks(model)
    for name, tensor in copy.state_dict().items():
        last = name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
        assert not tensor.any() if last else torch.equal(tensor, block.get_parameter(name)), name
    copy.self_attn.q_proj.weight.data.zero_()
    assert block.self_attn.q_proj.weight.any(), "a copy with its own memory"


@pytest.mark.parametrize(
    ("layers", "told"), [([7], "names block 7"), ([0, 0], "a block twice"), ("every-5", "the base has 3 blocks")]
)
def test_blocks_that_are_not_there_are_refused(layers, told):
    with pytest.raises(ConfigError, match=f"expansion.layers.*{told}"):
        expanded(layers=layers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_exported_as_a_deeper_model_of_the_base_s_family(place, precision):
    sections = {"expansion": {"layers": "all"}, "train": {"precision": precision, "steps": 4, "lr": 0.01}}
    folder = train(place.config(method="block-expansion", monitor={"enabled": True}, **sections))
    export = export_run(folder, ExportOptions())
    assert export.target == "base" and export.comparison.difference == 0
    base = AutoModelForCausalLM.from_pretrained(place.inputs / "base", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(export.folder, dtype=torch.float32)
    assert type(model) is type(base)
    assert model.config.num_hidden_layers == 2 * base.config.num_hidden_layers
    ids = tokens(vocab=VOCABULARY)
    assert not torch.allclose(logits(model, ids), logits(base, ids), atol=1e-3)
    del model.model.layers[1::2]
    model.config.num_hidden_layers = len(model.model.layers)
    for parameter in base.parameters():
        parameter.data = parameter.to(DTYPES[precision]).float()
    assert torch.equal(logits(model, ids), logits(base, ids)), "every other block is the base's"
    assert "copies inserted after some of its blocks (`all`)" in (export.folder / "README.md").read_text()
    with pytest.raises(ExportError, match="block-expansion makes a deeper model"):
        write_adapter(open_run(folder), place.output / "adapter")
