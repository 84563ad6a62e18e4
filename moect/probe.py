"""Where a base wants experts: in which blocks its languages are alike, and which blocks training moves.

Two published rules, as values to write into a configuration:

    experts of block i      N_i = ceil(δ (1/S_i) / Σ_j (1/S_j))                          LayerMoE, arXiv 2505.22582
    blocks with a module    those whose FFN moved by least + 0.6 (most - least) or more  DMoE, arXiv 2506.12388

S_i is the mean over pairs of languages of the cosine between their mean inputs of block i's FFN, δ the number of
experts to give. What moved is told by a few steps of training everything, ‖W - W_base‖ / ‖W_base‖ of the FFN.

G languages, L blocks, D width
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moect.config import RunConfig, load_config
from moect.data.tokens.store import TokenStore, build_store
from moect.data.vocabulary.tokenizer import load_tokenizer
from moect.errors import ConfigError
from moect.model.build import DTYPES, base_fingerprint, load_base, load_base_config
from moect.model.families import blocks_of, check_config
from moect.progress import Progress
from moect.tables import aligned
from moect.train.checkpoints.reading import list_checkpoints, read_info, read_module

TOKENS = 8192  # of each language
SHARE = 0.6  # of the way from the block that moved least to the one that moved most


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        languages: those that were compared.
        similarity_L: S of each block.
        moved_L: how far each block's FFN moved; None where that was not asked for.
        layers: the blocks that are to have a module.
        experts: how many each of these is to have.
    """

    languages: list[str]
    similarity_L: list[float]
    moved_L: list[float] | None
    layers: list[int]
    experts: list[int]


