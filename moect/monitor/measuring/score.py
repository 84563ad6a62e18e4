"""Score documents with a causal LM: cross-entropy in nats, and whether greedy decoding would give their answers.

The result depends on neither batch size nor padding nor the number of ranks, up to rounding. All ranks take part; every
one makes the same calls in the same order, which is what ZeRO-3 needs to gather the weights.

B windows, S tokens of the longest, N predicted tokens, C of them at a time, G documents, D width
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect.errors import DataError
from moect.model.append import RECORD, is_appended
from moect.model.embeddings import logits_of
from moect.model.losses import CHUNK_ELEMENTS
from moect.model.record import ForwardRecord
from moect.monitor.measuring.calibration import TouchMeter
from moect.monitor.measuring.exactness import Base, Comparison
from moect.monitor.measuring.routing import RoutingMeter
from moect.monitor.measuring.windows import TokenisedDocument, Window, cut_windows


@dataclass
class Score:
    """What a model makes of a document.

    Attributes:
        nll: nats, summed over the tokens that count.
        n_bytes: UTF-8 bytes that these tokens cover.
        exact: greedy decoding after the prompt gives the answer and then ends; None: there is no answer.
    """

    nll: float
    n_bytes: int
    exact: bool | None


@dataclass
class Sums:
    """What a rank has added up, document by document, before the ranks put their sums together.

    Attributes:
        documents: that were scored.
        nll_G, wrong_G: float64; nats, and tokens of answers that are not the likeliest.
    """

    documents: list[TokenisedDocument]
    nll_G: Tensor
    wrong_G: Tensor

    def reduce(self) -> None:
        """Add up over the ranks. Call it once, on every rank."""
        dist.all_reduce(self.nll_G)
        dist.all_reduce(self.wrong_G)

    def scores(self) -> list[Score]:
        """What the model makes of each document."""
        return [
            Score(nll, d.n_bytes, None if d.answer is None else wrong == 0)
            for d, nll, wrong in zip(self.documents, self.nll_G.tolist(), self.wrong_G.tolist(), strict=True)
        ]


def score(
    model: nn.Module,
    documents: list[TokenisedDocument],
    window: int,
    stride: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    **told,
) -> list[Score]:
    """Score documents, divided among the ranks; each gets the whole result. Arguments as for `add_up`."""
    sums = add_up(model, documents, window, stride, batch_size, rank, world_size, **told)
    if world_size > 1:
        sums.reduce()
    return sums.scores()


@torch.no_grad()  # not inference_mode, whose tensors ZeRO-3 cannot use in a later step
def add_up(
    model: nn.Module,
    documents: list[TokenisedDocument],
    window: int,
    stride: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    meter: RoutingMeter | None = None,
    compared: Collection[int] = (),
    comparison: Comparison | None = None,
    touch: TouchMeter | None = None,
) -> Sums:
    """Score this rank's share of the documents. No rank waits for another, but where the model's own parts do (ZeRO-3).

    Whether an answer is exact is read off one pass over prompt, answer and EOS: greedy decoding gives exactly these
    tokens if and only if each is the likeliest after those before it.

    Args:
        model: a causal LM of transformers. It is left in the mode it came in.
        documents: from `tokenise`.
        window: greatest number of tokens a forward pass sees of a document.
        stride: tokens predicted by each further window of a longer document.
        batch_size: windows a rank takes at once.
        rank, world_size: of this process; above 1 the default process group must be there.
        meter: told what each forward pass recorded; only for a model with an appended module.
        compared: indices of the documents to compare with the base; they are taken first, so that the others cost one
            pass only. Base and model must be scored with the same, to be scored in the same batches.
        comparison: told the logits of model and base; None: nothing is compared now.
        touch: told what each forward pass recorded, of all tokens that the window holds; only with a language gate.

    Raises:
        DataError: a token that the model's vocabulary does not have.
    """
    _check_vocabulary(documents, model.config.vocab_size)
    device = next(model.parameters()).device
    wanted = set(compared)
    windows = [w for i, d in enumerate(documents) for w in cut_windows(i, len(d.ids), window, stride)]
    # those to compare together, and then equal lengths: little padding, and the greatest batch comes early
    windows.sort(key=lambda w: (w.document not in wanted, -len(w)))
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    n_chunks = max(1, -(-batch_size * window * model.config.vocab_size // CHUNK_ELEMENTS))  # the same on all ranks
    sums = Sums(documents, *torch.zeros(2, len(documents), dtype=torch.float64, device=device))
    with evaluation_mode(model):
        for turn in range(-(-len(batches) // world_size)):
            index = turn * world_size + rank
            # all ranks compare in a turn, or none: with ZeRO-3 they make the same calls
            compares = comparison and any(w.document in wanted for w in batches[turn * world_size])
            batch = _Batch(documents, batches[min(index, len(batches) - 1)], device)
            record = ForwardRecord()
            nll, right = [], []
            for nll_C, right_C, *both in _predict(
                model, batch, n_chunks, record, comparison.base if compares else None
            ):
                nll.append(nll_C)
                right.append(right_C)
                if both and index < len(batches):
                    comparison.add(*both)
            if index >= len(batches):  # there is no batch left for this rank: it only kept the others company
                continue
            nll_N, right_N = torch.cat(nll), torch.cat(right)
            sums.nll_G.index_add_(0, batch.document_N, nll_N.double() * batch.counts_N)
            sums.wrong_G.index_add_(0, batch.document_N, (~right_N & batch.in_answer_N).double())
            if meter:
                meter.add(record, batch.document_T)
            if touch:
                touch.add(record, batch.text_T)
    return sums


@contextmanager
def evaluation_mode(model: nn.Module):
    """Inside, the whole model is in evaluation mode; afterwards every part is in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Batch:
    """Windows, padded on the right to equal length. `document_T` is -1 where a position predicts nothing new, `text_T`
    only at padding."""

    def __init__(self, documents: list[TokenisedDocument], windows: list[Window], device: torch.device):
        shape_BS = (len(windows), len(max(windows, key=len)))
        ids_BS, mask_BS, target_BS = torch.zeros(3, *shape_BS, dtype=torch.int64)
        document_BS, text_BS = torch.full(shape_BS, -1), torch.full(shape_BS, -1)
        counts_BS, in_answer_BS = torch.zeros(2, *shape_BS, dtype=torch.bool)
        for b, w in enumerate(windows):
            document = documents[w.document]
            ids_BS[b, : len(w)] = torch.tensor(document.ids[w.start : w.end])
            mask_BS[b, : len(w)] = 1
            text_BS[b, : len(w)] = w.document
            target_BS[b, : len(w)] = torch.tensor(document.ids[w.start + 1 : w.end + 1])
            document_BS[b, w.first - 1 - w.start : len(w)] = w.document
            position_S = torch.arange(w.start + 1, w.start + 1 + shape_BS[1])  # of the predicted token in its document
            counts_BS[b] = (position_S >= document.first) & (position_S < document.last)
            if document.answer is not None:
                in_answer_BS[b] = position_S >= document.answer
        predicts_BS = document_BS >= 0
        self.ids_BS, self.mask_BS, self.predicts_BS = ids_BS.to(device), mask_BS.to(device), predicts_BS.to(device)
        self.document_T, self.text_T = document_BS.flatten().to(device), text_BS.flatten().to(device)
        self.document_N = document_BS[predicts_BS].to(device)
        self.target_N = target_BS[predicts_BS].to(device)
        self.counts_N = counts_BS[predicts_BS].to(device)
        self.in_answer_N = in_answer_BS[predicts_BS].to(device)


