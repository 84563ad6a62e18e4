"""Supervisors of several nodes, with a stand-in for DeepSpeed's launcher: who runs when, and how all ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import REPOSITORY

from moect.errors import ConfigError
from moect.launch import __main__ as command_line
from moect.launch import supervisor
from moect.launch.nodes import Folder, Generation, Node, choose
from moect.launch.supervisor import Options, Supervisor

# a launcher with one rank, which ends when it is told or asked to
LAUNCHER = """#!/usr/bin/env bash
"$PYTHON" -S "$STUB/rank.py" "$NODE" "$2" &
echo $! >"$STUB/rank-$NODE"
wait $!
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
stub, node, hosts = Path(os.environ["STUB"]), sys.argv[1], Path(sys.argv[2])
def asked(number, frame):
    print(node, signal.Signals(number).name, file=(stub / "signals").open("a"), flush=True)
    (stub / "checkpoints" / f"step-{time.time_ns()}").mkdir(parents=True)
    os._exit(75)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, asked)
names = [line.split()[0] for line in hosts.read_text().splitlines()]
print(node, *names, file=(stub / "starts").open("a"), flush=True)
while True:
    time.sleep(0.02)
    for name in names:  # a rank that ends, for whatever reason, ends the others
        if (told := stub / f"{'-'.join(names)}.{name}").is_file():
            os._exit(int(told.read_text()) if name == node else 69)
        if (stub / "all").is_file():
            os._exit(int((stub / "all").read_text()))
