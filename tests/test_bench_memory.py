"""What the benchmark knows about memory: the peak of a call, what is free, and the pages under the floor."""

import re
import threading
from itertools import accumulate
from math import inf
from pathlib import Path

import pytest
import torch

from moect import free_memory
from moect.bench import large_pages, machine
from moect.bench.cases import Shape, make_problem
from moect.bench.contestants import LeftOut, of_backends
from moect.bench.floor import Floor
from moect.bench.memory import _counter, peak_extra_bytes
from moect.bench.peers import peers
from moect.free_memory import free_bytes

MIB = 2**20
GIB = 2**30


# the peak of a call


def eight_then_four():
    first = torch.empty(8 * MIB, dtype=torch.uint8)
    del first
    return torch.empty(4 * MIB, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)


def test_peak_memory_is_the_highest_moment_not_the_sum():
    assert peak_extra_bytes(eight_then_four, "cpu") == 8 * MIB


def test_peak_memory_sees_what_other_threads_allocate():
    def call():
        kept = torch.empty(MIB, dtype=torch.uint8)
        thread = threading.Thread(target=eight_then_four)
        thread.start()
        thread.join()
        return kept

    assert peak_extra_bytes(call, "cpu") == 9 * MIB


def test_peak_memory_sees_what_operators_and_the_backward_pass_allocate():
    x = torch.randn(256, 256, requires_grad=True)
    size = x.nbytes
    # highest where the product is differentiated: the gradient that arrives there and those of both factors; relu has
    # given back what it saved; beside them the sum and the 1 that starts the backward pass
    assert peak_extra_bytes(lambda: torch.autograd.grad((x @ x).relu().sum(), x), "cpu") == 3 * size + 2 * 4


def test_peak_memory_is_that_of_the_profiler_where_one_thread_allocates_all():
    problem = make_problem(Shape(48, 32, 16, 8, 3), "bf16", "cpu")
    for contestant in [*of_backends(["reference", "segments", "grouped"], problem), *peers(problem)]:
        if isinstance(contestant, LeftOut):
            continue
        contestant.forward_backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = contestant.forward_backward()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert max(accumulate(e.nbytes() for e in events)) == peak_extra_bytes(contestant.forward_backward, "cpu")
        del results


def test_tensors_that_were_there_before_the_call_do_not_count():
    before = [torch.empty(4 * MIB, dtype=torch.uint8)]
    of_an_earlier_count = []
    assert peak_extra_bytes(lambda: of_an_earlier_count.append(torch.empty(2 * MIB, dtype=torch.uint8)), "cpu") == (
        2 * MIB
    )

    def call():
        before.clear()
        of_an_earlier_count.clear()
        return torch.empty(MIB, dtype=torch.uint8)

    assert peak_extra_bytes(call, "cpu") == MIB


def test_without_a_compiler_memory_is_left_out_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    _counter.cache_clear()
    try:
        assert peak_extra_bytes(eight_then_four, "cpu") is None
        assert peak_extra_bytes(eight_then_four, "cpu") is None
        (record,) = [r for r in caplog.records if r.name == "moect.bench"]
        assert "no-such-compiler" in record.message
    finally:
        _counter.cache_clear()


@pytest.mark.parametrize("given", ["c++ -O1", ""])
def test_the_compiler_may_be_given_with_options_or_as_nothing(given, monkeypatch):
    monkeypatch.setenv("CXX", given)
    _counter.cache_clear()
    try:
        assert peak_extra_bytes(eight_then_four, "cpu") == 8 * MIB
    finally:
        _counter.cache_clear()


