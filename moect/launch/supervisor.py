"""One node's supervisor: starts this node's ranks with those of the others, and again without a node that is lost.

All supervisors see the same files (`nodes`) and turn by turn do what follows from them. The leader, which is the first
name among those alive, publishes who runs; all others obey. A new generation begins only when the ranks of the one
before cannot go on: those of its nodes that are alive have ended theirs, and a run goes on with all its ranks or not at
all.
"""

from __future__ import annotations

import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moect.launch.nodes import Folder, Generation, Node, choose
from moect.launch.ranks import Ranks

BEAT = 0.5  # seconds between two turns
FAILED = 60.0  # seconds that ranks here may take to end, or to say who is lost, after those of another node have failed
DONE, USER, LOST, STOPPED = 0, 2, 69, 75  # exit codes of a run, moect/errors.py
ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass
class Options:
    """What a supervisor is told on its command line."""

    name: str
    address: str
    slots: int
    nodes_dir: Path
    nodes: int = 1
    port: int = 29500
    max_restarts: int = 3
    settle: float = 10.0
    lost_after: float = 60.0


class Supervisor:
    """Runs until all nodes end.

    Args:
        options: of this node.
        batches: rows a step and rows a micro-batch, of each stage of the run.
        progress: what grows when the run has a new checkpoint.
        start: the launcher for a generation, given its number of this node, its hostfile, address and port.
    """

    def __init__(
        self,
        options: Options,
        batches: list[tuple[int, int]],
        progress: Callable[[], list],
        start: Callable[[int, Path, str, int], tuple[list[str], dict[str, str]]],
    ):
        self.options, self.batches, self.progress, self._command = options, batches, progress, start
        self.me = Node(options.name, options.address, options.slots, session=secrets.token_hex(8))
        self.folder = Folder(options.nodes_dir, self.me, options.lost_after)
        self.ranks: Ranks | None = None
        self.running = Generation(0)
        self._signals: list[int] = []
        self._said: set[str] = set()
        self._members: tuple[set, float] = (set(), 0.0)  # who is alive, and since when unchanged
        self._failed_at: float | None = None  # when ranks of another node were first seen to have failed

    def run(self) -> int:
        """Take part until the end and return the exit code of all."""
        wait = self.options.lost_after
        if not self.folder.enter(0):
            self._say(f"another supervisor of this name is there; waits {wait:g} seconds for it to end")
            if not self.folder.enter(wait):
                self._say(
                    f"another supervisor of this name runs: end it, or choose another --name ({self.folder.path})"
                )
                return USER
        self._before = self.folder.latest().number
        for number in ASKS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup would have it
                signal.signal(number, lambda number, _: self._signals.append(number))
        try:
            while True:
                try:
                    self.folder.tell()
                    if (code := self._turn()) is not None:
                        return code
                except OSError as error:  # a full disk, or one that is away for a while; the ranks may go on
                    self._say_once(f"{error.filename or self.folder.path}: {error.strerror or error}; tries again")
                time.sleep(BEAT)
        finally:
            if self.ranks:
                self.ranks.kill()

    def _turn(self) -> int | None:
        """Do what follows from the files now; the exit code, if that is to end."""
        nodes, latest = self.folder.nodes(), self.folder.latest()
        if latest.end is not None and latest.number > self._before:
            self._drop()
            self._say(f"ends with exit code {latest.end}: {latest.why}")
            return latest.end
        if self._signals and not self._takes_part(latest):
            self._say(f"{signal.Signals(self._signals[0]).name}: ends; no ranks run here")
            return STOPPED
        if self.ranks:
            self._watch(nodes, latest)
        elif self._signals:  # between two generations: a model built now would only use up the time to stop in
            self.me.stopping = signal.Signals(self._signals[0]).name
            self._say_once(f"{self.me.stopping}: starts no ranks any more; the others are to end as well")
        elif latest.has(self.me) and latest.number > self.me.generation:
            self._start(latest)
        elif latest.end is None and latest.number and not latest.has(self.me):
            self._say_once(f"waits; nodes {', '.join(latest.names)} run (generation {latest.number})")
        if next(iter(nodes)) == self.me.name:
            return self._lead(nodes, latest)
        return None

    def _takes_part(self, latest: Generation) -> bool:
        return self.ranks is not None or (latest.end is None and latest.has(self.me))

    def _start(self, latest: Generation) -> None:
        hosts = self.folder.path / f".hosts.{self.me.name}"
        hosts.write_text("".join(f"{node['name']} slots={node['slots']}\n" for node in latest.nodes), encoding="utf-8")
        rank = latest.names.index(self.me.name)
        self.running, self._failed_at = latest, None
        self.me.generation, self.me.code = latest.number, None
        self._say(f"generation {latest.number}: starts {self.me.slots} of the ranks on {', '.join(latest.names)}")
        command, env = self._command(rank, hosts, latest.nodes[0]["address"], latest.port)
        self.ranks = Ranks(command, env, self.folder.lock)

    def _watch(self, nodes: dict[str, Node], latest: Generation) -> None:
        """Look after this node's ranks."""
        code = self.ranks.poll()
        if code is not None:
            self.ranks, self.me.code = None, code
            self._say(f"generation {self.running.number}: ranks ended with exit code {code}")
            self.folder.tell()
        elif latest.number > self.running.number:
            self._say(f"generation {latest.number} begins without these ranks: ends them")
            self._drop()
        elif gone := [name for name in self.running.names if self._is_gone(name, nodes)]:
            self._say(f"node {', '.join(gone)} is gone: ends the ranks here, which cannot go on")
            self._drop()
        elif without := [name for name in self.running.names if name in nodes and self._is_out(nodes[name])]:
            self._say(f"node {', '.join(without)} was asked to stop and starts no ranks: ends the ranks here")
            self._drop()
        elif failed := self._failed_for_long(nodes):
            self._say(f"the ranks on node {', '.join(failed)} failed {FAILED:g} seconds ago: ends the ranks here")
            self._drop()
        elif self._signals:
            self._stop()
        elif any(node.regroup == self.running.number for node in nodes.values()):
            self.me.regroup = self.running.number
            self.ranks.ask(signal.SIGUSR1)

    def _is_gone(self, name: str, nodes: dict[str, Node]) -> bool:
        """Whether a node's supervisor has died, and with it its ranks. One that is only silent may still have them."""
        if name in nodes:
            return not self.running.has(nodes[name])
        if held := self.folder.is_held(name):
            self._say_once(f"node {name} is silent, but its processes live: the run goes on")
        return not held

    def _is_out(self, node: Node) -> bool:
        """Whether a node will never start its ranks of the generation that runs here."""
        return bool(node.stopping) and node.generation < self.running.number

    def _failed_for_long(self, nodes: dict[str, Node]) -> list[str]:
        """The nodes whose ranks have failed, once those here have had time to notice: else they stand in a collective
        until health.timeout_minutes are over. Ranks that are done or stopped did not leave the others behind."""
        failed = [
            node.name
            for node in nodes.values()
            if self.running.has(node)
            and node.generation == self.running.number
            and node.code not in (None, DONE, STOPPED)  # the others may still be writing the last checkpoint
        ]
        if not failed:
            return []
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        return failed if time.monotonic() - self._failed_at >= FAILED else []

    def _stop(self) -> None:
        """Pass a signal on to the ranks, as another one than came: a scheduler may have sent it to them as well, and
        the same twice ends them at once."""
        first = self._signals[0]
        if not self.me.stopping:
            self.me.stopping = signal.Signals(first).name
            self._say(f"{self.me.stopping}: asks the ranks to stop, with a checkpoint; once more, and they end at once")
        if len(self._signals) > 1:
            self._say("ends the ranks at once")
            self._drop()
        else:
            self.ranks.ask(signal.SIGTERM if first == signal.SIGUSR1 else signal.SIGUSR1)

    def _drop(self) -> None:
        if self.ranks:
            self.ranks.kill()
            self.ranks, self.me.code = None, LOST
            self.folder.tell()

    def _lead(self, nodes: dict[str, Node], latest: Generation) -> int | None:
        """What the leader decides."""
        settled = self._is_settled(nodes)
        told = [nodes[name] for name in latest.names if name in nodes and latest.has(nodes[name])]
        missing = [name for name in latest.names if name not in {node.name for node in told}]
        held = [name for name in missing if name not in nodes and self.folder.may_run(name, latest)]
        if latest.end is not None or (latest.number <= self._before and not told and not held):  # a life before ours
            finished = latest.end == DONE  # then nobody else may come back, and the ranks find nothing to do
            if len(nodes) < self.options.nodes and not finished:
                self._say_once(f"waits for {self.options.nodes} nodes; {len(nodes)} so far")
            elif settled:
                return self._publish(nodes, latest, failed=False)
            return None
        if any(node.may_run(latest.number) for node in told):
            if settled and not missing:
                self._regroup(nodes, latest)
            return None
        regrouping = any(node.regroup == latest.number for node in nodes.values())
        codes = {node.code for node in told}
        if USER in codes:
            return self._end(latest, USER, "something is to be put right; the message is above, on one of the nodes")
        if codes == {DONE} and not missing:
            return self._end(latest, DONE, "the run is finished")
        if stopping := [node for node in told if node.stopping]:
            return self._end(
                latest, STOPPED, f"{stopping[0].stopping} on node {stopping[0].name}; start again to go on"
            )
        if codes <= {DONE, STOPPED} and not missing and not regrouping:
            return self._end(latest, STOPPED, "the ranks were asked to stop; start again to go on")
        if held:  # all may end without it, but not start again
            self._say_once(
                f"node {', '.join(held)} is silent, but its processes live and may still write: waits. If that machine "
                f"is gone for good, remove {self.folder.path / held[0]}.lock"
            )
            return None
        if not settled:
            return None
        return self._publish(nodes, latest, failed=bool(missing) or not codes <= {DONE, STOPPED})

    def _regroup(self, nodes: dict[str, Node], latest: Generation) -> None:
        """Make room for nodes that have come back, once the ranks can make a checkpoint."""
        slots = sum(node.slots for node in choose(list(nodes.values()), self.batches))
        if slots > sum(node["slots"] for node in latest.nodes) and self.me.regroup != latest.number:
            self.me.regroup = latest.number
            new = ", ".join(name for name in nodes if name not in latest.names) or "all"
            self._say(f"node {new} can be taken in: the ranks make a checkpoint, and {slots} ranks go on from there")

    def _publish(self, nodes: dict[str, Node], latest: Generation, failed: bool) -> int | None:
        """The next generation, of the nodes that are alive; or the end, after too many."""
        progress = self.progress()
        restarts = latest.restarts + 1 if failed and progress == latest.progress else 0
        if restarts > self.options.max_restarts:
            return self._end(
                latest,
                1,
                f"{restarts} starts without a new checkpoint in between; look at the messages above (--max-restarts)",
            )
        chosen = choose(list(nodes.values()), self.batches)
        lost = [name for name in latest.names if name not in nodes]
        if not chosen and (lost or len(nodes) < self.options.nodes):
            self._say_once(
                f"waits for node {', '.join(lost) or 'that is not here yet'}: without it no ranks divide "
                "train.batch_size. To go on without it, end all and lower train.micro_batch"
            )
            return None
        if not chosen:
            rows, micro = self.batches[0]
            slots = [node.slots for node in nodes.values()]
            return self._end(
                latest,
                USER,
                f"train.batch_size {rows} is no multiple of train.micro_batch {micro} times the ranks of any of these "
                f"nodes ({slots} ranks); lower train.micro_batch",
            )
        if waiting := [name for name in nodes if name not in {node.name for node in chosen}]:
            self._say_once(f"node {', '.join(waiting)} waits: with it the ranks would not divide train.batch_size")
        number = latest.number + 1
        members = [{"name": n.name, "session": n.session, "address": n.address, "slots": n.slots} for n in chosen]
        port = self.options.port + number % 64  # the one before may still be taken
        self.folder.publish(Generation(number, members, port, restarts, progress))
        return None

    def _end(self, latest: Generation, code: int, why: str) -> int | None:
        """Let all end. Where nothing can be written any more, each ends by itself."""
        try:
            self.folder.publish(Generation(latest.number + 1, end=code, why=why))
        except OSError:
            self._say(f"ends with exit code {code}: {why}")
            return code
        return None

    def _is_settled(self, nodes: dict[str, Node]) -> bool:
        """Whether the same nodes have been alive for a while."""
        alive = {(node.name, node.session) for node in nodes.values()}
        if alive != self._members[0]:
            self._members = (alive, time.monotonic())
        return time.monotonic() - self._members[1] >= self.options.settle

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.me.name}: {text}", file=sys.stderr, flush=True)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)
