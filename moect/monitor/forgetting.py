"""The forgetting monitor: held-out text under the model and under its base, at every checkpoint.

It measures and judges; what follows from the verdict is for others to do. The base is measured once: a resumed run,
whose model is not the base any more, compares with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from moect.config import RunConfig, load_config
from moect.data.reading.evaluation import EvaluationText
from moect.data_config import KEPT
from moect.distributed import on_main, together
from moect.errors import ConfigError, DataError, TrainingError
from moect.model.append import modules_of
from moect.monitor.measuring.base_results import BaseResults, Measurement, read_base, write_base
from moect.monitor.measuring.calibration import Calibration, TouchMeter, find_threshold, with_threshold
from moect.monitor.measuring.exactness import Base, Comparison
from moect.monitor.measuring.intervals import text_intervals
from moect.monitor.measuring.measures import gain, retention
from moect.monitor.measuring.routing import Routing, RoutingMeter
from moect.monitor.measuring.samples import make_prompts, write_on
from moect.monitor.measuring.score import Sums, add_up
from moect.monitor.measuring.start_results import FILE as START
from moect.monitor.measuring.start_results import read_start, write_start
from moect.monitor.measuring.windows import TokenisedDocument, tokenise
from moect.monitor.rows import GATE, SAMPLES, TASKS, Row, add_rows, read_rows, replace_rows
from moect.monitor.tasks.tasks import TaskResult, Tasks, task_rows

log = logging.getLogger("moect.monitor")

NOTHING = TokenisedDocument(ids=[], first=0, last=0, n_bytes=0)  # has no windows


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
        cache_folder: where the base's results are kept for other runs too; None: with this one only.
        apart: this is no training: what it has measured stays as it is, and new results are added beside it.
        calibration: old text to find the language gate's threshold on, at each measurement; none: it is what it is.

    Attributes:
        documents, base_documents: the tokens of all texts, as model and base read them.
        compared: indices of those whose logits are held against the base's.

    Raises:
        ConfigError: two texts of one language and domain, a stride longer than the window, or an unknown task.
        DataError: a text of which no byte can be scored, or damaged measurements that a budget rests on.
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
        cache_folder: Path | None = None,
        apart: bool = False,
        calibration: Sequence[EvaluationText] = (),
    ):
        self.config, self.texts, self.folder = config, texts, Path(folder)
        self.tokenizer, self.base_tokenizer = tokenizer, base_tokenizer or tokenizer
        self.rank, self.world_size, self.apart = rank, world_size, apart
        self.divided = config.train.zero_stage == 3
        self.window = config.monitor.window or config.data.sequence_length
        self.stride = config.monitor.stride or max(1, self.window // 2)
        if self.stride > self.window:
            raise ConfigError(
                f"monitor.stride is {self.stride}, the window has {self.window} tokens: tokens between windows would "
                "never be scored; lower monitor.stride"
            )
        self.documents: list[TokenisedDocument] = []
        self.base_documents: list[TokenisedDocument] = []
        self.text_of_document: list[int] = []
        self.compared: set[int] = set()
        self.calibration = [d for text in calibration for d in tokenise(self.tokenizer, text.documents)]
        self._calibration_languages = [text.lang for text in calibration for _ in text.documents]
        for index, text in enumerate(texts):
            self._add_text(index, text, texts[:index])
        monitor = config.monitor
        self.prompts = make_prompts(texts, self.base_tokenizer, monitor.samples, monitor.sample_tokens, self.window)
        self.tasks = Tasks(config, tokenizer, base_tokenizer) if monitor.tasks else None
        if apart or monitor.max_forgetting:
            read_rows(self.folder)  # what is there will be judged, or added to: damage is found before hours are spent
        self.key = self._key(base_key)
        self.row_keys = [self._row_key(base_key, index) for index in range(len(texts))]
        self._base_files = (self.folder / "base.json",)
        if cache_folder:
            self._base_files += (Path(cache_folder) / "base-results" / f"{self.key}.json",)
        self.base: BaseResults | None = None
        self._start: dict[str, Measurement] | None = None
        self._told: set[str] = set()

    def has_base(self) -> bool:
        """Whether the base was measured, now or in an earlier run, under the same conditions."""
        if self.base is None:
            self.base = on_main(lambda: read_base(self.key, self._base_files, tell=not self.apart))
            if self.base:  # whichever file it was in
                self._keep_base()
        return self.base is not None

    def measure_base(self, model: nn.Module) -> None:
        """Measure the base, unless that was done before.

        Args:
            model: a causal LM that computes what the base computes.

        Raises:
            TrainingError: a result is not finite, a file cannot be written, or another rank failed.
        """
        if self.has_base():
            return
        sums = self._together(lambda: self._add_up(model, self.base_documents))
        if self.world_size > 1:
            sums.reduce()
        texts = self._measurements(sums, "the base")
        samples = self._together(lambda: self._write_on(model, self.base_tokenizer))
        tasks = self._answer(model, of_base=True)
        self.base = BaseResults(texts, tasks, samples)
        self._keep_base()

    def measure(self, model: nn.Module, step: int, base: Base | None = None) -> list[Row]:
        """Measure the model, add its rows to the files of the folder and return those of its texts, the same on every
        rank.

        Args:
            model: the causal LM as it is now.
            step: optimizer steps behind it.
            base: the base to hold its logits against; None: they are not compared.

        Raises:
            TrainingError: the base was not measured, a result is not finite, a file cannot be written, or another rank
                failed.
            RankLost: with ZeRO-3, this rank failed.
        """
        if not self.has_base():
            raise TrainingError(f"{self.folder}: there is nothing to compare with; measure the base first")
        calibration = self._calibrate(model) if self.calibration else None
        with with_threshold(model, calibration and calibration.threshold):
            return self._measure(model, step, base, calibration)

    def _measure(self, model: nn.Module, step: int, base: Base | None, calibration: Calibration | None) -> list[Row]:
        meter = RoutingMeter(model, self.text_of_document) if modules_of(model) else None
        device = next(model.parameters()).device
        comparison = Comparison(base, len(self.documents), self.compared, device) if base and self.compared else None
        sums = self._together(lambda: self._add_up(model, self.documents, meter, comparison))
        samples = self._together(lambda: self._write_on(model, self.tokenizer))
        if self.world_size > 1:
            for part in filter(None, (sums, meter, comparison)):
                part.reduce()
        tasks = self._answer(model)
        measured = self._measurements(sums, f"the model at step {step}")
        if step == 0 and not self.apart:
            self._keep_start(measured)
        routing = meter.result() if meter else [None] * len(self.texts)
        gated = meter and model.moe_config.language_gate
        at = {"gate_threshold": model.moe_config.gate_threshold} if gated else {}
        rows = [
            {"step": step} | self._row(index, now, routed, comparison) | at
            for index, (now, routed) in enumerate(zip(measured, routing, strict=True))
        ]
        on_main(partial(self._write, step, rows, tasks, samples, calibration))
        return rows

    def rows(self, step: int) -> list[Row] | None:
        """What was measured at this step before, in the order of the texts; None where some text was not."""
        rows = [row for row in on_main(lambda: read_rows(self.folder)) if row["step"] == step]
        found = {(row["lang"], row["domain"], row.get("key")): row for row in rows}
        names = [(text.lang, text.domain, key) for text, key in zip(self.texts, self.row_keys, strict=True)]
        return [found[name] for name in names] if set(names) <= found.keys() else None

    def _add_text(self, index: int, text: EvaluationText, before: list[EvaluationText]) -> None:
        if (text.lang, text.domain) in {(t.lang, t.domain) for t in before}:
            raise ConfigError(
                f"data.evaluation: two texts of language {text.lang!r} and domain {text.domain!r}; give one of "
                "them another `domain`"
            )
        documents = tokenise(self.tokenizer, text.documents)
        if sum(d.n_bytes for d in documents) == 0:
            raise DataError(
                f"data.evaluation, language {text.lang!r}, domain {text.domain!r}: no document has two tokens, "
                "there is nothing to predict; give longer text"
            )
        kept = self.config.model.base and text.role != "learnt"  # else there is no base to be kept
        count = self.config.monitor.compare if kept else 0
        first = len(self.documents)
        self.compared |= set(range(first, first + len(documents[:count])))
        self.documents += documents
        same = self.base_tokenizer is self.tokenizer
        self.base_documents += documents if same else tokenise(self.base_tokenizer, text.documents)
        self.text_of_document += [index] * len(documents)

    def _together(self, work):
        return together(work, self.divided)

    def _add_up(
        self,
        model: nn.Module,
        documents: list[TokenisedDocument],
        meter: RoutingMeter | None = None,
        comparison: Comparison | None = None,
        touch: TouchMeter | None = None,
    ) -> Sums:
        run = partial(
            add_up,
            model,
            window=self.window,
            stride=self.stride,
            batch_size=self.config.monitor.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            compared=() if touch else self.compared,
            touch=touch,
        )
        if comparison is None or self.base_tokenizer is self.tokenizer:
            return run(documents, meter=meter, comparison=comparison)
        # logits are compared on the tokens of the base; other tokens have others
        run([d if i in self.compared else NOTHING for i, d in enumerate(self.base_documents)], comparison=comparison)
        return run(documents, meter=meter)

    def _calibrate(self, model: nn.Module) -> Calibration:
        touch = TouchMeter(len(self.calibration), next(model.parameters()).device)
        self._together(lambda: self._add_up(model, self.calibration, touch=touch))
        if self.world_size > 1:
            touch.reduce()
        dtype = model.lm_head.weight.dtype
        highest = modules_of(model)[0].language_gate.highest
        return find_threshold(touch.greatest_G, self._calibration_languages, self.config.gate, dtype, highest)

    def _write_on(self, model: nn.Module, tokenizer) -> list[str]:
        monitor = self.config.monitor
        return write_on(model, tokenizer, self.prompts, monitor.sample_tokens, monitor.batch_size)

    def _answer(self, model: nn.Module, of_base: bool = False) -> list[TaskResult]:
        if self.tasks is None:
            return []
        batch_size = self.config.monitor.batch_size
        return self.tasks.measure(model, batch_size, self.rank, self.world_size, self.divided, base=of_base)

    def _measurements(self, sums: Sums, what: str) -> list[Measurement]:
        of_text = [[] for _ in self.texts]
        for index, result in zip(self.text_of_document, sums.scores(), strict=True):
            of_text[index].append(result)
        for text, scores in zip(self.texts, of_text, strict=True):
            nll = sum(s.nll for s in scores)
            if not math.isfinite(nll):
                raise TrainingError(
                    f"{what} gives {nll} nats on {text.lang!r}, {text.domain!r}: it does not compute finite "
                    "probabilities; go back to an earlier checkpoint and lower train.lr, or try train.precision: fp32"
                )
        return [Measurement.of(scores) for scores in of_text]

    def _row(self, index: int, now: Measurement, routed: Routing | None, comparison: Comparison | None) -> Row:
        text = self.texts[index]
        role, base = self._compared_with(index)
        bits, base_bits = now.bits_per_byte, base.bits_per_byte
        row = {"lang": text.lang, "role": role, "domain": text.domain, "key": self.row_keys[index]}
        row |= {"bits_per_byte": bits, "base_bits_per_byte": base_bits, "delta": bits - base_bits}
        row |= {"retention": retention(bits, base_bits)} if role in KEPT else {"gain": gain(bits, base_bits)}
        of_text = [i for i, of in enumerate(self.text_of_document) if of == index]
        predictions = sum(max(0, len(self.documents[i].ids) - 1) for i in of_text)
        row |= {"bytes": sum(now.n_bytes), "tokens": predictions, "documents": len(of_text)}
        resamples = self.config.monitor.resamples
        if resamples:
            columns = (np.array(values, dtype=np.float64) for m in (now, base) for values in (m.nll, m.n_bytes))
            for name, (low, high) in text_intervals(*columns, resamples).items():
                if name in row:
                    row |= {f"{name}_low": low, f"{name}_high": high}
        if now.exact_match is not None:
            row |= {"exact_match": now.exact_match, "base_exact_match": base.exact_match}
        if comparison and (exact := comparison.result(of_text, resamples)):
            row["exact"] = exact
        if routed:
            row["expert_load"] = [[round(share, 4) for share in load_E] for load_E in routed.expert_load]
            row |= {key: value for key, value in asdict(routed).items() if key != "expert_load" and value is not None}
        return row

    def _compared_with(self, index: int) -> tuple[str, Measurement]:
        """A text's role, and what its numbers are held against: the base's, or of a learnt language the first of this
        run, where there are any."""
        text, base = self.texts[index], self.base.texts[index]
        if text.role != "learnt":
            return text.role, base
        if self._start is None:
            self._start = on_main(partial(read_start, self.folder))
        if start := self._start.get(self.row_keys[index]):
            return "learnt", start
        name = f"{text.lang} {text.domain}"
        if self.rank == 0 and name not in self._told:
            self._told.add(name)
            log.warning(
                "%s: its beginning is not known (%s), so it is told as a new language, against the base; no limit of "
                "monitor.max_forgetting holds for it",
                name,
                self.folder / START,
            )
        return "new", base

    def _keep_start(self, measured: list[Measurement]) -> None:
        of_texts = zip(self.texts, self.row_keys, measured, strict=True)
        self._start = {key: now for text, key, now in of_texts if text.role == "learnt"}
        if self._start:
            on_main(partial(write_start, self.folder, self._start))

    def _write(
        self,
        step: int,
        rows: list[Row],
        tasks: list[TaskResult],
        samples: list[str],
        calibration: Calibration | None,
    ) -> None:
        """The rows of texts come last: where they are, the step is complete."""
        roles = self.config.data.languages
        if calibration:
            gate = self.config.gate
            promised = {"limit": gate.max_touched_old_documents, "confidence": gate.confidence}
            promised["by"] = "evaluate" if self.apart else "train"
            replace_rows(self.folder, [{"step": step} | promised | asdict(calibration)], GATE)
        if tasks:
            replace_rows(self.folder, task_rows(step, roles, self.base.tasks, tasks), TASKS)
        written = zip(self.prompts, self.base.samples, samples, strict=True)
        of_prompts = [
            {"step": step, "lang": p.lang, "role": p.role, "domain": p.domain, "document": p.document}
            | {"prompt": p.text, "reference": p.reference, "base": before, "model": now}
            for p, before, now in written
        ]
        if of_prompts:
            replace_rows(self.folder, of_prompts, SAMPLES)
        if self.apart:
            own = load_config(self.folder.parent / "config.yaml").data.evaluation
            add_rows(self.folder, rows, {(text.lang, text.domain) for text in own})
        else:
            replace_rows(self.folder, rows)

    def _keep_base(self) -> None:
        files = self._base_files[1:] if self.apart else self._base_files
        on_main(lambda: write_base(self.key, self.base, files))

    def _row_key(self, base_key: str, text: int) -> str:
        """Of all that the bits per byte of a text depend on, but for the model."""
        settings = [base_key, self.window, self.stride, self.config.train.precision, self.config.model.attention]
        whole = hashlib.sha256(json.dumps(settings).encode())
        for document, of in zip(self.documents, self.text_of_document, strict=True):
            if of == text:
                whole.update(json.dumps(list(asdict(document).values())).encode())
        return whole.hexdigest()[:16]

    def _key(self, base_key: str) -> str:
        """sha256 over all that the base's numbers depend on; tokens and bytes stand for text and tokenizer."""
        config, monitor = self.config, self.config.monitor
        names = [(text.lang, text.domain) for text in self.texts]
        settings = [self.window, self.stride, config.train.precision, config.model.attention, sorted(self.compared)]
        prompts = [monitor.sample_tokens, [p.text for p in self.prompts]]
        made_of = [base_key, names, self.text_of_document, settings, prompts, self.tasks and self.tasks.key]
        whole = hashlib.sha256(json.dumps(made_of).encode())
        for document in self.base_documents:
            whole.update(json.dumps(list(asdict(document).values())).encode())
        return whole.hexdigest()
