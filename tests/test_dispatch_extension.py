"""Building and loading the compiled kernels: once, whoever comes first, and never in silence where it cannot be."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moect.cli import main
from moect.dispatch import build, extension

ROOT = Path(__file__).resolve().parent.parent

# a library that is compiled in a second, in the place of the real one
SMALL = """
import sys, logging
from pathlib import Path
from moect.dispatch import build, extension
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
build.CSRC = extension.CSRC = Path(sys.argv[1])
build.SOURCES = extension.SOURCES = {"cpu": ("small.cpp",)}
extension._definitions = []
print(extension.load("cpu"))
"""

DISPATCH = """
import sys, logging
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import torch
from moect.dispatch import dispatch
x, i, w = torch.ones(2, 4), torch.zeros(2, 1).long(), torch.ones(2, 1)
print(dispatch(x, i, w, torch.ones(1, 4, 4), torch.ones(1, 4, 2)).shape)
"""


def start(code: str, *arguments, **environment) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in environment.items()}}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(code: str, *arguments, **environment) -> str:
    return start(code, *arguments, **environment).communicate()[0]


@pytest.fixture
def small(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "small.cpp").write_text('extern "C" int moect_small() { return 1; }\n')
    return tmp_path / "csrc"


def test_a_library_is_built_once_and_then_loaded_until_its_sources_change(small, tmp_path):
    first, second = (output(SMALL, small, MOECT_KERNELS=tmp_path / "kernels") for _ in range(2))
    assert "compiling the expert kernels for cpu, once, into" in first and first.endswith("None\n")
    assert second == "None\n"
    assert [path.suffix for path in sorted((tmp_path / "kernels").iterdir())] == [".lock", ".so"]
    (small / "small.cpp").write_text('extern "C" int moect_small() { return 2; }\n')
    assert "compiling" in output(SMALL, small, MOECT_KERNELS=tmp_path / "kernels")
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 2


def test_processes_that_start_together_build_once(small, tmp_path):
    together = [start(SMALL, small, MOECT_KERNELS=tmp_path / "kernels") for _ in range(3)]
    outputs = [process.communicate()[0] for process in together]
    assert sum("compiling" in text for text in outputs) == 1
    assert all(text.endswith("None\n") for text in outputs)


def test_a_build_that_was_killed_is_begun_again(small, tmp_path):
    waiting = tmp_path / "compiler"
    waiting.write_text(
        f'#!/bin/sh\ncase "$*" in *small.cpp*) echo $$ >\'{tmp_path}/at-work\'; exec sleep 600;; esac\nexec g++ "$@"\n'
    )
    waiting.chmod(0o755)
    killed = start(SMALL, small, MOECT_KERNELS=tmp_path / "kernels", CXX=waiting)
    while not (tmp_path / "at-work").is_file() and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    os.kill(int((tmp_path / "at-work").read_text()), signal.SIGKILL)
    assert output(SMALL, small, MOECT_KERNELS=tmp_path / "kernels").endswith("None\n")
    assert [path.suffix for path in sorted((tmp_path / "kernels").iterdir())] == [".lock", ".so"]


def test_threads_that_start_together_load_once(small, tmp_path):
    threads = SMALL.replace(
        'print(extension.load("cpu"))',
        "import threading, time\n"
        "defined = []\n"
        "extension._definitions = [lambda: (time.sleep(0.2), defined.append(1))]\n"
        "threads = [threading.Thread(target=extension.load, args=('cpu',)) for _ in range(4)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(defined)",
    )
    assert output(threads, small, MOECT_KERNELS=tmp_path / "kernels").endswith("[1]\n")


def test_an_empty_variable_names_no_compiler_and_options_in_it_are_refused(monkeypatch):
    monkeypatch.setenv("CXX", "")
    assert build._compiler("cpu") == "c++"
    monkeypatch.setenv("CXX", "g++ -O1")
    with pytest.raises(build.BuildError, match="torch takes a compiler without options"):
        build._compiler("cpu")


def test_a_compiler_that_only_fails_is_a_reason_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("MOECT_KERNELS", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert load_afresh().startswith("compiling it failed: ")


def test_without_a_compiler_segments_serve_and_the_log_says_so(tmp_path):
    lines = output(DISPATCH, MOECT_KERNELS=tmp_path, CXX="no-such-compiler").splitlines()
    reason = "there is no C++ compiler (no-such-compiler) to build it with"
    assert lines == [f"experts by `segments` on cpu in float32; not `cpu`: {reason}", "torch.Size([2, 4])"]


def test_a_build_that_fails_names_the_error_and_keeps_the_output(small, tmp_path):
    (small / "small.cpp").write_text("int moect_small() { return nothing; }\n")
    text = output(SMALL, small, MOECT_KERNELS=tmp_path / "kernels")
    (log,) = (tmp_path / "kernels").glob("*.log")
    assert re.search(f"compiling it failed: error: .nothing. was not declared in this scope; see {log}", text)
    assert "small.cpp" in log.read_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOECT_KERNELS", str(tmp_path / "file" / "kernels"))
    reason = r"Not a directory \(.*file.kernels\S*\); set MOECT_KERNELS to a folder that can be written"
    assert re.fullmatch(reason, load_afresh())


def test_a_damaged_library_is_named_and_not_fatal(tmp_path, monkeypatch):
    monkeypatch.setenv("MOECT_KERNELS", str(tmp_path))
    extension.library("cpu").write_bytes(b"not a library")
    expected = f"it cannot be loaded: {extension.library('cpu')}: file too short; remove it, and it is built again"
    assert load_afresh() == expected


def test_the_command_says_where_the_kernels_are_and_refuses_what_is_none(capsys):
    assert main(["kernels", "cpu"]) == 0
    assert capsys.readouterr().out == f"cpu: {extension.library('cpu')}\n"
    assert main(["kernels", "cpu", "tpu"]) == 2
    assert capsys.readouterr().err == "moect: error: no kernels for tpu: there are cpu, cuda\n"


def load_afresh() -> str | None:
    """The reason that this process would have, had it not loaded the kernels before."""
    return extension._load.__wrapped__("cpu")
