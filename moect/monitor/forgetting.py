"""The forgetting monitor: each held-out text under the model and under its base, at every checkpoint.

The base is measured once and kept in base.json, under a key of all that its numbers depend on; so a resumed run, whose
model is not the base any more, compares with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from moect.config import RunConfig
from moect.data.reading.evaluation import EvaluationText
from moect.distributed import on_main
from moect.errors import ConfigError, DataError, TrainingError
from moect.model.append import modules_of
from moect.monitor.measuring.measures import bits_per_byte, gain, retention
from moect.monitor.measuring.routing import RoutingMeter
from moect.monitor.measuring.score import Score, score
from moect.monitor.measuring.windows import TokenisedDocument, tokenise
from moect.monitor.reporting.table import render_table
from moect.monitor.rows import Row, read_rows, replace_rows, write_atomically

log = logging.getLogger("moect.monitor")


@dataclass
class Measurement:
    """A text under one model.

    Attributes:
        nll: nats over the whole text.
        n_bytes: UTF-8 bytes of the text that was scored.
        documents: their number.
        exact_match: share of documents whose answer greedy decoding gives; None for a text without answers.
    """

    nll: float
    n_bytes: int
    documents: int
    exact_match: float | None

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits per UTF-8 byte."""
        return bits_per_byte(self.nll, self.n_bytes)