def probe(config: RunConfig, experts: int | None = None, moved: Path | None = None) -> Probe:
    """Read some text of `data.train` with the base, and say where experts would go.

    Args:
        config: of the run that is to have them; reads `model`, `data`, `moe.layers`, `moe.top_k`, and `moe.experts`.
        experts: in the mean block; None: as many as `moe.experts` has there.
        moved: a run of a few steps with `method: full` on the same base; then it chooses the blocks, not `moe.layers`.

    Raises:
        ConfigError: a base or text is not there, there is but one language, or the run is another than it should be.
    """
    if len({source.lang for source in config.data.train}) < 2:
        raise ConfigError("data.train has one language, and blocks are compared by how alike several are in them")
    try:
        layers = config.moe.layer_indices(load_base_config(config.model).num_hidden_layers)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    moved_L = None if moved is None else movement(config, moved)
    tokenizer = load_tokenizer(config.model)
    cache = Path(config.output) / ".cache"
    stores = [build_store(source, config.data, tokenizer, cache) for source in config.data.train]
    languages = list(dict.fromkeys(store.lang for store in stores))
    model = load_base(config.model, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    check_config(model.config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    length = min(config.data.sequence_length, model.config.max_position_embeddings)
    inputs_GLD, progress = [], Progress("reading", len(languages), count="languages")
    for language in languages:
        mine = [store for store in stores if store.lang == language]
        inputs_GLD.append(mean_inputs(model, documents(mine, length)))
        progress.add(1)
    progress.end()
    similarity_L = similarity(torch.stack(inputs_GLD))
    if moved_L:
        layers = most_moved(moved_L)
    if experts is None:
        given = config.moe.experts
        experts = round(sum(given) / len(given)) if isinstance(given, list) else given
    total = experts * len(layers)
    least = max(config.moe.top_k, 1 + config.moe.frozen_experts, 3 * (config.loss.balance_over == "trained"))
    counts = allocate([similarity_L[i] for i in layers], total, least)
    return Probe(languages, similarity_L, moved_L, layers, counts)


def documents(stores: list[TokenStore], length: int) -> Iterator[np.ndarray]:
    """Beginnings of documents, at most TOKENS tokens together, in turns from each store."""
    left = TOKENS
    for number in range(max(store.n_documents for store in stores)):
        for store in stores:
            if left <= 0:
                return
            if number < store.n_documents:
                first, last = store.offsets[number : number + 2]
                ids = np.asarray(store.tokens[first : min(last, first + min(length, left))]).astype(np.int64)
                left -= len(ids)
                if len(ids):
                    yield ids


@torch.no_grad()
def mean_inputs(model: nn.Module, texts: Iterator[np.ndarray]) -> Tensor:
    """The mean over all tokens of each block's FFN input, (L, D) fp64 on the CPU."""
    blocks = blocks_of(model)
    sums_LD = torch.zeros(len(blocks), model.config.hidden_size, dtype=torch.float64, device=model.device)
    tokens = 0

    def adding(index: int):
        def add(_, inputs):
            sums_LD[index] += inputs[0].double().sum((0, 1))

        return add

    hooks = [block.mlp.register_forward_pre_hook(adding(i)) for i, block in enumerate(blocks)]
    try:
        for ids in texts:
            tokens += len(ids)
            model.model(torch.from_numpy(ids)[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sums_LD.cpu() / max(tokens, 1)


def similarity(inputs_GLD: Tensor) -> list[float]:
    """S of each block: the mean cosine over pairs of languages."""
    pairs = combinations(inputs_GLD, 2)
    return torch.stack([nn.functional.cosine_similarity(a_LD, b_LD, dim=-1) for a_LD, b_LD in pairs]).mean(0).tolist()


def allocate(similarity_L: list[float], total: int, least: int = 1) -> list[int]:
    """Experts of each block, the more the less alike its languages are; rounded up, so a few more than `total`.

    Args:
        similarity_L: S; what is not above 0.01 counts as that.
        total: δ.
        least: of each block.
    """
    inverse_L = [1 / max(s, 0.01) for s in similarity_L]
    # a share that is whole is not to be rounded up for the last bit of it
    return [max(least, math.ceil(round(total * i / sum(inverse_L), 9))) for i in inverse_L]


def movement(config: RunConfig, run: Path) -> list[float]:
    """How far the FFN of each block has moved in a run that trained everything, as a share of its norm.

    Args:
        config: names the base.
        run: the run's folder.

    Raises:
        ConfigError: it has no checkpoint, another method or another base.
    """
    paths = list_checkpoints(Path(run) / "checkpoints")
    if not paths:
        raise ConfigError(f"{run}: has no checkpoint; train a few steps with method=full first")
    made = load_config(Path(run) / "config.yaml")
    if made.method != "full":
        raise ConfigError(f"{run}: was made with method: {made.method}, and only with `full` do FFNs move")
    if read_info(paths[0])["base_fingerprint"] != base_fingerprint(config.model, config.seed):
        raise ConfigError(f"{run}: was made with another base; take one on the base of this configuration")
    model = load_base(config.model, DTYPES[made.train.precision])  # what it rounded when it began has not moved
    trained = read_module(paths[0])
    shares = []
    for index, block in enumerate(blocks_of(model)):
        changed = whole = 0.0
        for name, weight in block.mlp.named_parameters():
            before = weight.double().cpu()
            now = trained[f"model.layers.{index}.mlp.{name}"].double()
            changed += (now - before).square().sum().item()
            whole += before.square().sum().item()
        shares.append(math.sqrt(changed / whole))
    return shares


def most_moved(moved_L: list[float]) -> list[int]:
    """The blocks that moved by least + SHARE (most - least) or more; all of them if all moved alike."""
    low, high = min(moved_L), max(moved_L)
    return [i for i, moved in enumerate(moved_L) if moved >= low + SHARE * (high - low)]


def render(found: Probe) -> str:
    """A table of the blocks, and what to write into the configuration."""
    experts = dict(zip(found.layers, found.experts, strict=True))
    heads = ["block", "similarity", *(["moved"] if found.moved_L else []), "experts"]
    lines = []
    for index, alike in enumerate(found.similarity_L):
        moved = [f"{found.moved_L[index]:.2%}"] if found.moved_L else []
        lines.append([str(index), f"{alike:.4f}", *moved, str(experts.get(index, ""))])
    layers = "all" if len(found.layers) == len(found.similarity_L) else str(found.layers)
    return "\n".join(
        [
            f"similarity of {', '.join(found.languages)} in the input of each block's FFN (mean cosine of their means)",
            aligned(heads, lines),
            "",
            "moe:",
            f"  layers: {layers}",
            f"  experts: {found.experts} # {sum(found.experts)} in all",
        ]
    )
