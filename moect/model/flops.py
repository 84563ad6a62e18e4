"""Floating-point operations of a training step, counted from the model's shapes.

A multiply-add counts as two. Element-wise work, norms and softmax are left out, as is usual for MFU (PaLM,
arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from torch import nn

from moect.model.block_expansion import all_blocks
from moect.model.embeddings import rows_of


def training_flops_per_token(
    model: nn.Module, sequence_length: int, recompute: bool, head_recomputed: bool = False
) -> int:
    """Forward, backward and, with activation checkpointing, the second forward, for one token of a full row.

    Backward costs the forward's operations once for the gradient of the inputs, from the first block that trains
    upward, and once for the gradient of each weight that trains; there is none for the weights of a frozen base.

    Args:
        model: a causal LM as `build_model` makes it; shapes are enough.
        sequence_length: S; a token attends to S/2 others on average.
        recompute: each block's forward runs twice; and transformers then has the embeddings' output want a gradient, so
            that backward goes through every block, whatever trains.
        head_recomputed: that of the LM head does (cross-entropy in chunks).
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * 2 * (sequence_length / 2) * config.num_attention_heads * head_dim  # scores, and their mix of values

    rows = rows_of(model)  # of the embedding, and of an untied head; one of them adds to the logits
    row_products = 2 * rows[-1].delta.numel() if rows else 0
    embeddings_train = model.model.embed_tokens.weight.requires_grad or any(r.delta.requires_grad for r in rows)
    head = 2 * model.lm_head.weight.numel() + row_products
    forward = input_gradient = head
    weight_gradient = 2 * model.lm_head.weight.numel() if model.lm_head.weight.requires_grad else 0
    weight_gradient += row_products if rows and rows[-1].delta.requires_grad else 0
    blocks = attention_total = again = 0.0
    below_trains = embeddings_train or recompute
    for block, parameters in all_blocks(model):
        cost, trained = _matmul_flops(block, parameters)
        blocks += cost
        attention_total += attention
        if getattr(block, "moe", None) is not None and block.moe.listens:  # the gate's context, without gradient
            attention_total += attention
            again += attention * recompute
        weight_gradient += trained
        if below_trains:
            input_gradient += cost + 2 * attention
        elif trained:
            # nothing below wants a gradient, but within the block it flows to what trains
            input_gradient += trained + 2 * attention * block.self_attn.v_proj.weight.requires_grad
        below_trains = below_trains or trained > 0
        again += (cost + attention) * recompute
    forward += blocks + attention_total
    again += head * head_recomputed
    return round(forward + again + input_gradient + weight_gradient)


def _matmul_flops(block: nn.Module, parameters: list[nn.Parameter]) -> tuple[float, float]:
    """(all, of weights that train): forward operations of a block's matrix products for one token."""
    cost = trained = 0.0
    moe = getattr(block, "moe", None)
    expert_names = {id(p) for p in moe.experts.parameters()} if moe is not None else set()
    for parameter in parameters:
        if parameter.dim() < 2:
            continue
        share = moe.config.top_k / moe.num_experts if id(parameter) in expert_names else 1
        cost += 2 * parameter.numel() * share
        trained += 2 * parameter.numel() * share * parameter.requires_grad
    return cost, trained
