"""The monitor in a training: measures at checkpoints, tells what it found, and never ends the run."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from moect import distributed
from moect.config import RunConfig
from moect.errors import MoectError, RankLost, TrainingError
from moect.model.build import base_view
from moect.monitor.forgetting import ForgettingMonitor
from moect.monitor.measuring.base import base_of
from moect.monitor.measuring.cost import USUAL_SHARE
from moect.monitor.reporting.run_files import read_entries
from moect.monitor.reporting.table import render_table, render_tasks
from moect.monitor.reporting.tensorboard import write_scalars
from moect.monitor.rows import TASKS, Row, drop_rows_after, read_rows
from moect.monitor.threshold import render_threshold
from moect.roll_call import of_communication
from moect.train.folder import RunLog

log = logging.getLogger("moect.monitor")


class Watch:
    """Calls the monitor for one run.

    Args:
        monitor: that it calls.
        config: the run's.
        run_log: told how long it took, and what failed.
        writer: TensorBoard's; None on other ranks than the main one.
    """

    def __init__(self, monitor: ForgettingMonitor, config: RunConfig, run_log: RunLog, writer):
        self.monitor, self.config, self.log, self.writer = monitor, config, run_log, writer

    def measure_base(self, model: nn.Module) -> None:
        """Measure the base, unless that was done before.

        Args:
            model: before the first step, when what it computes with its module switched off is the base.
        """
        with nullcontext() if self.config.method == "full" else base_view(model):
            self._guarded(0, lambda: self.monitor.measure_base(model))

    def measure(self, model: nn.Module, step: int, again: bool = True) -> list[Row] | None:
        """Measure a step and tell what was found.

        Args:
            model: as it is now.
            step: optimizer steps behind it.
            again: although it was measured before.

        Returns:
            The rows of its texts, the same on every rank; None where the monitor failed.
        """
        return self._guarded(step, lambda: self._measure(model, step, again))

    def tell_cost(self, run_folder: Path) -> None:
        """Say what share of its time the run has measured so far, as its report says it."""
        try:
            share = read_entries(run_folder / "log.jsonl").monitor_share
        except (MoectError, OSError) as error:
            log.warning("the monitor's share of the time is not known: %s", error)
            return
        remedy = ""
        if share is not None and share > USUAL_SHARE:
            remedy = "; less with a `limit` in data.evaluation, a lower monitor.compare or a higher train.save_every"
        if share is not None:
            print(f"the monitor took {share:.1%} of the time of the run{remedy}", flush=True)

    def _measure(self, model: nn.Module, step: int, again: bool) -> list[Row]:
        monitor = self.monitor
        if not again and (rows := monitor.rows(step)):
            return rows
        with base_of(model, self.config, wanted=bool(monitor.compared) or not monitor.has_base()) as base:
            if base and not monitor.has_base():  # that failed before the first step
                with base() as base_model:
                    monitor.measure_base(base_model)
            rows = monitor.measure(model, step, base)
        self._tell(rows, step)
        return rows

    def forget_after(self, step: int) -> None:
        """Drop measurements of later steps, to which a run that goes on from this one will come once more."""
        try:
            distributed.on_main(lambda: drop_rows_after(self.monitor.folder, step))
        except MoectError as error:  # a damaged file; the next measurement will say it too
            if distributed.is_main():
                log.warning("measurements after step %d are not dropped: %s", step, error)

    def _tell(self, rows: list[Row], step: int) -> None:
        """Table and scalars; what goes wrong here concerns the main rank alone, and the measurement holds."""
        if not distributed.is_main():
            return
        try:
            print(f"\n{render_table(rows)}\n", flush=True)
            if found := render_threshold(self.monitor.folder.parent, rows[0]):
                print(f"{found}\n", flush=True)
            if tasks := [row for row in read_rows(self.monitor.folder, TASKS) if row["step"] == step]:
                print(f"{render_tasks(tasks)}\n", flush=True)
            write_scalars(self.writer, rows, step)
        except Exception as error:
            log.warning("step %d was measured, but could not be shown: %s: %s", step, type(error).__name__, error)

    def _guarded(self, step: int, work: Callable[[], Any]) -> Any:
        """What the work gives, or None, said and logged, where it fails. It fails on all ranks or on none."""
        start = time.perf_counter()
        try:
            return work()
        except RankLost:  # the others wait for this rank: only its end lets them go
            raise
        except Exception as error:
            if of_communication(error):  # a rank is lost, and with it the run
                raise
            if distributed.is_main():
                what = str(error) if isinstance(error, MoectError) else f"{type(error).__name__}: {error}"
                log.warning("the monitor failed at step %d, and the run goes on: %s", step, what)
            self._log(event="monitor failed", step=step, error=repr(error), traceback=traceback.format_exc())
            return None
        finally:
            self._log(event="monitor", step=step, seconds=round(time.perf_counter() - start, 3))

    def _log(self, **values) -> None:
        try:
            self.log.write(**values)
        except TrainingError as error:  # a full disk, say, which may be what the line is about
            log.warning("a line of the monitor is not logged: %s", error)
