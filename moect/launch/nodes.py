"""What the supervisors of a run's nodes tell one another, by files in one folder that all of them see.

NAME.json           of each node, written by its supervisor alone: a number that grows, where it is, how its ranks do
NAME.lock           held by that supervisor and by what guards its ranks: when it is free, both are gone, and the ranks
generation-N.json   which nodes run and where they meet, or how all ends; written once, by the leader; the last counts
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moect.errors import ConfigError
from moect.locks import is_locked


@dataclass
class Node:
    """One node, as its supervisor tells of it."""

    name: str
    address: str
    slots: int
    session: str  # of this supervisor's life
    beat: int = 0
    generation: int = 0  # that its ranks belong, or belonged, to
    code: int | None = None  # how its ranks ended; None: they have not
    stopping: str = ""  # the signal that asked it to stop
    regroup: int = 0  # the generation that is to make room for one with other nodes

    def may_run(self, generation: int) -> bool:
        """Whether its ranks of a generation run, or are still to be started."""
        return self.code is None if self.generation == generation else not self.stopping


@dataclass
class Generation:
    """The nodes that run together, in the order of their ranks; or the end of all."""

    number: int
    nodes: list[dict] = field(default_factory=list)
    port: int = 0
    restarts: int = 0  # starts since the last new checkpoint
    progress: list = field(default_factory=list)  # the last checkpoints, when it was made
    end: int | None = None  # the exit code of all
    why: str = ""

    def has(self, node: Node) -> bool:
        """Whether a node, in this life of its supervisor, takes part."""
        return any(member["session"] == node.session for member in self.nodes)

    @property
    def names(self) -> list[str]:
        return [member["name"] for member in self.nodes]


class Folder:
    """The folder, as one supervisor sees it.

    Args:
        path: made if need be.
        me: this node.
        lost_after: seconds without a new beat, by this machine's clock, after which a node counts as lost.

    Attributes:
        lock: the file descriptor of this node's lock, for a process that is to hold it too.
    """

    def __init__(self, path: Path, me: Node, lost_after: float):
        self.path, self.me, self.lost_after = path, me, lost_after
        self._heard: dict[str, tuple[tuple, float]] = {}  # what a node said last, and when that was first seen here
        try:
            path.mkdir(parents=True, exist_ok=True)
            # open as long as this process, and what inherits it
            self.lock = os.open(path / f"{me.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or path}: {error.strerror}; give a folder that all nodes can write as --nodes-dir"
            ) from error

    def enter(self, seconds: float) -> bool:
        """Take this node's name; false if another holds it, and still does after some seconds."""
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.2)
            except OSError as error:
                raise ConfigError(
                    f"{self.path}: files cannot be locked here: {error.strerror}; give another folder as --nodes-dir"
                ) from error

    def tell(self) -> None:
        """Write this node's file."""
        self.me.beat += 1
        path = self.path / f"{self.me.name}.json"
        draft = path.with_name(f".{path.name}.{self.me.session}")
        draft.write_text(json.dumps(asdict(self.me)), encoding="utf-8")
        os.replace(draft, path)

    def nodes(self) -> dict[str, Node]:
        """All nodes that are alive, this one among them, by name."""
        alive = {self.me.name: self.me}
        for path in sorted(self.path.glob("*.json")):
            name = path.name.removesuffix(".json")
            if name.startswith("generation-") or name == self.me.name:
                continue
            try:
                node = Node(**json.loads(path.read_text(encoding="utf-8")))
            except (FileNotFoundError, ValueError):  # it is being replaced, on a file system that shows that
                continue
            said = (node.session, node.beat)
            if self._heard.get(name, (None, 0))[0] != said:
                self._heard[name] = (said, time.monotonic())
            fresh = time.monotonic() - self._heard[name][1] < self.lost_after
            if fresh and self.is_held(name):
                alive[name] = node
        return dict(sorted(alive.items()))

    def is_held(self, name: str) -> bool:
        """Whether a node's supervisor, or what guards its ranks, lives."""
        return is_locked(self.path / f"{name}.lock")

    def may_run(self, name: str, generation: Generation) -> bool:
        """Whether a node that is silent may still have ranks of a generation: it lives, and has not told their end."""
        if not self.is_held(name):
            return False
        try:
            node = Node(**json.loads((self.path / f"{name}.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):  # it is being replaced
            return True
        return not generation.has(node) or node.may_run(generation.number)

    def latest(self) -> Generation:
        """The generation that counts; number 0 if there has been none."""
        numbers = [int(path.stem.removeprefix("generation-")) for path in self.path.glob("generation-*.json")]
        if not numbers:
            return Generation(0)
        text = (self.path / f"generation-{max(numbers)}.json").read_text(encoding="utf-8")
        return Generation(**json.loads(text))

    def publish(self, generation: Generation) -> bool:
        """Make a generation known; false if somebody else was first with that number."""
        path = self.path / f"generation-{generation.number}.json"
        draft = path.with_name(f".{path.name}.{self.me.session}")
        draft.write_text(json.dumps(asdict(generation)), encoding="utf-8")
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        for old in self.path.glob("generation-*.json"):
            if int(old.stem.removeprefix("generation-")) < generation.number - 10:
                old.unlink(missing_ok=True)
        return True


def choose(nodes: list[Node], batches: list[tuple[int, int]]) -> list[Node]:
    """The nodes whose ranks divide the work: as many ranks as possible, and of the same number the first nodes.

    Args:
        nodes: in the order of their ranks, which is kept.
        batches: rows a step and rows a micro-batch, of each stage.
    """
    best: list[Node] = []
    for some in _subsets(nodes):
        ranks = _ranks(some)
        if ranks > _ranks(best) and all(rows % (micro * ranks) == 0 for rows, micro in batches):
            best = some
    return best


def _subsets(nodes: list[Node]) -> Iterator[list[Node]]:
    """What may run, the largest first: every choice of a few nodes; of many, those that begin or end the list."""
    for count in range(len(nodes), 0, -1):
        if len(nodes) <= 12:  # 4095 choices
            yield from map(list, itertools.combinations(nodes, count))
        else:
            yield from (nodes[:count], nodes[-count:])


def _ranks(nodes: list[Node]) -> int:
    return sum(node.slots for node in nodes)
