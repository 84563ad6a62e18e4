"""Put the module into a frozen Hugging Face causal LM, mark what trains, and take it out again.

Nothing of the base is renamed, copied or replaced: a chosen block gets one more child, `moe`, and a class whose forward
uses it. So base tensors keep their names, module tensors are those below `….moe.` (and `….rows.`, see
`moect.model.embeddings`), and removal is exact.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from moect.dispatch import backends
from moect.errors import ConfigError, UnsupportedModelError
from moect.model.counting_gate import Tokens, sums_in
from moect.model.embeddings import remove_rows, rows_of
from moect.model.even_attention import context_of, context_width, listen, listening, stop_listening
from moect.model.families import blocks_of, check_config
from moect.model.moe_ffn import MoEFFN
from moect.model.record import RECORD, ForwardRecord
from moect.moe_config import MoeConfig

log = logging.getLogger("moect.model")
BY_PLACE = ("input_ids", "attention_mask")  # of every family's forward, before other arguments

# what an extended model has of its own, by what its parameters' names contain
PARTS = {
    "experts": ".moe.experts.",
    "router": ".moe.router.",
    "fusion": ".moe.fusion.",
    "gate": ".moe.language_gate.",
    "rows": ".rows.",
}


class AppendedBlock:
    """Mixed into a decoder block's class: the block's own forward, with the module between FFN and residual sum.

    Every block of an extended model has this class, and `moe` None where it was not chosen: the record is taken out of
    the keyword arguments before attention, whose kernels need not know it.
    """

    def forward(self, hidden_states: Tensor, *, moect_record: ForwardRecord, **kwargs) -> Tensor:
        enabled = self.moe is not None and self.moe.enabled
        if enabled and self.moe.counts:
            if kwargs.get("cache") is not None:  # its texts stand in one row, and it keeps no sums
                raise UnsupportedModelError(
                    "a language gate that counts tokens cannot use a paged cache of transformers; use generate(), or "
                    "train with moe.gate_sees: context and serve with vLLM"
                )
            cache, index = kwargs.get("past_key_values"), self.moe.index
            sums = None if cache is None else sums_in(cache, self.self_attn.config.num_hidden_layers, index)
            hidden_states = self.moe.decide(hidden_states, moect_record, kwargs["position_ids"], sums)
        normed = self.input_layernorm(hidden_states)
        if enabled and self.moe.listens:
            with listening():
                attended, _ = self.self_attn(hidden_states=normed, **kwargs, **{RECORD: moect_record})
            moect_record.context_TC = context_of(moect_record, kwargs["position_ids"]).flatten(0, 1)
        else:
            attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        r_BSD = hidden_states + attended
        u_BSD = self.post_attention_layernorm(r_BSD)
        f_BSD = self.mlp(u_BSD)
        if not enabled:
            return r_BSD + f_BSD
        return self.moe(r_BSD, u_BSD, f_BSD, moect_record)


def append_moe(
    model: nn.Module,
    config: MoeConfig,
    seed: int = 0,
    within: Callable[[nn.Module, nn.Module], AbstractContextManager] | None = None,
) -> nn.Module:
    """Append a module to the chosen blocks of a causal LM, in place, and freeze everything else.

    The model computes what it computed before: bit for bit where experts start silent, to rounding where they start as
    copies of the FFN. Works in any training loop; pass `moect_record=ForwardRecord()` to the model to read router
    logits and gate values afterwards (`moect.model.losses` takes them).

    Args:
        model: a causal LM of a supported family, from transformers; on the meta device only shapes are made.
        config: what to append.
        seed: of the module's initialisation.
        within: makes the context in which a block's module is initialised, from the block's FFN and the module; for a
            model whose weights are not in one place (`moect.model.partition`).

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: a family that cannot be served, with the reason, or a model that has a module already.
        ConfigError: layers that the model does not have.
    """
    check_config(model.config)
    if is_appended(model):
        raise UnsupportedModelError("the model has an appended module already; call remove_moe first")
    append_to_blocks(model.model, model.config, config, seed, within)
    model.lm_head.requires_grad_(False)
    model.model._moect_hook = model.model.register_forward_pre_hook(_begin_pass, with_kwargs=True)
    model.moe_config = config
    return model


def append_to_blocks(
    decoder: nn.Module,
    base_config,
    config: MoeConfig,
    seed: int = 0,
    within: Callable[[nn.Module, nn.Module], AbstractContextManager] | None = None,
) -> None:
    """What `append_moe` does to the blocks of `decoder`, a model without head, of which `base_config` is the config.

    Whoever calls this sees to the record: each pass through the blocks needs one, by the keyword `RECORD`.
    """
    try:
        experts = config.experts_by_block(base_config.num_hidden_layers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    ffn_width = base_config.intermediate_size
    needs = "init: copy" if config.init == "copy" else "fusion: routed" if config.fusion == "routed" else None
    if needs and config.width not in (None, ffn_width):
        raise ConfigError(f"moe.{needs} needs experts as wide as the base's FFN ({ffn_width}), not {config.width}")

    if config.dispatch != "auto" and config.dispatch not in backends():
        raise ConfigError(f"moe.dispatch: no backend `{config.dispatch}`; there are auto, {', '.join(backends())}")
    if config.top_k == 1 < max(experts.values()) and config.renormalise:
        _warn_once("moe.top_k is 1 and moe.renormalise true: weights are always 1, the text does not train the router")

    decoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    appended_class = _appended_class(type(decoder.layers[0]))
    for index, block in enumerate(decoder.layers):
        block.__class__ = appended_class
        block.moe = None
        if index not in experts:
            continue
        weight = block.mlp.down_proj.weight
        with torch.device("meta"):
            decides, context = index == min(experts), context_width(base_config)
            D, V = base_config.hidden_size, base_config.vocab_size
            moe = MoEFFN(config, experts[index], D, ffn_width, index, decides, context, V)
        moe.to(dtype=weight.dtype).to_empty(device=weight.device)
        _keep_buffers_fp32(moe)
        if weight.device.type != "meta":
            with within(block.mlp, moe) if within else nullcontext():
                moe.reset(block.mlp, generator)
        block.moe = moe.train(block.training)
        if moe.listens:
            listen(block.self_attn)


def remove_moe(model: nn.Module) -> nn.Module:
    """Undo `append_moe`: the base exactly as it was, all of it still frozen.

    Raises:
        UnsupportedModelError: nothing is appended.
    """
    if not is_appended(model):
        raise UnsupportedModelError("the model has no appended module to remove")
    remove_rows(model)
    for block in blocks_of(model):
        del block.moe
        stop_listening(block.self_attn)
        block.__class__ = type(block).__mro__[2]  # (appended class, AppendedBlock, the base's class, …)
    model.model._moect_hook.remove()
    del model.model._moect_hook, model.moe_config
    return model


def is_appended(model: nn.Module) -> bool:
    """Whether `append_moe` was called on the model."""
    return hasattr(model, "moe_config")


def modules_of(model: nn.Module) -> list[MoEFFN]:
    """The appended modules, by ascending block; empty for a model without."""
    return [m for m in model.modules() if isinstance(m, MoEFFN)]


def is_appended_tensor(name: str) -> bool:
    """Whether the tensor of this name, parameter or buffer, was appended to the base."""
    return any(mark in name for mark in (".moe.", ".rows.", ".inserted."))


def module_state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of what was appended, parameters and buffers, by their names in the model."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_appended_tensor(name)}


def train_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Let only some parts of what was appended train, and hold the others as they are.

    Args:
        model: an extended model, rows included.
        parts: keys of PARTS.

    Raises:
        ConfigError: the model has nothing of a part.
    """
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad and is_appended_tensor(name)}
    found = {part: [n for n in trains if PARTS[part] in n] for part in parts}
    if absent := [part for part, names in found.items() if not names]:
        there = ", ".join(part for part, text in PARTS.items() if any(text in n for n in trains))
        raise ConfigError(f"train.parts names `{absent[0]}`, and nothing of that was appended; there are {there}")
    chosen = {n for names in found.values() for n in names}
    for name, parameter in trains.items():
        if name not in chosen:
            parameter.requires_grad_(False)
            parameter.moect_held = True