def _predict(
    model: nn.Module, batch: _Batch, n_chunks: int, record: ForwardRecord, base: Base | None
) -> Iterator[tuple[Tensor, ...]]:
    """Negative log-likelihood (C,) fp32 of some targets, and whether each is the likeliest token (C,); with a base
    also the logits (C, V) of both models and the documents (C,)."""
    hidden_ND = _hidden(model, batch, record)
    gate_logit_N = record.gate_logit_T[batch.predicts_BS.flatten()] if record.gate_logit_T is not None else None
    columns = [batch.target_N, batch.document_N, hidden_ND]
    columns += [gate_logit_N] if gate_logit_N is not None else []
    if base:
        with base() as base_model:
            columns.append(_hidden(base_model, batch, ForwardRecord()))
    for target_C, document_C, *inputs_C in zip(*(column.tensor_split(n_chunks) for column in columns), strict=True):
        of_base_CD = inputs_C.pop() if base else None
        logits_CV = logits_of(model, *inputs_C)
        nll_C = nn.functional.cross_entropy(logits_CV.float(), target_C, reduction="none")
        right_C = logits_CV.argmax(-1) == target_C
        if base:
            with base() as base_model:
                base_logits_CV = logits_of(base_model, of_base_CD)
            yield nll_C, right_C, logits_CV, base_logits_CV, document_C
        else:
            yield nll_C, right_C


def _hidden(model: nn.Module, batch: _Batch, record: ForwardRecord) -> Tensor:
    """Last hidden states (N, D) where something is predicted. The decoder and then the head, so that there are logits
    only where they are wanted, and never all at once."""
    extra = {RECORD: record} if is_appended(model) else {}
    outputs = model.model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False, **extra)
    return outputs.last_hidden_state[batch.predicts_BS]


def _check_vocabulary(documents: list[TokenisedDocument], vocab_size: int) -> None:
    greatest = max((max(d.ids, default=0) for d in documents), default=0)
    if greatest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {greatest} in a text of data.evaluation, the model has {vocab_size}: "
            "set model.tokenizer to the base's own"
        )
