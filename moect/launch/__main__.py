"""The command line of a supervisor; launch/supervise.sh calls it."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from moect.errors import ConfigError, MoectError
from moect.launch.supervisor import Options, Supervisor
from moect.stages import load_stages

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    """Supervise this node's part of a run and return the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        stages = load_stages(arguments.config, arguments.overrides)
        options = Options(
            name=arguments.name,
            address=arguments.address or _own_address(),
            slots=arguments.slots or _gpus(),
            nodes_dir=arguments.nodes_dir or Path(stages[0].output) / ".nodes" / stages[0].name,
            nodes=arguments.nodes,
            port=arguments.port,
            max_restarts=arguments.max_restarts,
            settle=arguments.settle,
            lost_after=arguments.lost_after,
        )
        supervisor = Supervisor(
            options,
            batches=[(config.train.batch_size, config.train.micro_batch) for config in stages],
            progress=lambda: [_last_step(config.folder / "checkpoints") for config in stages],
            start=lambda *generation: _launcher(arguments, *generation),
        )
        return supervisor.run()
    except MoectError as error:
        print(f"supervise: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/supervise.sh",
        description="Train a run on several nodes: the same command on each, and a folder that all of them see. If a "
        "node is lost, the others go on from the last checkpoint without it; if it comes back, it is taken in again.",
        epilog="Exit codes: 0 finished; 1 too many starts without a new checkpoint; 2 something is to be put right; "
        "75 stopped by a signal, with a checkpoint.",
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="as for launch/train.py; resume=auto is added")
    add("--config", required=True, help="the run, or its stages")
    add("--name", default=socket.gethostname(), help="of this node; ranks are in the order of names (its host name)")
    add("--address", help="at which the other nodes reach this one (that of its way out)")
    add("--slots", type=int, help="ranks on this node (its GPUs)")
    add("--nodes", type=int, default=Options.nodes, help="wait for so many before the first start (1)")
    add("--nodes-dir", type=Path, help="the folder that all nodes see (OUTPUT/.nodes/NAME of the run)")
    add("--port", type=int, default=Options.port, help="rank 0 listens here or up to 63 higher (29500)")
    add(
        "--max-restarts",
        type=int,
        default=Options.max_restarts,
        help="starts in a row without a new checkpoint before it gives up (3)",
    )
    add("--settle", type=float, default=Options.settle, help="seconds that nodes must be there, all and unchanged (10)")
    add(
        "--lost-after",
        type=float,
        default=Options.lost_after,
        help="seconds of silence after which a node is lost (60)",
    )
    return parser


def _launcher(arguments, rank: int, hosts: Path, address: str, port: int) -> tuple[list[str], dict[str, str]]:
    """DeepSpeed's launcher for this node, and its environment."""
    where = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank)]
    where += ["--master_addr", address, "--master_port", str(port)]
    script = [str(ROOT / "launch" / "train.py"), "--config", arguments.config, *arguments.overrides, "resume=auto"]
    beside = Path(sys.executable).parent / "deepspeed"
    return [shutil.which("deepspeed") or str(beside), *where, *script], dict(os.environ)


def _last_step(checkpoints: Path) -> int:
    """The greatest step that there is a checkpoint of; -1 without any."""
    steps = [path.name.removeprefix("step-") for path in checkpoints.glob("step-*")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def _own_address() -> str:
    """The address of the card that this node's way out begins at; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # an address of documentation (RFC 5737)
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            "this node has no way out by which its address would be known; give --address, at which the others reach it"
        ) from error


def _gpus() -> int:
    """Asked in another process: torch would stay here for nothing."""
    asked = "import torch; print(torch.cuda.device_count())"
    try:
        found = int(subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise ConfigError(f"torch cannot count this node's GPUs ({last}); put that right, or give --slots") from error
    if not found:
        raise ConfigError("no GPUs on this node; give --slots, the number of ranks")
    return found


if __name__ == "__main__":
    sys.exit(main())
