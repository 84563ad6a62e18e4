"""How far a model's logits are from its base's, on the same text in the same batches: bits, first choice, divergence.

Equal bits are a statement about equal kernels and equal shapes: both models see the same rows, padded alike.

G documents, C predictions, V tokens of the base's vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from math import log

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect.monitor.measuring.intervals import share_interval

LENGTHS = (1, 17, 33, 65, 129, 257, 513, 1025, 2049)  # the first of each class of document lengths, in tokens
AS_BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}

Base = Callable[[], AbstractContextManager[nn.Module]]


class Comparison:
    """Adds up, document by document, how predictions differ from the base's.

    Args:
        base: makes a context in which its value computes what the base computes.
        documents: G, how many there are.
        compared: indices of those that are to be compared.
        device: of the sums.
    """

    def __init__(self, base: Base, documents: int, compared: Collection[int], device: torch.device):
        self.base, self.compared = base, set(compared)
        # predictions, of them with the base's bits, of them with its first choice, sum of KL in nats
        self.sums_G4 = torch.zeros(documents, 4, dtype=torch.float64, device=device)
        self.greatest_G = torch.zeros(documents, dtype=torch.float64, device=device)  # difference of a logit

    def add(self, logits_CV: Tensor, base_logits_CV: Tensor, document_C: Tensor) -> None:
        """Count predictions of documents `document_C`.

        Args:
            logits_CV: of the model, in its dtype; columns beyond the base's vocabulary are of added tokens.
            base_logits_CV: of the base.
        """
        V = base_logits_CV.shape[1]
        own_CV = logits_CV[:, :V]
        bits = AS_BITS[base_logits_CV.dtype]
        same_C = (own_CV.contiguous().view(bits) == base_logits_CV.contiguous().view(bits)).all(-1)
        agrees_C = logits_CV.argmax(-1) == base_logits_CV.argmax(-1)
        log_base_CV = base_logits_CV.float().log_softmax(-1)
        log_model_CV = logits_CV.float().log_softmax(-1)[:, :V]
        kl_C = (log_base_CV.exp() * (log_base_CV - log_model_CV)).sum(-1)
        values_C4 = torch.stack([torch.ones_like(kl_C), same_C, agrees_C, kl_C], 1).double()
        self.sums_G4.index_add_(0, document_C, values_C4)
        difference_C = (own_CV.float() - base_logits_CV.float()).abs().amax(-1).double()
        self.greatest_G.scatter_reduce_(0, document_C, difference_C, "amax")

    def reduce(self) -> None:
        """Add up over the ranks. Call it once, on every rank."""
        dist.all_reduce(self.sums_G4)
        dist.all_reduce(self.greatest_G, op=dist.ReduceOp.MAX)

    def result(self, documents: list[int], resamples: int) -> dict | None:
        """What `exact` in a row of the monitor says of these documents; None where none of them was compared.

        A document is identical if all of its predictions have the base's bits. Its length is its number of predictions.

        Args:
            documents: indices.
            resamples: of the bootstrap behind the interval of the tokens' share; 0: none.
        """
        chosen = [d for d in documents if d in self.compared]
        sums_4G = self.sums_G4[chosen].T.cpu().numpy()
        if sums_4G[0].sum() == 0:
            return None
        tokens_G, same_G, agrees_G, kl_G = sums_4G[:, sums_4G[0] > 0]
        whole_G = tokens_G == same_G
        identical, count = int(whole_G.sum()), len(whole_G)
        low, high = wilson(identical, count)
        result = {"documents": count, "identical_documents": identical, "low": low, "high": high}
        result |= {"tokens": int(tokens_G.sum()), "identical_tokens": int(same_G.sum())}
        if resamples:
            result["tokens_low"], result["tokens_high"] = share_interval(same_G, tokens_G, resamples)
        result["top1_agreement"] = agrees_G.sum() / tokens_G.sum()
        result["kl"] = kl_G.sum() / tokens_G.sum() / log(2)
        result["max_logit_difference"] = self.greatest_G[chosen].max().item()
        result["by_length"] = _by_length(tokens_G, whole_G)
        return result


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share after Wilson (1927): it has a width even where all or none are hits.

    Args:
        hits, count: of the sample, count at least 1.
        z: quantile of the normal distribution.
    """
    share, centre = hits / count, (hits + z * z / 2) / (count + z * z)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5 / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def _by_length(tokens_G: np.ndarray, whole_G: np.ndarray) -> list[dict]:
    classes = []
    for first, after in zip(LENGTHS, (*LENGTHS[1:], None), strict=True):
        here_G = (tokens_G >= first) & (tokens_G < (after or np.inf))
        if not here_G.any():
            continue
        identical, count = int(whole_G[here_G].sum()), int(here_G.sum())
        low, high = wilson(identical, count)
        counts = {"documents": count, "identical_documents": identical, "low": low, "high": high}
        classes.append({"from": first, "to": after and after - 1, **counts})
    return classes
