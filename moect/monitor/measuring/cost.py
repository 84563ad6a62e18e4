"""What a measurement of the monitor costs, counted before it is made: tokens, forward passes and their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moect.config import RunConfig
from moect.data.reading.evaluation import EvaluationText, is_at_hand, load_evaluation
from moect.data_config import source_key
from moect.errors import DataError
from moect.model.append import modules_of
from moect.model.block_expansion import MARK, row_of_blocks
from moect.model.embeddings import rows_of
from moect.model.families import blocks_of
from moect.monitor.measuring.windows import cut_windows, tokenise

USUAL_SHARE = 0.05  # of the training's arithmetic between two checkpoints; above it there is a remedy to name


@dataclass
class Passes:
    """Forward passes over documents, as windows with their overlap; padding is left out.

    Attributes:
        windows: of all documents.
        tokens: that they hold.
        predictions: for which there are logits; each token but the first of its document, once.
        squares: sum of the squares of the windows' lengths, which attention goes by.
    """

    windows: int = 0
    tokens: int = 0
    predictions: int = 0
    squares: int = 0

    def __add__(self, other: Passes) -> Passes:
        """Both together."""
        return Passes(*(getattr(self, name) + getattr(other, name) for name in vars(self)))


def count_passes(lengths: list[int], window: int, stride: int) -> Passes:
    """The passes over documents of so many tokens, BOS and EOS included; window and stride as for `cut_windows`."""
    made = Passes()
    for n_tokens in lengths:
        for w in cut_windows(0, n_tokens, window, stride):
            made += Passes(1, len(w), w.end - w.first + 1, len(w) ** 2)
    return made


def forward_flops(model: nn.Module, passes: Passes, module: bool = True) -> int:
    """Floating-point operations of forward passes, counted as in `moect.model.flops`.

    Args:
        model: as `build_model` makes it; shapes are enough.
        passes: what it reads; only predictions have logits.
        module: with what the method adds to the base; the experts as if they took every token, gate or not.
    """
    config = model.config
    added = {id(p) for moe in modules_of(model) for p in moe.parameters()}
    # of experts a token meets a share
    met = {id(p): m.config.top_k / m.num_experts for m in modules_of(model) for p in m.experts.parameters()}
    products = 0.0
    for name, parameter in blocks_of(model).named_parameters():
        if parameter.dim() < 2 or (not module and (id(parameter) in added or "lora_" in name or MARK in name)):
            continue
        products += 2 * parameter.numel() * met.get(id(parameter), 1)
    rows = rows_of(model) if module else []
    head = 2 * model.lm_head.weight.numel() + (2 * rows[-1].delta.numel() if rows else 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = len(row_of_blocks(model) if module else blocks_of(model))
    # scores, and their mix of values; a token attends to half of its window on average
    attention = 2 * 2 * config.num_attention_heads * head_dim * blocks * passes.squares / 2
    return round(products * passes.tokens + head * passes.predictions + attention)


def monitor_cost(config: RunConfig, model: nn.Module, lengths: list[list[int]], training_flops_per_token: int) -> dict:
    """What the monitor does at a checkpoint: the model over all texts, the base over those documents whose logits are
    compared. Not counted: samples and tasks.

    Args:
        config: the run's; the monitor is enabled.
        model: as `build_model` makes it; shapes are enough.
        lengths: of the documents of each text in tokens, as `token_lengths` gives them.
        training_flops_per_token: of the run.

    Returns:
        texts, documents; tokens and base_tokens that model and base read; passes of the model, of
        `monitor.batch_size` windows; flops; every: steps between two checkpoints; share: of the training's operations
        between them.
    """
    window = config.monitor.window or config.data.sequence_length
    stride = config.monitor.stride or max(1, window // 2)
    compare = config.monitor.compare if config.model.base else 0  # a base from scratch has nothing to keep
    of_model = count_passes([n for text in lengths for n in text], window, stride)
    of_base = count_passes([n for text in lengths for n in text[:compare]], window, stride)
    if config.model.extend_tokenizer:  # logits are compared on the base's tokens, so the model reads these as well
        of_model += of_base
    every = min(config.train.save_every, config.train.steps)
    training = every * config.train.batch_size * config.data.sequence_length * training_flops_per_token
    flops = forward_flops(model, of_model) + forward_flops(model, of_base, module=False)
    return {
        "texts": len(lengths),
        "documents": sum(map(len, lengths)),
        "tokens": of_model.tokens,
        "base_tokens": of_base.tokens,
        "passes": -(-of_model.windows // config.monitor.batch_size),
        "flops": flops,
        "every": every,
        "share": flops / training,
    }


def token_lengths(texts: list[EvaluationText], tokenizer) -> list[list[int]]:
    """Tokens of each document of each text, BOS and EOS included, as the monitor reads them."""
    return [[len(document.ids) for document in tokenise(tokenizer, text.documents)] for text in texts]


def planned_lengths(config: RunConfig, tokenizer, cache_folder: Path) -> list[list[int]] | str:
    """`token_lengths` of a run that is only planned, without the network; or, in words, why they are not known.

    Args:
        config: reads `data`.
        tokenizer: the run's; None: it is still to be made.
        cache_folder: where held-out text is kept.
    """
    if tokenizer is None:
        return "there is no tokenizer yet"
    try:
        for source in config.data.evaluation:
            if not is_at_hand(source, config.data, cache_folder):
                return f"{source_key(source)} is not in the cache yet; training fetches it"
        return token_lengths(load_evaluation(config.data, cache_folder), tokenizer)
    except DataError as error:
        return str(error)
