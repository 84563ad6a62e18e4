"""A model in training, as lm-eval's own class for models of transformers takes it."""

from __future__ import annotations

import copy

from torch import Tensor, nn


class _Live:
    """Stands between lm-eval and the model. What is no `nn.Module` it neither sets to evaluation nor ties the weights
    of, and a forward pass for log-likelihoods needs no cache.

    Args:
        model: a causal LM.
        synced: all ranks generate together until the last one has finished, as ZeRO-3 needs it.
    """

    def __init__(self, model: nn.Module, synced: bool):
        self._model, self._synced = model, synced
        self.config = model.config
        self.device = next(model.parameters()).device

    def __call__(self, input_ids: Tensor):
        return self._model(input_ids=input_ids, use_cache=False)

    def generate(self, **kwargs) -> Tensor:
        return self._model.generate(synced_gpus=self._synced, **kwargs)


def live_lm(model: nn.Module, tokenizer, batch_size: int, synced: bool):
    """The model for lm-eval.

    Args:
        model: a causal LM, in evaluation mode.
        tokenizer: copied: lm-eval gives it a padding token and changes its settings.
        batch_size: requests at once.
        synced: see `_Live`.
    """
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=_Live(model, synced), backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
    )
