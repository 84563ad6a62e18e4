"""Both models block by block, for models that do not fit into memory: two blocks in fp32 are there at a time.

A block is run as a model of one block by the same classes, and loaded by the same loader, as the whole would be.

S sequence, D width
"""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moect.export.proof.assembled import assemble
from moect.export.proof.comparison import Comparison, RoutesOfStock, Text, routes_of
from moect.export.proof.whole import check_report, computing_as_ours, quiet
from moect.export.targets.form import EMBEDDING, HEAD, Subject, Target
from moect.export.targets.stock import StockMixture
from moect.export.trained import TrainedModel, fold_rows
from moect.export.weights import FolderWeights
from moect.model.append import begin_pass, modules_of
from moect.model.counting_gate import Tokens
from moect.model.embeddings import logits_of
from moect.model.record import RECORD, ForwardRecord
from moect.progress import Progress


class _Side:
    """One of the two models: where each text stands in it."""

    def __init__(self, build):
        self.build = build  # from a range of blocks to a model of them
        self.hidden: list[Tensor] = []
        self.records: list[ForwardRecord] = []  # the language gate's values go on through the blocks

    def begin(self, texts: list[Text]) -> None:
        model = self.build(range(0))
        self.hidden = [model.get_input_embeddings()(text.ids) for text in texts]
        self.records = [ForwardRecord(tokens=Tokens(text.ids)) for text in texts]
        for text, record in zip(texts, self.records, strict=True):
            begin_pass(model.model, text.ids, {RECORD: record})

    def step(self, block: int) -> list[dict[int, Tensor]]:
        """Through one block. Returns the routes of each text."""
        model = self.build(range(block, block + 1))
        model.model.norm = nn.Identity()
        chosen = []
        for number, h_1SD in enumerate(self.hidden):
            if modules_of(model):
                record = self.records[number] = replace(self.records[number], blocks={})
                self.hidden[number] = self._run(model, h_1SD, **{RECORD: record})
                chosen.append(_of(block, routes_of(record)))
            else:
                routes = RoutesOfStock(model)
                self.hidden[number] = self._run(model, h_1SD)
                routes.remove()
                chosen.append(_of(block, routes.chosen))
        return chosen

    def _run(self, model: nn.Module, h_1SD: Tensor, **kwargs) -> Tensor:
        return model.model(inputs_embeds=h_1SD, use_cache=False, **kwargs).last_hidden_state

    def logits(self):
        """Of each text in turn."""
        model = self.build(range(0))
        for h_1SD, record in zip(self.hidden, self.records, strict=True):
            gate_T = record.gate_logit_T
            yield logits_of(model, model.model.norm(h_1SD), None if gate_T is None else gate_T.view(h_1SD.shape[:2]))


@torch.no_grad()
def compare_by_block(
    folder: Path, target: Target, written: Subject, trained: TrainedModel, texts: list[Text], bound: float
) -> Comparison:
    """Compare logits and routes of a folder with those of the model that it was written from, both in fp32.

    Args:
        folder: what was written.
        target: as what.
        written: what the target was given to write.
        trained: the model.
        texts: to compare on.
        bound: greatest difference of a logit that passes.
    """
    weights = FolderWeights(folder)
    stock = isinstance(target, StockMixture)
    ours = _Side(partial(_assembled, trained))
    theirs = _Side(
        (lambda blocks: _stock(target, written, weights, blocks))
        if stock
        else (lambda blocks: _unhooked(assemble(written, weights, blocks)))
    )
    return _compare(ours, theirs, texts, bound, written.base.num_hidden_layers)


@torch.no_grad()
def compare_folding(trained: TrainedModel, texts: list[Text], bound: float) -> Comparison:
    """The same for the trained model, and the one with rows of tokens added to embedding and head, before these sums
    are rounded."""
    folded = fold_rows(trained, exact=True)
    sides = [_Side(partial(_assembled, model)) for model in (trained, folded)]
    return _compare(*sides, texts, bound, trained.subject.base.num_hidden_layers)


def _assembled(model: TrainedModel, blocks: range) -> nn.Module:
    return _unhooked(assemble(model.subject, model, blocks))


def _compare(ours: _Side, theirs: _Side, texts: list[Text], bound: float, depth: int) -> Comparison:
    comparison = Comparison(bound, by_block=True)
    progress = Progress("comparing", depth, count="blocks")
    try:
        for side in (ours, theirs):
            side.begin(texts)
        for block in range(depth):
            for a, b in zip(ours.step(block), theirs.step(block), strict=True):
                comparison.add_routes(a, b)
            gc.collect()  # models hold themselves in circles
            progress.add(1)
        for text, a, b in zip(texts, ours.logits(), theirs.logits(), strict=True):
            comparison.add_logits(text, a, b)
    finally:
        progress.end()
    return comparison


def _of(block: int, chosen: dict[int, Tensor]) -> dict[int, Tensor]:
    """Routes of a model of one block, under the block's own number."""
    return {block: chosen[0]} if chosen else {}


def _unhooked(model: nn.Module) -> nn.Module:
    if modules_of(model):  # the record comes from outside, and goes on through the blocks
        model.model._moect_hook.remove()
    return model


def _stock(target: StockMixture, subject: Subject, weights: FolderWeights, blocks: range) -> nn.Module:
    """Some blocks, or with none of them embedding and head, through the loader of transformers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = target.config_of_blocks(subject, blocks)
    if blocks:
        start, D = f"model.layers.{blocks.start}.", subject.base.hidden_size
        state = {n.replace(start, "model.layers.0."): weights[n] for n in weights if n.startswith(start)}
        config.vocab_size, config.pad_token_id, config.tie_word_embeddings = 1, None, False
        state |= {EMBEDDING: torch.zeros(1, D), HEAD: torch.zeros(1, D), "model.norm.weight": torch.ones(D)}
    else:
        state = {n: weights[n] for n in weights if not n.startswith("model.layers.")}
    with quiet():
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    check_report(report, f"{weights.folder}: blocks {blocks}")
    return computing_as_ours(model)