"""


class Cluster:
    """Supervisors on this machine, and what they did."""

    def __init__(self, place, tmp_path: Path):
        self.stub, self.nodes = tmp_path / "stub", {}
        self.stub.mkdir()
        (self.stub / "deepspeed").write_text(LAUNCHER)
        (self.stub / "deepspeed").chmod(0o755)
        (self.stub / "rank.py").write_text(RANK)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(self.stub / "checkpoints")
        (self.stub / "checkpoints").mkdir()
        self.config = place.write(place.config(train={"batch_size": 6, "micro_batch": 1}))
        self.folder = tmp_path / ".nodes" / "run"

    def start(self, name: str, *options: str) -> None:
        env = os.environ | {"STUB": str(self.stub), "NODE": name, "PYTHON": sys.executable}
        env |= {"PATH": f"{self.stub}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "moect.launch", "--config", self.config, "--name", name, "--slots", "1"]
        command += ["--address", "127.0.0.1", "--settle", "0.5", *options]
        with (self.stub / f"says-{name}").open("a") as output:
            self.nodes[name] = subprocess.Popen(command, env=env, stderr=output)

    def says(self, name: str) -> str:
        return (self.stub / f"says-{name}").read_text()

    def lines(self, what: str) -> list[str]:
        path = self.stub / what
        return sorted(path.read_text().splitlines()) if path.is_file() else []

    def until(self, condition) -> None:
        for _ in range(2000):  # a bound, no measure
            if condition():
                return
            time.sleep(0.03)
        raise AssertionError({name: self.says(name) for name in self.nodes})

    def until_started(self, *starts: str) -> None:
        self.until(lambda: {*starts} <= {*self.lines("starts")})

    def codes(self) -> list[int]:
        return [process.wait(60) for process in self.nodes.values()]

    def kill(self, name: str) -> None:
        """The supervisor only, as a lack of memory might."""
        self.nodes[name].kill()
        self.nodes.pop(name).wait()


@pytest.fixture
def cluster(place, tmp_path):
    cluster = Cluster(place, tmp_path)
    yield cluster
    for process in cluster.nodes.values():
        process.kill()
        process.wait()


def test_a_lost_node_is_left_out_and_taken_in_again_when_it_comes_back(cluster):
    for name in "ab":
        cluster.start(name, "--nodes", "2")
    cluster.until_started("a a b", "b a b")
    rank = int((cluster.stub / "rank-b").read_text())
    cluster.kill("b")  # and with the supervisor its ranks
    cluster.until(lambda: not _lives(rank))
    cluster.until_started("a a")
    assert "node b is gone" in cluster.says("a")
    (cluster.stub / "starts").unlink()
    cluster.start("b")
    cluster.until_started("a a b", "b a b")
    assert cluster.lines("signals") == ["a SIGUSR1"]  # once: a second would have ended it without a checkpoint
    assert "node b can be taken in" in cluster.says("a")
    (cluster.stub / "all").write_text("0")
    assert cluster.codes() == [0, 0]
    assert all("ends with exit code 0: the run is finished" in cluster.says(name) for name in "ab")


def test_a_signal_to_one_supervisor_ends_all_with_a_checkpoint_and_an_error_of_the_user_without_another_start(cluster):
    for name in "ab":
        cluster.start(name, "--nodes", "2")
    cluster.until_started("a a b", "b a b")
    cluster.nodes["a"].send_signal(signal.SIGTERM)
    cluster.until(lambda: cluster.lines("signals"))
    (cluster.stub / "a-b.b").write_text("75")  # as the word reaches the other rank
    assert cluster.codes() == [75, 75] and cluster.lines("signals") == ["a SIGUSR1"]
    (cluster.stub / "a-b.b").write_text("2")
    for name in "ab":  # the same again is a new life
        cluster.start(name, "--nodes", "2")
    assert cluster.codes() == [2, 2]


def test_a_run_that_never_gets_to_a_checkpoint_is_given_up(cluster):
    (cluster.stub / "all").write_text("69")
    cluster.start("a", "--max-restarts", "1")
    assert cluster.codes() == [1]
    assert "2 starts without a new checkpoint in between" in cluster.says("a")


def test_a_silent_supervisor_whose_ranks_live_keeps_others_from_starting_on_the_same_folder(cluster):
    cluster.start("b")
    cluster.until_started("b b")
    cluster.nodes["b"].send_signal(signal.SIGSTOP)
    cluster.start("a", "--lost-after", "1")
    cluster.until(lambda: "its processes live and may still write: waits" in cluster.says("a"))
    assert cluster.lines("starts") == ["b b"]
    cluster.nodes["b"].send_signal(signal.SIGCONT)
    cluster.until_started("a a b", "b a b")  # it was taken in as any other
    (cluster.stub / "all").write_text("0")
    assert cluster.codes() == [0, 0]


def test_only_one_of_two_leaders_makes_a_generation_and_a_name_is_held_by_one(tmp_path):
    nodes = [Node(name, "127.0.0.1", 1, session=name) for name in "ab"]
    first, second = (Folder(tmp_path, node, 60) for node in nodes)
    assert [folder.publish(Generation(1, why=folder.me.name)) for folder in (first, second)] == [True, False]
    assert first.latest() == second.latest() == Generation(1, why="a")
    same = Folder(tmp_path, nodes[0], 60)
    assert first.enter(0) and not same.enter(0)
    first.tell()
    assert second.enter(0) and list(second.nodes()) == ["a", "b"]
    for folder in (first, same):
        os.close(folder.lock)
    assert list(second.nodes()) == ["b"] and json.loads((tmp_path / "a.json").read_text())["beat"] == 1
    os.close(second.lock)


@pytest.mark.parametrize(
    ("slots", "batches", "ranks"),
    [
        ([1, 1], [(8, 2)], 2),
        ([1, 1, 1], [(8, 2)], 2),
        ([8, 8], [(192, 2), (96, 6)], 16),
        ([3], [(8, 2)], 0),
        ([3, 8], [(8, 1)], 8),
        ([1, 3, 1, 8, 2], [(10, 1)], 10),
        ([8, 1, 1], [(8, 1)], 8),
        ([7, *[1] * 12], [(12, 1)], 12),
    ],
)
def test_as_many_nodes_run_as_divide_the_batch_of_every_stage(slots, batches, ranks):
    nodes = [Node(str(number), "", count, "") for number, count in enumerate(slots)]
    assert sum(node.slots for node in choose(nodes, batches)) == ranks


class Turns:
    """A supervisor in this process, turned by hand, and others of which there is only what they tell."""

    def __init__(self, path: Path, **options):
        told = Options("b", "127.0.0.1", 1, path, **{"settle": 0.0, "lost_after": 60.0} | options)
        self.codes: list[int | None] = []
        self.one = Supervisor(told, [(6, 1)], lambda: [], lambda *_: (["sleep", "600"], dict(os.environ)))
        assert self.one.folder.enter(0)
        self.one._before = 0
        self.path, self.others = path, {}

    def other(self, name: str, slots: int = 1, **told) -> Node:
        node = Node(name, "127.0.0.1", slots, session=f"{name}-1", **told)
        self.others[name] = Folder(self.path, node, 60)
        assert self.others[name].enter(0)
        self.others[name].tell()
        return node

    def publish(self, number: int, *nodes: Node) -> None:
        members = [{"name": n.name, "session": n.session, "address": n.address, "slots": n.slots} for n in nodes]
        assert self.one.folder.publish(Generation(number, members))

    def turn(self, times: int = 3) -> Generation:
        for _ in range(times):
            for folder in self.others.values():
                folder.tell()
            self.one.folder.tell()
            self.codes.append(self.one._turn())
        return self.one.folder.latest()

    def close(self) -> None:
        if self.one.ranks:
            self.one.ranks.kill()
        for folder in (self.one.folder, *self.others.values()):
            os.close(folder.lock)


@pytest.fixture
def turns(tmp_path):
    made = []
    yield lambda **options: made.append(Turns(tmp_path, **options)) or made[-1]
    for each in made:
        each.close()


def test_a_node_that_returns_after_the_end_does_not_wait_for_those_that_have_gone(turns):
    here = turns(nodes=2)
    here.one.folder.publish(Generation(1, end=0))
    here.one._before = 1
    assert here.turn(1).names == ["b"]


def test_a_node_that_returns_to_an_unfinished_run_waits_for_the_others(turns, capfd):
    here = turns(nodes=2)
    here.one.folder.publish(Generation(1, end=75))
    here.one._before = 1
    assert here.turn().number == 1 and "waits for 2 nodes; 1 so far" in capfd.readouterr().err


def test_no_second_run_starts_while_a_silent_node_may_have_ranks_of_the_first(turns, capfd):
    here = turns()
    silent = here.other("a", generation=1)
    here.one.folder.lost_after = 0.0  # whoever else is here is silent
    here.one.me.generation, here.one.me.code = 1, 69
    here.publish(1, silent, here.one.me)
    assert here.turn().number == 1 and "may still write: waits" in capfd.readouterr().err
    silent.code = 69  # the last that it told: its ranks have ended
    assert here.turn(1).names == ["b"]


def test_the_lock_of_a_machine_that_is_gone_can_be_removed(turns):
    here = turns()
    silent = here.other("a", generation=1)
    here.one.folder.lost_after = 0.0
    here.one.me.generation, here.one.me.code = 1, 69
    here.publish(1, silent, here.one.me)
    assert here.turn().number == 1
    (here.path / "a.lock").unlink()
    assert here.turn(1).names == ["b"]


@pytest.mark.parametrize(("code", "ends"), [(69, True), (1, True), (0, False), (75, False), (None, False)])
def test_ranks_do_not_wait_for_those_of_another_node_that_have_failed(turns, monkeypatch, capfd, code, ends):
    here = turns()
    other = here.other("a", generation=1)
    here.publish(1, other, here.one.me)
    here.turn()
    assert here.one.ranks
    other.code = code
    here.turn()
    assert here.one.ranks  # they have a while to notice, and to say what they know
    monkeypatch.setattr(supervisor, "FAILED", 0.0)
    here.turn()
    assert (here.one.me.code == 69) is ends and (here.one.ranks is None) is ends
    assert ("the ranks on node a failed 0 seconds ago: ends the ranks here" in capfd.readouterr().err) is ends


def test_a_signal_between_two_generations_ends_all_without_another_start(turns):
    here = turns()
    other = here.other("c", generation=1, code=69)
    here.one.me.generation, here.one.me.code = 1, 69
    here.publish(1, here.one.me, other)
    here.publish(2, here.one.me, other)
    here.one._signals.append(signal.SIGTERM)
    latest = here.turn()
    assert latest.number == 2 and here.one.ranks is None  # the other one's are still to start
    other.generation, other.code = 2, None
    assert here.turn().number == 2
    other.code = 69
    assert here.turn(1).end == 75
    assert here.turn(1) and here.codes[-1] == 75


def test_ranks_do_not_wait_for_a_node_that_was_asked_to_stop_before_it_started_its_own(turns, capfd):
    here = turns()
    other = here.other("c", generation=1, code=69)
    here.publish(2, here.one.me, other)
    here.turn()
    assert here.one.ranks
    other.stopping = "SIGTERM"
    here.turn()
    assert here.one.ranks is None and "node c was asked to stop and starts no ranks" in capfd.readouterr().err
    assert here.turn().end == 75


def test_nodes_whose_ranks_do_not_divide_wait_for_the_one_that_is_lost(turns, capfd):
    here = turns()
    here.one.me.slots = 4  # of 6 rows
    here.one.me.generation, here.one.me.code = 1, 69
    here.publish(1, Node("a", "127.0.0.1", 2, session="a-0"), here.one.me)
    latest = here.turn()
    assert latest.number == 1 and capfd.readouterr().err.count("waits for node a: without it no ranks divide") == 1
    here.other("a", 2)
    assert here.turn().names == ["a", "b"]


def test_a_folder_that_cannot_be_used_and_gpus_that_cannot_be_counted_are_told_in_one_line(place, monkeypatch, capfd):
    config = str(place.write(place.config()))
    (place.output / "file").write_text("")
    told = ["--config", config, "--address", "127.0.0.1", "--nodes-dir", str(place.output / "file")]
    assert command_line.main([*told, "--slots", "1"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("supervise: error: ") and error.count("\n") == 1 and "--nodes-dir" in error
    monkeypatch.setattr(command_line.sys, "executable", "/bin/false")
    assert command_line.main(told) == 2
    assert capfd.readouterr().err.endswith("(exit code 1); put that right, or give --slots\n")


def test_a_file_system_without_locks_is_told_in_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    folder = Folder(tmp_path, Node("a", "127.0.0.1", 1, session="a"), 60)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="cannot be locked here: No locks available"):
        folder.enter(0)
    os.close(folder.lock)


def _lives(pid: int) -> bool:
    """A container without an init keeps what nobody waited for."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(") ")[2].split()[0] != "Z"
