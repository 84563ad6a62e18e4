"""What the main rank does for all: the others wait as long as it takes, and no longer than it lives."""

import os
import subprocess
import sys
import textwrap

import pytest
from small_runs import REPOSITORY, free_port

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
    print([distributed.main_first(work), distributed.on_main(lambda: "told")], flush=True)
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
        assert "Connection was likely closed" in ended[1][1]