class ForgettingMonitor:
    """Measures held-out texts and keeps the results. Every rank makes one and calls it in step; rank 0 writes.

    Args:
        config: the run's.
        texts: from `load_evaluation`.
        tokenizer: the run's.
        folder: RUN/monitor; made when something is written.
        rank, world_size: of this process.
        base_key: fingerprint of the base.
        base_tokenizer: the base's, where tokens were added to it for the run; None: it has the same.

    Raises:
        ConfigError: two texts of one language and domain, or a stride longer than the window.
        DataError: a text of which no byte can be scored.
    """

    def __init__(
        self,
        config: RunConfig,
        texts: list[EvaluationText],
        tokenizer,
        folder: Path,
        rank: int,
        world_size: int,
        base_key: str,
        base_tokenizer=None,
    ):
        self.texts, self.folder = texts, Path(folder)
        self.rank, self.world_size = rank, world_size
        self.window = config.monitor.window or config.data.sequence_length
        self.stride = config.monitor.stride or max(1, self.window // 2)
        self.batch_size = config.monitor.batch_size
        if self.stride > self.window:
            raise ConfigError(
                f"monitor.stride is {self.stride}, the window has {self.window} tokens: tokens between windows would "
                "never be scored; lower monitor.stride"
            )
        self.documents, self.text_of_document = [], []
        self.base_documents = []  # the same texts, as the base reads them
        for index, text in enumerate(texts):
            if (text.lang, text.domain) in {(t.lang, t.domain) for t in texts[:index]}:
                raise ConfigError(
                    f"data.evaluation: two texts of language {text.lang!r} and domain {text.domain!r}; give one of "
                    "them another `domain`"
                )
            documents = tokenise(tokenizer, text.documents)
            if sum(d.n_bytes for d in documents) == 0:
                raise DataError(
                    f"data.evaluation, language {text.lang!r}, domain {text.domain!r}: no document has two tokens, "
                    "there is nothing to predict; give longer text"
                )
            self.documents += documents
            self.base_documents += tokenise(base_tokenizer, text.documents) if base_tokenizer else documents
            self.text_of_document += [index] * len(documents)
        self.key = self._key(config, base_key)
        self.base: list[Measurement] | None = None

    def has_base(self) -> bool:
        """Whether the base was measured, now or in an earlier run of this folder, under the same conditions."""
        if self.base is None:
            self.base = on_main(self._read_base)
        return self.base is not None

    def measure_base(self, model: nn.Module) -> None:
        """Measure the base, unless that was done before.

        Args:
            model: a causal LM that computes what the base computes.
        """
        if self.has_base():
            return
        self.base = self._measure(model, "the base", self.base_documents)
        values = {"key": self.key, "texts": [asdict(m) for m in self.base]}
        on_main(lambda: write_atomically(self.folder / "base.json", json.dumps(values, indent=1) + "\n"))

    def measure(self, model: nn.Module, step: int) -> list[Row]:
        """Measure the model, add its rows to forgetting.jsonl and return them, the same on every rank.

        Args:
            model: the causal LM as it is now.
            step: optimizer steps behind it.

        Raises:
            TrainingError: the base was not measured, a result is not finite, or the file cannot be written.
        """
        if not self.has_base():
            raise TrainingError(f"{self.folder}: there is nothing to compare with; measure the base first")
        meter = RoutingMeter(model, self.text_of_document) if modules_of(model) else None
        measurements = self._measure(model, f"the model at step {step}", self.documents, meter)
        routing = meter.result(self.world_size) if meter else [None] * len(self.texts)
        rows = []
        for text, base, now, routed in zip(self.texts, self.base, measurements, routing, strict=True):
            row = {"step": step, "lang": text.lang, "role": text.role, "domain": text.domain}
            bits, base_bits = now.bits_per_byte, base.bits_per_byte
            row |= {"bits_per_byte": bits, "base_bits_per_byte": base_bits, "delta": bits - base_bits}
            row |= {"retention": retention(bits, base_bits)} if text.role == "old" else {"gain": gain(bits, base_bits)}
            row |= {"bytes": now.n_bytes, "documents": now.documents}
            if now.exact_match is not None:
                row |= {"exact_match": now.exact_match, "base_exact_match": base.exact_match}
            if routed:
                row["expert_load"] = [[round(share, 4) for share in load_E] for load_E in routed.expert_load]
                row |= {k: v for k in ("gate", "open_share") if (v := getattr(routed, k)) is not None}
            rows.append(row)
        on_main(lambda: replace_rows(self.folder, rows))
        return rows

    def has_rows(self, step: int) -> bool:
        """Whether every text was measured at this step already."""
        wanted = {(step, text.lang, text.domain) for text in self.texts}
        return on_main(lambda: wanted <= {(r["step"], r["lang"], r["domain"]) for r in read_rows(self.folder)})

    def table(self, rows: list[Row]) -> str:
        """The rows of one step as an aligned table."""
        return render_table(rows)

    def tensorboard(self, writer, rows: list[Row], step: int) -> None:
        """Write rows as scalars monitor/LANG/DOMAIN/… and routing/LANG/DOMAIN/…"""
        for row in rows:
            name = f"{row['lang']}/{row['domain']}"
            for key in ("bits_per_byte", "delta", "retention", "gain", "exact_match"):
                if row.get(key) is not None:
                    writer.add_scalar(f"monitor/{name}/{key}", row[key], step)
            for key in ("gate", "open_share"):
                if key in row:
                    writer.add_scalar(f"routing/{name}/{key}", row[key], step)
            if "expert_load" in row:
                load_LE = row["expert_load"]
                greatest = max(map(max, load_LE)) * len(load_LE[0])  # 1: every expert got the same
                writer.add_scalar(f"routing/{name}/greatest_load", greatest, step)

    def _measure(
        self, model: nn.Module, what: str, documents: list[TokenisedDocument], meter: RoutingMeter | None = None
    ) -> list[Measurement]:
        scores = score(model, documents, self.window, self.stride, self.batch_size, self.rank, self.world_size, meter)
        of_text: list[list[Score]] = [[] for _ in self.texts]
        for index, result in zip(self.text_of_document, scores, strict=True):
            of_text[index].append(result)
        measurements = []
        for text, results in zip(self.texts, of_text, strict=True):
            nll = math.fsum(s.nll for s in results)
            if not math.isfinite(nll):
                raise TrainingError(
                    f"{what} gives {nll} nats on {text.lang!r}, {text.domain!r}: it does not compute finite "
                    "probabilities; go back to an earlier checkpoint and lower train.lr, or try train.precision: fp32"
                )
            answered = [s.exact for s in results if s.exact is not None]
            exact_match = sum(answered) / len(answered) if answered else None
            measurements.append(Measurement(nll, sum(s.n_bytes for s in results), len(results), exact_match))
        return measurements

    def _key(self, config: RunConfig, base_key: str) -> str:
        """sha256 over all that the base's numbers depend on; tokens and bytes stand for text and tokenizer."""
        names = [(text.lang, text.domain) for text in self.texts]
        settings = [self.window, self.stride, config.train.precision, config.model.attention]
        whole = hashlib.sha256(json.dumps([base_key, names, self.text_of_document, settings]).encode())
        for document in self.base_documents:
            whole.update(json.dumps(list(asdict(document).values())).encode())
        return whole.hexdigest()

    def _read_base(self) -> list[Measurement] | None:
        path = self.folder / "base.json"
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["key"] == self.key:
                return [Measurement(**m) for m in values["texts"]]
            why = "of another base, tokenizer, text or setting"
        except (OSError, ValueError, TypeError, KeyError):
            why = "damaged"
        log.warning("%s: is %s; the base is measured again", path, why)
        return None
