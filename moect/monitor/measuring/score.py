"""Score documents with a causal LM: cross-entropy in nats, and whether greedy decoding would give their answers.

The result depends on neither batch size nor padding nor the number of ranks, up to rounding. All ranks take part; every
one makes the same calls in the same order, which is what ZeRO-3 needs to gather the weights.

B windows, S tokens of the longest, N predicted tokens, C of them at a time, G documents, D width
"""

from __future__ import annotations

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


@torch.no_grad()  # not inference_mode, whose tensors ZeRO-3 cannot use in a later step
def score(
    model: nn.Module,
    documents: list[TokenisedDocument],
    window: int,
    stride: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    meter: RoutingMeter | None = None,
) -> list[Score]:
    """Score documents, divided among the ranks; each gets the whole result.

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

    Raises:
        DataError: a token that the model's vocabulary does not have.
    """
    _check_vocabulary(documents, model.config.vocab_size)
    device = next(model.parameters()).device
    windows = [w for i, d in enumerate(documents) for w in cut_windows(i, len(d.ids), window, stride)]
    windows.sort(key=len, reverse=True)  # equal lengths together: little padding, and the greatest batch comes first
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    n_chunks = max(1, -(-batch_size * window * model.config.vocab_size // CHUNK_ELEMENTS))  # the same on all ranks
    nll_G, wrong_G = torch.zeros(2, len(documents), dtype=torch.float64, device=device)
    with evaluation_mode(model):
        for turn in range(-(-len(batches) // world_size)):
            index = turn * world_size + rank
            batch = _Batch(documents, batches[min(index, len(batches) - 1)], device)
            record = ForwardRecord()
            nll_N, right_N = _predict(model, batch, n_chunks, record)
            if index >= len(batches):  # there is no batch left for this rank: it only kept the others company
                continue
            nll_G.index_add_(0, batch.document_N, nll_N.double() * batch.counts_N)
            wrong_G.index_add_(0, batch.document_N, (~right_N & batch.in_answer_N).double())
            if meter:
                meter.add(record, batch.document_T)
    if world_size > 1:
        dist.all_reduce(nll_G)
        dist.all_reduce(wrong_G)
    return [
        Score(nll, d.n_bytes, None if d.answer is None else wrong == 0)
        for d, nll, wrong in zip(documents, nll_G.tolist(), wrong_G.tolist(), strict=True)
    ]


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
    """Windows, padded on the right to equal length. `document_T` is -1 where a position predicts nothing new."""

    def __init__(self, documents: list[TokenisedDocument], windows: list[Window], device: torch.device):
        shape_BS = (len(windows), len(max(windows, key=len)))
        ids_BS, mask_BS, target_BS = torch.zeros(3, *shape_BS, dtype=torch.int64)
        document_BS = torch.full(shape_BS, -1)
        counts_BS, in_answer_BS = torch.zeros(2, *shape_BS, dtype=torch.bool)
        for b, w in enumerate(windows):
            document = documents[w.document]
            ids_BS[b, : len(w)] = torch.tensor(document.ids[w.start : w.end])
            mask_BS[b, : len(w)] = 1
            target_BS[b, : len(w)] = torch.tensor(document.ids[w.start + 1 : w.end + 1])
            document_BS[b, w.first - 1 - w.start : len(w)] = w.document
            position_S = torch.arange(w.start + 1, w.start + 1 + shape_BS[1])  # of the predicted token in its document
            counts_BS[b] = (position_S >= document.first) & (position_S < document.last)
            if document.answer is not None:
                in_answer_BS[b] = position_S >= document.answer
        predicts_BS = document_BS >= 0
        self.ids_BS, self.mask_BS, self.predicts_BS = ids_BS.to(device), mask_BS.to(device), predicts_BS.to(device)
        self.document_T = document_BS.flatten().to(device)
        self.document_N = document_BS[predicts_BS].to(device)
        self.target_N = target_BS[predicts_BS].to(device)
        self.counts_N = counts_BS[predicts_BS].to(device)
        self.in_answer_N = in_answer_BS[predicts_BS].to(device)


def _predict(model: nn.Module, batch: _Batch, n_chunks: int, record: ForwardRecord) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,) fp32 of each target, and whether it is the likeliest token (N,)."""
    extra = {RECORD: record} if is_appended(model) else {}
    # the decoder and then the head, so that there are logits only where they are wanted, and never all at once
    hidden_BSD = model.model(
        input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False, **extra
    ).last_hidden_state
    columns = [batch.target_N, hidden_BSD[batch.predicts_BS]]
    if record.gate_logit_T is not None:
        columns.append(record.gate_logit_T[batch.predicts_BS.flatten()])
    nll, right = [], []
    for target_C, *inputs_C in zip(*(column.tensor_split(n_chunks) for column in columns), strict=True):
        logits_CV = logits_of(model, *inputs_C).float()
        nll.append(nn.functional.cross_entropy(logits_CV, target_C, reduction="none"))
        right.append(logits_CV.argmax(-1) == target_C)
    return torch.cat(nll), torch.cat(right)


def _check_vocabulary(documents: list[TokenisedDocument], vocab_size: int) -> None:
    greatest = max((max(d.ids, default=0) for d in documents), default=0)
    if greatest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {greatest} in a text of data.evaluation, the model has {vocab_size}: "
            "set model.tokenizer to the base's own"
        )
