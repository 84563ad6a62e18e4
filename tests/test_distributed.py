"""What the main rank does for all: the others wait as long as it takes, and no longer than it lives."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from small_runs import REPOSITORY, free_port

from moect import distributed
from moect.errors import DataError

PROGRAM = """
    import os, sys, time
    from pathlib import Path
    import torch.distributed as dist
    from moect import distributed

    main, folder = sys.argv[1], Path(sys.argv[2])
    distributed.start()
    broadcast = dist.broadcast_object_list

    def watched(*args, **kwargs):  # a collective gives up after a time: nobody may be in one while the main rank works
        assert (folder / "done").exists(), "in a collective before the work was done"
        return broadcast(*args, **kwargs)

    dist.broadcast_object_list = watched

    def work():
        if distributed.is_main():
            while not (folder / "waiting").exists():
                time.sleep(0.01)
            time.sleep(0.5)  # for the other to do what it should not
            if main == "dies":
                os._exit(9)
            (folder / "done").touch()
        return distributed.is_main()

    if not distributed.is_main():
        (folder / "waiting").touch()
    try:
        print([distributed.main_first(work), distributed.on_main(lambda: "told")], flush=True)
    except Exception as error:
        raise distributed.explained(error, None) from None
    distributed.stop()
"""


@pytest.mark.parametrize("main", ["lives", "dies"])
def test_ranks_wait_for_the_main_rank_outside_of_collectives_and_end_when_it_dies(main, tmp_path):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), main, tmp_path],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in ranks]
    if main == "lives":
        assert [out.strip() for out, _, _ in ended] == ["[True, 'told']", "[False, 'told']"], ended
    else:
        assert ended[0][2] == 9 and ended[1][2] != 0
        assert f"RankLost: no answer from rank 0 on {socket.gethostname()}: " in ended[1][1]


def _works(rank, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    told = []

    def fails(error):
        raise error

    for work in (
        lambda: distributed.together(lambda: rank * 10),
        lambda: distributed.together(lambda: fails(ValueError("odd")) if rank == 1 else 0),
        lambda: distributed.together(lambda: fails(DataError("bad text")) if rank == 0 else 0),
        lambda: distributed.together(lambda: fails(KeyError("x")) if rank == 1 else 0, divided=True),
        lambda: distributed.on_main(lambda: fails(ValueError("a mistake"))),
        lambda: distributed.on_main(lambda: 7),
    ):
        try:
            told.append(work())
        except Exception as error:
            told.append((type(error).__name__, str(error)))
    queue.put((rank, told))
    dist.barrier()
    dist.destroy_process_group()


def test_what_fails_on_one_rank_has_failed_on_all_and_nobody_waits():
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = torch.multiprocessing.spawn(_works, (free_port(), queue), nprocs=2, join=False)
    told = dict([queue.get(), queue.get()])
    while not processes.join():  # it returns at the first that ends
        pass
    assert told[0] == [
        0,
        ("TrainingError", "rank 1: ValueError: odd"),
        ("DataError", "bad text"),
        0,
        ("ValueError", "a mistake"),
        7,
    ]
    assert told[1] == [
        10,
        ("ValueError", "odd"),
        ("TrainingError", "rank 0: DataError: bad text"),
        ("RankLost", "rank 1: KeyError: 'x'"),
        ("TrainingError", "ValueError: a mistake"),
        7,
    ]


ROLL_CALL = """
    import os, sys, time
    import torch, torch.distributed as dist
    from moect import distributed, roll_call
    from moect.errors import RankLost

    roll_call.ANSWER, roll_call.PAUSE = 3.0, 0.1
    rank, world = distributed.start()
    try:
        if rank == 2:
            if sys.argv[1] == "killed":
                os._exit(9)
            if sys.argv[1] == "failed":
                raise ValueError("a mistake")
        dist.all_reduce(torch.ones(1))
    except Exception as error:
        told = distributed.explained(error, 7)
        print(f"{type(told).__name__}: {told}", flush=True)
    os._exit(0)
"""


def _three_ranks(program: str, *arguments: str) -> list[str]:
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(3)
    ]
    return [process.communicate(timeout=120)[0].strip() for process in ranks]


def test_every_rank_that_is_left_names_the_one_that_was_killed():
    first, second, _ = _three_ranks(ROLL_CALL, "killed")
    for text in (first, second):
        assert text.startswith(f"RankLost: no answer from rank 2 on {socket.gethostname()} (last heard at step 7): ")
        assert (
            text.endswith("; start the run again with resume=auto") and "rank 1" not in text and "pair.cc" not in text
        )


def test_a_rank_that_fails_by_itself_keeps_its_error_and_the_others_tell_of_it():
    first, second, third = _three_ranks(ROLL_CALL, "failed")
    assert third == "ValueError: a mistake"
    for text in (first, second):
        assert f"RankLost: rank 2 on {socket.gethostname()} has failed: ValueError: a mistake (last heard" in text


@pytest.mark.slow
def test_ranks_that_do_not_find_one_another_say_where_they_looked():
    port = str(free_port())
    program = "from moect import distributed\ntry:\n distributed.start(0.05)\nexcept Exception as e:\n print(repr(e))"
    env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert f"RankLost('2 ranks did not find one another at 127.0.0.1:{port} within 0.05 minutes" in told.stdout
