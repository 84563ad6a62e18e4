"""The base's own architecture, for what was trained in place: all parameters, or low-rank updates merged into them."""

from __future__ import annotations

import copy

from moect.export.targets.form import Piece, Subject, Support, Target


class BaseForm(Target):
    """The base with other weights."""

    name = "base"

    def supports(self, subject: Subject) -> Support:
        if subject.moe is not None:
            return Support("a module was appended, which the base's architecture does not have")
        return Support(None, True)

    def config(self, subject: Subject):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        config = copy.deepcopy(subject.base)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        return config

    def block(self, subject: Subject, index: int, names: list[str]) -> list[Piece]:
        return [Piece(name, (name,)) for name in names]
