"""A tokenizer, texts and a configuration for the monitor's tests."""

from __future__ import annotations

from moect.config import RunConfig, config_from_dict
from moect.data.reading.evaluation import EvaluationDocument, EvaluationText
from moect.data.vocabulary.tokenizer import train_tokenizer

SENTENCES = [
    "one hundred and nineteen",
    "dau gant a phedwar ar bymtheg",
    "three hundred and four plus seven is three hundred and eleven",
    "naw",
    "రెండు వందల పంతొమ్మిది",
    "tri chant a phedwar ac un a deg, wyth, naw, dau, un, tri, pedwar, pump, chwech, saith",
    "é",
    "twenty two",
]


def make_tokenizer(folder, bos: bool = True):
    """A byte-level BPE with few merges, so that characters of other scripts take several tokens."""
    tokenizer = train_tokenizer(SENTENCES[:3], 300, folder)
    if not bos:
        tokenizer.bos_token = None
    return tokenizer


def documents(count: int = len(SENTENCES)) -> list[EvaluationDocument]:
    """Plain documents of very different lengths."""
    return [EvaluationDocument(text) for text in SENTENCES[:count]]


def evaluation_texts() -> list[EvaluationText]:
    """An old and a new language; the new one has answers."""
    answers = [EvaluationDocument(f"<cy> {n} =", f" {word}") for n, word in ((1, "un"), (2, "dau"), (3, "tri"))]
    return [
        EvaluationText("en", "old", "held-out", [EvaluationDocument(SENTENCES[i]) for i in (0, 2, 7)]),
        EvaluationText("cy", "new", "held-out", [EvaluationDocument(SENTENCES[i]) for i in (1, 3, 5)]),
        EvaluationText("cy", "new", "numbers", answers),
    ]


def run_config(**sections) -> RunConfig:
    """A run's configuration whose paths are never opened."""
    values = {
        "name": "test",
        "model": {"base": "base"},
        "data": {
            "languages": {"en": "old", "cy": "new"},
            "train": [{"path": "en.txt", "lang": "en"}, {"path": "cy.txt", "lang": "cy"}],
            "evaluation": [{"path": "en.test.txt", "lang": "en"}, {"path": "cy.test.txt", "lang": "cy"}],
            "sequence_length": 16,
        },
        "train": {"precision": "fp32", "steps": 20},
        "monitor": {"batch_size": 3},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return config_from_dict(values)