# what is free


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system of these files under /proc and /sys/fs/cgroup, and no others."""
    monkeypatch.setattr(free_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(free_memory, "CGROUPS", tmp_path / "cgroup")

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * MIB} kB\nMemAvailable: {8 * MIB} kB\n"}  # 8 GiB


def test_without_control_groups_free_is_what_the_machine_has_available(system):
    system(**MEMINFO)
    assert free_bytes("cpu") == 8 * GIB
    system(**{"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": f"{GIB}\n"})
    assert free_bytes("cpu") == 8 * GIB


def test_a_container_leaves_what_its_limit_leaves(system):
    system(**MEMINFO, **{"proc/self/cgroup": "0::/\n"})
    system(**{"cgroup/memory.max": f"{4 * GIB}\n", "cgroup/memory.current": f"{3 * GIB}\n"})
    assert free_bytes("cpu") == GIB
    system(**{"cgroup/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n"})  # cache, given up when memory is short
    assert free_bytes("cpu") == 3 * GIB
    system(**{"cgroup/memory.max": f"{100 * GIB}\n"})
    assert free_bytes("cpu") == 8 * GIB


def test_a_group_is_bound_by_the_limits_of_those_around_it(system):
    system(**MEMINFO, **{"proc/self/cgroup": "0::/jobs/mine\n"})
    system(**{"cgroup/jobs/mine/memory.max": "max\n", "cgroup/jobs/mine/memory.current": "0\n"})
    system(**{"cgroup/jobs/memory.max": f"{2 * GIB}\n", "cgroup/jobs/memory.current": "0\n"})
    assert free_bytes("cpu") == 2 * GIB


def test_the_first_version_of_control_groups_is_understood(system):
    system(**MEMINFO, **{"proc/self/cgroup": "4:cpuset,memory:/jobs\n0::/\n"})
    folder = "cgroup/memory/jobs"
    system(**{f"{folder}/memory.limit_in_bytes": f"{3 * GIB}\n", f"{folder}/memory.usage_in_bytes": f"{GIB}\n"})
    assert free_bytes("cpu") == 2 * GIB


def test_where_the_system_has_no_such_files_nothing_breaks(system, monkeypatch, tmp_path):
    monkeypatch.setattr(free_memory.os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert free_bytes("cpu") == 4096000

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(free_memory.os, "sysconf", unknown)
    assert free_bytes("cpu") == inf
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "LARGE_PAGES", tmp_path / "enabled")
    here = machine.machine("cpu")
    assert here["cpu"] and here["transparent hugepages"] == ""


def test_this_machine_has_memory_to_give():
    assert MIB < free_bytes("cpu") < inf


def test_what_the_caching_allocator_holds_unused_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20 * GIB)
    assert free_bytes("cuda") == 53 * GIB


# pages

FLOOR = ("x_ND", "a_NF", "dy_ND", "dh_N2F", "h_N2F", "y_ND", "da_NF", "dx_ND", "d_gate_up_E2FD", "d_down_EDF")


@pytest.mark.skipif(not machine.machine("cpu")["transparent hugepages"], reason="this system has no large pages")
def test_all_that_the_floor_reads_and_writes_for_itself_asks_for_large_pages():
    floor = Floor(make_problem(Shape(40, 64, 32, 6, 3), "bf16", "cpu"))
    areas = memory_areas()
    places = []
    for name in FLOOR:
        tensor = getattr(floor, name)
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        ((first, last, access, flags),) = [area for area in areas if area[0] <= begin < area[1]]
        assert "hg" in flags and end <= last
        assert access.endswith("p")  # a shared area has large pages only where another setting gives them
        assert tensor.data_ptr() % large_pages.ALIGNMENT == 0
        places.append((begin, end))
    places.sort()
    assert places[0][0] % large_pages.PAGE == 0
    assert all(end <= begin for (_, end), (begin, _) in zip(places, places[1:], strict=False))


def memory_areas():
    """(first address, end, access, flags) of each memory area of this process."""
    areas = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) (\\S+)", line):
            areas.append([int(found[1], 16), int(found[2], 16), found[3], []])
        elif line.startswith("VmFlags:"):
            areas[-1][3] = line.split()[1:]
    return areas


def test_without_large_pages_the_floor_has_plain_memory(monkeypatch):
    monkeypatch.delattr(large_pages.mmap, "MADV_HUGEPAGE", raising=False)
    like = torch.empty(0, dtype=torch.bfloat16)
    one, two = large_pages.zeros(like, (2, 3), (5,))
    assert torch.equal(one, like.new_zeros(2, 3)) and torch.equal(two, like.new_zeros(5))


def test_the_machine_says_who_gets_large_pages(monkeypatch, tmp_path):
    mode = tmp_path / "enabled"
    mode.write_text("always [madvise] never\n")
    monkeypatch.setattr(machine, "LARGE_PAGES", mode)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    here = machine.machine("cpu")
    assert (here["transparent hugepages"], here["THP_MEM_ALLOC_ENABLE"]) == ("madvise", "1")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert machine.machine("cpu")["THP_MEM_ALLOC_ENABLE"] == ""
