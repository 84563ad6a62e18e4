"""Ranks: start the process group, do a thing on the main rank and tell the others, end cleanly."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moect.errors import MoectError, RankLost, TrainingError
from moect.roll_call import RollCall

_works = itertools.count()  # pieces of work that the main rank did for all
_roll_call: RollCall | None = None  # with other ranks


def start(timeout_minutes: float = 30.0) -> tuple[int, int]:
    """Join the process group (of one, if no launcher made us) and return (rank, world size).

    A process joins once: DeepSpeed cannot do without the group it first saw, so later runs in the process share it.

    Args:
        timeout_minutes: ranks wait so long for one another, here and in every collective from now on.

    Raises:
        RankLost: not all came.
    """
    import deepspeed

    timeout = timedelta(minutes=timeout_minutes)
    # sub-groups that DeepSpeed makes take torch's default and would wait forever on a lost peer
    dist.distributed_c10d.default_pg_timeout = timeout
    if dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:  # there is no public call for it
            dist.distributed_c10d._set_pg_timeout(timeout, group)
        return dist.get_rank(), dist.get_world_size()

    # a kernel for inference only, which would need a compiler and half a minute at the first start on a CPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(verbose=False, timeout=timeout)
        dist.barrier()  # a rank that failed at once would leave while others still connect to it
        _hear_of_one_another()
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(
            f"{os.environ['WORLD_SIZE']} ranks did not find one another at {where} within {timeout_minutes:g} minutes "
            f"({str(error).splitlines()[0]}); see that every node runs and reaches that address, and start again"
        ) from error
    return dist.get_rank(), dist.get_world_size()


def _hear_of_one_another() -> None:
    global _roll_call
    if dist.get_world_size() == 1:
        return
    hosts = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    store = dist.PrefixStore("moect/roll call", dist.distributed_c10d._get_default_store().clone())
    _roll_call = RollCall(store, dist.get_rank(), hosts)
    _roll_call.start()


def explained(error: Exception, step: int | None) -> Exception:
    """What to raise for a failure of this rank's work: the error itself, or what became of other ranks.

    Args:
        error: as it was raised.
        step: the last one that all ranks took together, if any.
    """
    failure = error.__cause__ if isinstance(error, RankLost) else error  # of work that was divided
    if _roll_call is None or failure is None or isinstance(failure, MoectError) or hasattr(failure, "told_to_all"):
        return error
    return _roll_call.explain(failure, step) or error


def stop(failed: bool = False) -> None:
    """Leave the process group, at the end of the process.

    Args:
        failed: do not wait for the other ranks, which may never come.
    """
    global _roll_call
    if _roll_call:
        _roll_call.end()
        _roll_call = None
    if dist.is_initialized():
        if not failed:
            dist.barrier()
        dist.destroy_process_group()


def device() -> torch.device:
    """This rank's device."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_main() -> bool:
    """Whether this is rank 0, or no process group was started."""
    return not dist.is_initialized() or dist.get_rank() == 0


def main_first(work: Callable[[], Any]) -> Any:
    """Do `work` on the main rank, then on all others; a user error of the main rank is everybody's."""
    made = []
    on_main(lambda: made.append(work()))
    return made[0] if made else work()


def on_main(work: Callable[[], Any]) -> Any:
    """Do `work` on the main rank only; what it returns, or its user error, is everybody's.

    Raises:
        TrainingError: the main rank could not read or write a file.
    """
    told, mistake = [None, None], None
    if is_main():
        try:
            told[0] = work()
        except MoectError as error:
            told[1] = error
        except OSError as error:
            where = error.filename or "the run's folder"
            told[1] = TrainingError(f"{where}: {error.strerror or error}; check space and permissions")
        except Exception as error:  # a mistake of ours; the others wait for a word all the same
            told[1], mistake = TrainingError(f"{type(error).__name__}: {error}"), error
            told[1].exit_code = RankLost.exit_code  # nothing that the user could put right
            error.told_to_all = True
    if dist.is_initialized() and dist.get_world_size() > 1:
        _wait_for_main()
        dist.broadcast_object_list(told, src=0)
    result, failure = told
    if mistake is not None:
        raise mistake
    if failure is not None:
        failure.told_by_main_rank = not is_main()
        raise failure
    return result


def together(work: Callable[[], Any], divided: bool = False) -> Any:
    """Do this rank's part of something, without waiting for other ranks, and return what it gives; if it fails on one
    rank it has failed on all.

    Args:
        work: this rank's part.
        divided: the work holds collectives of its own (ZeRO-3). Then the others cannot be told of a failure.

    Raises:
        Exception: of this rank's work, as it was.
        TrainingError: the work of another rank failed.
        RankLost: it failed while `divided`: the other ranks wait for this one, which must end.
    """
    failure = result = None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must know
        failure = error
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if failure:
            raise failure
        return result
    if divided:
        if failure:
            raise RankLost(f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}") from failure
        return result
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, failure and f"{type(failure).__name__}: {failure}")
    if failure:
        failure.told_to_all = True
        raise failure
    for rank, text in enumerate(said):
        if text:
            raise TrainingError(f"rank {rank}: {text}")
    return result


def _wait_for_main() -> None:
    """Return when the main rank is here too, however long its work takes: a collective would give up after a time.

    The others look for a note in the store through which the ranks have found one another; it ends with the main rank.
    """
    store = dist.distributed_c10d._get_default_store()  # there is no public call for it
    note = f"moect/{next(_works)}"
    if is_main():
        store.set(note, "done")
    pause = 0.01
    while not store.check([note]):
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)
