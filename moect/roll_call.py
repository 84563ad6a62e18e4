"""Who is lost, when ranks can no longer work together.

A collective that fails tells little of where the failure is: the rank at the other end of a connection may itself only
have given up on a third. So a thread of every rank keeps an eye on the store through which the ranks found one another.
A rank that fails calls the roll there; the threads answer, those of ranks that hang in a collective too; and one that
has not answered after `ANSWER` seconds is lost.
"""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

from moect.errors import RankLost

PAUSE = 1.0  # seconds between looks at the store
ANSWER = 10.0  # seconds that a rank has to answer
LEAVE = 60.0  # seconds that a rank which nothing reaches has to end after the roll was called


class RollCall(threading.Thread):
    """This rank's thread. `explain` is for the main thread, when it has failed.

    Args:
        store: a connection of this thread's own.
        rank: this one.
        hosts: the name of each rank's machine.
    """

    def __init__(self, store: dist.Store, rank: int, hosts: list[str]):
        super().__init__(name="roll call", daemon=True)
        self.rank, self.hosts = rank, hosts
        self._store = store
        self._wake, self._over, self._taken = threading.Event(), threading.Event(), threading.Event()
        self._called = False
        self._failure = ""
        self._lost: list[int] = []
        self._failures: dict[int, str] = {}  # of ranks that failed by themselves

    def explain(self, error: Exception, step: int | None) -> RankLost | None:
        """What became of the other ranks, if that is why this one has failed; None if it failed by itself.

        It waits for their answers.

        Args:
            error: what this rank's work raised.
            step: the last one that all took together.
        """
        ours = not of_communication(error)
        self._failure = _line(error) if ours else ""
        self._called = True
        self._wake.set()
        if not self._taken.wait(PAUSE + 2 * ANSWER):  # the store's connection is one that was cut
            self._lost = [0]
        self.end()
        others = {rank: text for rank, text in self._failures.items() if rank != self.rank}
        if ours and not self._lost:
            return None
        lost = RankLost(self._text(others, "" if ours and others else _line(error), step))
        survivors = sorted({*range(len(self.hosts))} - {*self._lost, *others})
        lost.told_by_main_rank = self.rank != min(survivors, default=self.rank)
        return lost

    def end(self) -> None:
        """The run needs this no longer."""
        self._over.set()
        self._wake.set()
        self.join(PAUSE)  # not for longer: it may be talking to a node that is gone

    def run(self) -> None:
        """Look, answer, judge."""
        try:
            while not self._is_called():
                if self._over.is_set():
                    return
            self._take()
        except dist.DistError:  # the store lives in rank 0
            self._lost = [0]
        self._taken.set()
        if not (self._lost or self._failures) or self._over.wait(LEAVE):
            return
        # the main thread waits where no word of this arrives, as in a kernel of NCCL
        print(f"moect: error on rank {self.rank}: {self._text(self._failures, '', None)}", file=sys.stderr, flush=True)
        os._exit(RankLost.exit_code)

    def _is_called(self) -> bool:
        self._wake.wait(PAUSE)
        if self._over.is_set() and not self._called:
            return False
        if self._called:
            if self._failure:
                self._store.set(f"failed/{self.rank}", self._failure)
            self._store.set("called", "")
        return self._store.check(["called"])

    def _take(self) -> None:
        """Answer, wait for the answers of all, and keep what they come to."""
        ranks = range(len(self.hosts))
        self._store.set(f"here/{self.rank}", "")
        self._wait_for([f"here/{rank}" for rank in ranks])
        self._lost = [rank for rank in ranks if not self._store.check([f"here/{rank}"])]
        for rank in ranks:
            if self._store.check([f"failed/{rank}"]):
                self._failures[rank] = self._store.get(f"failed/{rank}").decode()
        self._store.set(f"told/{self.rank}", "")
        if self.rank == 0:  # the store ends with this rank
            self._wait_for([f"told/{rank}" for rank in ranks if rank not in self._lost])

    def _wait_for(self, keys: list[str]) -> None:
        try:
            self._store.wait(keys, timedelta(seconds=ANSWER))
        except dist.DistStoreError:  # not all came
            pass

    def _text(self, failures: dict[int, str], reason: str, step: int | None) -> str:
        who = [f"no answer from {self._names(self._lost)}"] if self._lost else []
        who += [f"rank {rank} on {self.hosts[rank]} has failed: {text}" for rank, text in sorted(failures.items())]
        heard = "" if step is None else f" (last heard at step {step})"
        what = "; ".join(who) or "ranks have lost their connection to one another, though all of them answer"
        return f"{what}{heard}{f': {reason}' * bool(reason)}; start the run again with resume=auto"

    def _names(self, ranks: list[int]) -> str:
        names = []
        for host in dict.fromkeys(self.hosts[rank] for rank in ranks):
            there = [rank for rank in ranks if self.hosts[rank] == host]
            names.append(f"rank{'s' * (len(there) > 1)} {', '.join(map(str, there))} on {host}")
        return " and ".join(names)


def of_communication(error: Exception) -> bool:
    """Whether a failure is one to talk to others. Gloo's have no type of their own; they begin with its source file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _line(error: Exception) -> str:
    """The first line of a library's text, without the place in its source."""
    first = (str(error).splitlines() or [""])[0]
    first = first.partition("] ")[2] if first.startswith("[/") else first
    return first[:200] if of_communication(error) else f"{type(error).__name__}: {first[:200]}"
