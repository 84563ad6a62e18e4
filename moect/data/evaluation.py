"""Held-out texts for the monitor."""

from __future__ import annotations

from dataclasses import dataclass

from moect.config import DataConfig, Role
from moect.data.sources import read_documents


@dataclass
class EvaluationDocument:
    """A held-out text, or a prompt and its answer.

    Attributes:
        text: the text; with an answer, the prompt alone.
        answer: what should follow the prompt; None where the text is not a prompt.
    """

    text: str
    answer: str | None = None

    @property
    def full_text(self) -> str:
        """What bits per byte are measured on: the text, and the answer if there is one."""
        return self.text + (self.answer or "")


@dataclass
class EvaluationText:
    """The documents of one entry of `data.evaluation`."""

    lang: str
    role: Role
    domain: str
    documents: list[EvaluationDocument]


def load_evaluation(config: DataConfig) -> list[EvaluationText]:
    """Read all held-out texts.

    Raises:
        DataError: see `read_documents`; a missing or empty answer makes a document unusable too.
    """
    return [
        EvaluationText(
            lang=source.lang,
            role=config.languages[source.lang],
            domain=source.domain,
            documents=[
                EvaluationDocument(d.text, d.fields[source.answer_field] if source.answer_field else None)
                for d in read_documents(source, config.root, config.max_bad_fraction)
            ],
        )
        for source in config.evaluation
    ]