def held_parameters(model: nn.Module):
    """(name, parameter) of what was appended and `train_parts` holds as it is."""
    yield from ((n, p) for n, p in model.named_parameters() if getattr(p, "moect_held", False))


@contextmanager
def base_only(model: nn.Module):
    """Inside, the model is the base, with the base's vocabulary: the modules are skipped and every block returns r + f,
    and every row is the base's, bit for bit."""
    modules = [*modules_of(model), *rows_of(model)]
    before = [m.enabled for m in modules]
    for m in modules:
        m.enabled = False
    try:
        yield model
    finally:
        for m, enabled in zip(modules, before, strict=True):
            m.enabled = enabled


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


@functools.cache  # two models of a family share their classes: engines look classes up, and compile them once
def _appended_class(base_class: type) -> type:
    return type(f"Appended{base_class.__name__}", (AppendedBlock, base_class), {"__module__": base_class.__module__})


def begin_pass(decoder: nn.Module, input_ids: Tensor | None, kwargs: dict) -> None:
    """See to it that the keywords of a pass through the blocks hold a record that nothing is in but what they begin
    with.

    Args:
        decoder: the model without its head.
        input_ids: int64 (B, S); None: the pass begins with embeddings.
        kwargs: of its forward; changed.

    Raises:
        ValueError: the caller's record was used before, or the model has to know the tokens and is not told.
    """
    record = kwargs.setdefault(RECORD, ForwardRecord())
    if record.blocks or record.gate_logit_T is not None:
        raise ValueError(f"{RECORD} was used in another forward pass: give each pass a new ForwardRecord()")
    found = (getattr(block, "moe", None) for block in decoder.layers)  # elsewhere in a pipeline
    decides = next((moe for moe in found if moe is not None), None)
    if decides is not None and decides.enabled and decides.counts:
        if input_ids is None:
            raise ValueError("the language gate counts tokens, which embeddings do not tell: give input_ids")
        mask = kwargs.get("attention_mask")
        plain = isinstance(mask, Tensor) and mask.dim() == 2  # what made another form of it has made positions too
        record.tokens = Tokens(input_ids, mask if plain else None)
    rows = getattr(decoder.embed_tokens, "rows", None)
    if rows is not None and rows.enabled and rows.late:
        if input_ids is None:
            raise ValueError("tokens have rows of their own, which embeddings do not tell: give input_ids")
        record.late_BSD = rows(tokens=input_ids)
        record.told_T = rows.opened_by(input_ids).flatten()


def _begin_pass(decoder, args, kwargs):
    kwargs |= dict(zip(BY_PLACE, args, strict=False))
    begin_pass(decoder, kwargs.get("input_ids"), kwargs)
    return args[len(BY_PLACE) :], kwargs


def _keep_buffers_fp32(module: nn.Module) -> None:
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            child.register_buffer(name, buffer.float())
