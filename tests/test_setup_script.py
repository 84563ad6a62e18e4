"""launch/_setup.sh against a stand-in for python, whose venv and pip do little more than note that they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `-m venv` makes a folder with itself as its python; `-m pip` writes a line to $CALLS, and in the end a
# script like deepspeed's; the rest is python.
STAND_IN = """#!/bin/bash
case "$1 $2" in
    "-m venv") echo venv >>"$CALLS"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip")
        [ "$3" = --version ] && exit
        echo "pip $*" >>"$CALLS"
        case "$*" in *"${FAIL:-nothing}"*) echo "no such luck"; exit 1 ;; esac
        case "$*" in *"${KILL:-nothing}"*) kill -9 $PPID ;; esac
        case "$*" in
            *editable*) printf '#!%s/.venv/bin/python\nprint("launched")\n' "$PWD" >.venv/bin/deepspeed
                        chmod +x .venv/bin/deepspeed ;;
        esac
        sleep 0.05 ;;
    *) exec REAL "$@" ;;
esac
"""


HELLO = """set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
echo "hello from $(command -v python)"
"""


class Checkout:
    """A checkout in a folder with a space, and a PATH on which the stand-in is the only python."""

    def __init__(self, folder: Path):
        self.root = folder / "a checkout"
        (self.root / "launch").mkdir(parents=True)
        for name in ("launch/_setup.sh", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "launch" / "hello.sh").write_text(HELLO)
        self.calls = folder / "calls"
        self.bin = folder / "bin"
        self.bin.mkdir()
        tools = "bash cat chmod cp dirname find flock grep head mkdir printf rm sed sha256sum sleep tail xargs".split()
        for tool in tools:
            os.symlink(shutil.which(tool), self.bin / tool)
        self.tool("g++", "#!/bin/bash\n")
        self.tool("python3.11", STAND_IN.replace("REAL", sys.executable))

    def tool(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", self.root / "launch" / "hello.sh"],
            cwd="/",
            env={"PATH": str(self.bin), "CALLS": str(self.calls), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **environment: str) -> tuple[int, str, str, list[str]]:
        """Exit code, stdout, stderr, and what was called."""
        self.calls.write_text("")
        process = self.start(**environment)
        out, err = process.communicate()
        return process.returncode, out, err, self.calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    if not shutil.which("flock"):
        pytest.skip("no flock on this system: two set-ups at once are not kept apart")
    return Checkout(tmp_path)


def test_first_run_installs_in_order_and_second_run_installs_nothing(checkout):
    code, out, err, calls = checkout.run()
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == ["set-up: done", f"hello from {checkout.root}/.venv/bin/python"]
    assert calls[0] == "venv"
    assert [call.split(" install ")[1] for call in calls[1:]] == [
        "pip setuptools wheel ninja packaging --constraint constraints.txt",
        "torch --constraint constraints.txt",
        "--no-build-isolation --editable .[dev] --constraint constraints.txt",
    ]
    assert checkout.run() == (0, f"hello from {checkout.root}/.venv/bin/python\n", "", [])


def test_the_deepspeed_command_runs_from_a_path_with_a_space(checkout):
    checkout.run()
    scripts = checkout.root / ".venv" / "bin"
    result = subprocess.run([scripts / "deepspeed"], env={"PATH": f"{scripts}:{checkout.bin}"}, capture_output=True)
    assert result.stdout == b"launched\n"


@pytest.mark.parametrize("changed", ["constraints.txt", "setup.py"])
def test_changed_requirements_are_installed_into_the_venv_that_is_there(checkout, changed):
    checkout.run()
    (checkout.root / ".venv" / "mine").write_text("")
    with (checkout.root / changed).open("a") as file:
        file.write("# changed\n")
    calls = checkout.run()[3]
    assert len(calls) == 3 and "venv" not in calls
    assert (checkout.root / ".venv" / "mine").exists()
    assert checkout.run()[3] == []


def test_an_interrupted_setup_begins_afresh_the_next_time(checkout):
    code, out, _, calls = checkout.run(KILL="install torch")
    assert code != 0 and "hello" not in out and len(calls) == 3
    (checkout.root / ".venv" / "half-written").write_text("")
    code, out, _, calls = checkout.run()
    assert code == 0 and calls[0] == "venv" and len(calls) == 4
    assert not (checkout.root / ".venv" / "half-written").exists()
    assert checkout.run()[3] == []


def test_a_failed_installation_shows_the_end_of_the_log_and_is_tried_again(checkout):
    code, out, err, _ = checkout.run(FAIL="install torch")
    assert code == 1 and "hello" not in out
    assert "no such luck" in err.splitlines()
    assert err.splitlines()[-1].endswith(f"all of its output is in {checkout.root}/.venv/install.log")
    assert checkout.run()[0] == 0


def test_a_moved_checkout_gets_a_venv_of_its_own(checkout):
    checkout.run()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    code, out, _, calls = checkout.run()
    assert code == 0 and calls[0] == "venv"
    assert out.splitlines()[-1] == f"hello from {checkout.root}/.venv/bin/python"


def test_two_at_once_install_once(checkout):
    checkout.calls.write_text("")
    processes = [checkout.start(), checkout.start()]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(output.splitlines()[-1].startswith("hello") for output in outputs)
    assert checkout.calls.read_text().splitlines().count("venv") == 1


def test_a_venv_that_somebody_made_is_added_to(checkout):
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python3.11", checkout.root / ".venv" / "bin" / "python")
    calls = checkout.run()[3]
    assert len(calls) == 3 and "venv" not in calls


def test_missing_compiler_is_one_line(checkout):
    (checkout.bin / "g++").unlink()
    code, _, err, calls = checkout.run()
    assert (code, calls) == (2, [])
    assert err == "set-up: no C++ compiler, which deepspeed needs: install g++\n"


def test_missing_python_is_one_line(checkout):
    (checkout.bin / "python3.11").unlink()
    code, _, err, calls = checkout.run()
    assert (code, calls) == (2, [])
    assert err == "set-up: no python to use: install python 3.11 or newer, with venv and headers\n"


@pytest.mark.parametrize(
    ("pretend", "reason"),
    [
        ("sys.version_info = (3, 9)", "is version 3.9, older than 3.11"),
        (
            "import importlib.util; importlib.util.find_spec = lambda name: None",
            "has no venv module (Debian",
        ),
        (
            "import sysconfig; sysconfig.get_paths = lambda: {'include': '/nowhere'}",
            "has no headers (Debian",
        ),
        ("sys.exit(1)", "does not run"),
    ],
)
def test_a_python_that_cannot_be_used_says_why(checkout, pretend, reason):
    run_stdin = f"import sys; {pretend}; exec(sys.stdin.read())"
    checkout.tool("python3.11", f'#!/bin/bash\nexec {sys.executable} -c "{run_stdin}"\n')
    code, _, err, _ = checkout.run()
    assert code == 2
    assert f"; python3.11 {reason}" in err and len(err.splitlines()) == 1


def test_another_python_is_taken_where_the_first_cannot_be_used_or_is_not_wanted(checkout):
    checkout.tool("python3.12", (checkout.bin / "python3.11").read_text())
    checkout.tool("python3.11", "#!/bin/bash\nexit 127\n")
    _, out, _, _ = checkout.run()
    assert f"from {checkout.bin}/python3.12, into .venv" in out.splitlines()[0]
    shutil.rmtree(checkout.root / ".venv")
    assert checkout.run(PYTHON="python3.11")[:3] == (2, "", "set-up: PYTHON=python3.11 does not run\n")
