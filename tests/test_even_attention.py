"""The language gate's context: the sum of what came before, taken by the base's own attention, and nothing else."""

import pytest
import torch
from tiny import FAMILIES, disturb, logits, tiny_model, tokens
from transformers import DynamicCache

from moect.errors import UnsupportedModelError
from moect.model import ForwardRecord, MoeConfig, append_moe, base_only, modules_of, remove_moe
from moect.model.even_attention import ENOUGH, PREFIX, Listening, listening

GATE = MoeConfig(fusion="add", language_gate=True, width=16)


def gated(family="qwen3", **changes):
    model = append_moe(tiny_model(family, initializer_range=0.2, **changes), GATE)
    disturb(model)
    return model


def context(model, ids, **told):
    record = ForwardRecord()
    with torch.no_grad():
        model.model(ids, moect_record=record, **{"use_cache": False, **told})
    return record.context_TC.view(*ids.shape, -1)


def written_down(model, ids, window=None):
    """By its definition, in fp64: the mean of the values seen times their number, and the number, by ENOUGH."""
    block = model.model.layers[modules_of(model)[0].index].double()
    model.model.embed_tokens.double()
    with torch.no_grad():
        x_BSD = block.input_layernorm(model.model.embed_tokens(ids))
        values = block.self_attn.v_proj(x_BSD).unflatten(-1, (-1, block.self_attn.head_dim))
        result = []
        for t in range(ids.shape[1]):
            first = 0 if window is None else max(0, t + 1 - window)
            mean = values[:, first : t + 1].mean(1).repeat_interleave(block.self_attn.num_key_value_groups, 1)
            seen = torch.cat([mean.flatten(1), torch.ones(len(ids), 1)], 1)
            result.append(seen * min(t + 1, ENOUGH) / ENOUGH)
    return torch.stack(result, 1)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_the_sum_of_the_values_seen(family, kernel):
    window = 5 if family == "mistral" else None
    model = gated(family, **({"sliding_window": window} if window else {}))
    model.set_attn_implementation(kernel)
    ids = tokens(2, 9)
    got = context(model, ids).double()
    assert (got - written_down(model, ids, window)).abs().max() < 1e-6


def test_packed_and_padded_texts_see_only_themselves():
    model, ids = gated(), tokens(1, 12)
    alone = [context(model, part) for part in (ids[:, :7], ids[:, 7:])]
    packed = context(model, ids, position_ids=torch.cat([torch.arange(7), torch.arange(5)])[None])
    assert (packed - torch.cat(alone, 1)).abs().max() < 1e-5
    mask = (torch.arange(12) >= 7).long()[None]
    padded = context(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    assert (padded[:, 7:] - alone[1]).abs().max() < 1e-5


def test_a_cache_gives_the_context_of_the_whole_text():
    model, ids = gated(), tokens(2, 10)
    whole, cache, parts = context(model, ids), DynamicCache(config=model.config), []
    for part in ids.split([4, 1, 1, 3, 1], 1):
        parts.append(context(model, part, past_key_values=cache, use_cache=True))
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


def test_the_gate_listens_in_one_block_and_the_base_is_what_it_was():
    base, model = tiny_model("qwen3", initializer_range=0.2), gated()
    listening = [isinstance(block.self_attn.config, Listening) for block in model.model.layers]
    assert listening == [True, False, False]
    ids = tokens(2, 9)
    with base_only(model):
        assert torch.equal(logits(model, ids), logits(base, ids))
    record = ForwardRecord()
    logits(model, ids, moect_record=record)
    assert record.heard_BSHd is None and record.context_TC.shape == (
        18,
        model.config.num_attention_heads * model.config.head_dim + 1,
    )
    remove_moe(model)
    assert not any(isinstance(block.self_attn.config, Listening) for block in model.model.layers)


def test_dropout_of_attention_does_not_reach_the_context():
    model = gated(attention_dropout=0.5).train()
    record, again = ForwardRecord(), ForwardRecord()
    for r in (record, again):
        model(tokens(1, 8), use_cache=False, moect_record=r)
    assert torch.equal(record.context_TC, again.context_TC)
    assert not record.context_TC.requires_grad


def test_a_paged_cache_is_refused_before_it_is_filled_twice():
    model = gated()
    attention = model.model.layers[0].self_attn
    with listening():
        kernel = attention.config._attn_implementation
    assert attention.config._attn_implementation == kernel.removeprefix(PREFIX) == "sdpa"  # for who looks from outside
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    q = torch.zeros(1, 4, 2, attention.head_dim)
    with pytest.raises(UnsupportedModelError, match="paged cache"):
        ALL_ATTENTION_FUNCTIONS[kernel](
            attention, q, q[:, :2], q[:, :2], None, scaling=1.0, cache=object(), moect_record=ForwardRecord()
        )


def test_a_kernel_that_looks_its_own_name_up_finds_it(monkeypatch):
    """As flash attention does."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def kernel(module, *args, **kwargs):
        seen.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own", kernel)
    model = gated()
    expected = logits(model, tokens())
    model.config._attn_implementation = "own"
    assert (logits(model, tokens()) - expected).abs().max() < 1e-5
    assert seen == ["own"] * 4  # three blocks, and one of them once more
