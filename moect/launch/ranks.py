"""The ranks of this node, under DeepSpeed's launcher: start, signal and end them; and they do not outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

# our death closes what it reads from; signals that a scheduler sends to every process are not for it
GUARD = 'trap "" USR1 TERM INT HUP; read -r _; kill -s KILL -- "-$1"'


class Ranks:
    """A launcher with the ranks of one generation, in a process group of their own.

    Args:
        command: the launcher's.
        env: its environment.
        lock: a file descriptor that is to stay open as long as these may live.
    """

    def __init__(self, command: list[str], env: dict[str, str], lock: int):
        self._launcher = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_ignore_usr1)
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", str(self._launcher.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[lock],
        )
        self._signalled: set[int] = set()

    def poll(self) -> int | None:
        """The exit code, when the launcher has ended. What it has left behind is ended too, and then it counts as lost:
        a launcher that is killed leaves its ranks, and ends with 0."""
        code = self._launcher.poll()
        if code is None:
            return None
        left = self._members()
        self.kill()
        return 69 if left and code == 0 else code

    def kill(self) -> None:
        """End all of it, at once, and wait until it is gone."""
        try:
            os.killpg(self._launcher.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._launcher.wait()
        while self._members():  # orphans go by the hand of init
            signal.sigtimedwait([], 0.02)
        self._guard.kill()
        self._guard.wait()
        self._guard.stdin.close()

    def ask(self, number: int) -> None:
        """Send a signal to each rank that has a handler for it, once. Not to the launcher, which would end its ranks;
        a rank that still builds its model would die of it, so call this again until the ranks have ended."""
        for pid in self._members() - self._signalled:
            if _catches(pid, number):
                os.kill(pid, number)
                self._signalled.add(pid)

    def _members(self) -> set[int]:
        """The launcher's process group, the launcher left out."""
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, group = (path / "stat").read_text().rpartition(") ")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == self._launcher.pid and state != "Z" and int(path.name) != self._launcher.pid:
                found.add(int(path.name))
        return found


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal, and is a rank: launchers have none for SIGUSR1."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = int(status["SigCgt"], 16)
    return all(caught >> (n - 1) & 1 for n in (number, signal.SIGUSR1))


def _ignore_usr1() -> None:
    """Schedulers send it to every process; it is meant for the ranks, which install handlers."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
