"""Two hosts, each a network namespace of this machine, joined by a virtual cable, as docs/multi-node.md starts them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import REPOSITORY, assert_same_bits, events, free_port, launch, losses

from moect.train.checkpoint import list_checkpoints
from moect.train.loop import train

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Hosts:
    """Two namespaces, with one interface and one address each."""

    def __init__(self):
        self.names = tuple(f"moect{os.getpid()}{side}" for side in "ab")
        self.cards = tuple(f"m{os.getpid()}{side}" for side in "ab")

    def up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cards[0], "type", "veth", "peer", "name", self.cards[1])
        for name, card, address in zip(self.names, self.cards, ADDRESSES, strict=True):
            ip("link", "set", card, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", name, "link", "set", card, "up")
            ip("-n", name, "link", "set", "lo", "up")  # down, the processes of one host do not find one another

    def down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, place, path: Path, *overrides: str) -> list[subprocess.Popen]:
        """The same command on both, one rank each, as docs/multi-node.md gives it."""
        hostfile = place.output / "hostfile"
        hostfile.write_text("host-a slots=1\nhost-b slots=1\n")
        launcher = Path(sys.executable).parent / "deepspeed"
        port = str(free_port())
        processes = []
        for rank, (name, card) in enumerate(zip(self.names, self.cards, strict=True)):
            command = ["ip", "netns", "exec", name, launcher, "--hostfile", hostfile, "--no_ssh", "--node_rank"]
            command += [str(rank), "--master_addr", ADDRESSES[0], "--master_port", port]
            command += [REPOSITORY / "launch" / "train.py", "--config", path, *overrides]
            launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            env = {key: value for key, value in os.environ.items() if key not in launched}
            env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
            env |= {"GLOO_SOCKET_IFNAME": card}
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
            processes.append(process)
        return processes

    def launch(self, place, path: Path, *overrides: str) -> list[str]:
        """What a training on both writes, a text a host; both must end with 0."""
        processes = self.start(place, path, *overrides)
        texts = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n\n".join(texts)
        return texts


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts():
    if not shutil.which("ip"):
        pytest.skip("no `ip` (iproute2): there is no way to make a second host here")
    if os.geteuid() != 0:
        pytest.skip("not root: network namespaces cannot be made")
    hosts = Hosts()
    try:
        hosts.up()
    except subprocess.CalledProcessError as error:
        hosts.down()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield hosts
    hosts.down()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_train_as_one_process_does_and_one_host_goes_on_from_their_checkpoint(place, hosts, stage):
    settings = {"micro_batch": 2, "zero_stage": stage}
    path = place.write(place.config(train=settings))
    first, second = hosts.launch(place, path, "train.stop_after=3")
    run = place.output / "run"
    assert "stopped as asked" in first and "stopped as asked" not in second  # one host tells the story
    assert events(run)[0]["plan"]["ranks"] == 2
    launch(path, 1, "resume=auto")
    assert [(line["step"], line["world_size"]) for line in events(run) if line["event"] == "resume"] == [(3, 1)]
    alone = train(place.config("alone", train={"micro_batch": 2}))
    assert len(losses(run)) == 6 and losses(run) == pytest.approx(losses(alone), abs=1e-4)


def test_two_hosts_that_were_interrupted_end_with_the_bits_of_two_that_were_not(place, hosts):
    path = place.write(place.config(train={"micro_batch": 2}))
    hosts.launch(place, path, "train.stop_after=3")
    hosts.launch(place, path, "resume=auto")
    hosts.launch(place, path, "name=whole")
    assert_same_bits(place.output / "run", place.output / "whole", 6)


def test_a_host_that_dies_ends_the_other_and_both_go_on_from_the_last_checkpoint(place, hosts):
    path = place.write(place.config(train={"micro_batch": 2, "steps": 5000, "schedule": "constant", "save_every": 4}))
    processes = hosts.start(place, path)
    checkpoints = place.output / "run" / "checkpoints"
    while not list_checkpoints(checkpoints):
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.05)
    os.killpg(processes[1].pid, signal.SIGKILL)  # launcher, its launcher and the rank: all that ran on that host
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[0].returncode not in (0, None), texts[0]
    saved = max(int(folder.name.removeprefix("step-")) for folder in list_checkpoints(checkpoints))
    hosts.launch(place, path, "resume=auto", f"train.stop_after={saved + 2}")
    resumed = [line["step"] for line in events(place.output / "run") if line["event"] == "resume"]
    assert resumed == [saved]
