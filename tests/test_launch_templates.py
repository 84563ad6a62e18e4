"""The Slurm and Kubernetes templates, run as those systems would run them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_runs import REPOSITORY, events, free_port, losses

from moect.errors import ConfigError, Stopped
from moect.train.checkpoints.reading import list_checkpoints
from moect.train.loop import train

SBATCH = REPOSITORY / "launch" / "slurm.sbatch"
KUBERNETES = REPOSITORY / "launch" / "kubernetes.yaml"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# one task a node, side by side, and the greatest exit code; options are written down
SRUN = """
echo "$*" >>"$STUBS/srun.log"
while [[ "$1" = --* ]]; do shift; done
SLURMD_NODENAME=localhost "$@" & first=$!
SLURMD_NODENAME=node-2 "$@" & second=$!
echo "$first $second" >"$STUBS/srun.pids"
trap 'touch "$STUBS/asked"' USR1
code=0
for task in $first $second; do
    while :; do
        one=0
        wait $task || one=$?
        kill -0 $task 2>/dev/null || break
    done
    [ $one -le $code ] || code=$one
done
exit $code
"""
SCONTROL = """
echo "$*" >>"$STUBS/scontrol.log"
"""


def environment(**changes: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHED and not key.startswith("SLURM")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)} | changes


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")  # one of these is called bash itself
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A job of two nodes: its environment, and stand-ins for Slurm's commands; it is submitted from its own folder."""
    stubs, checkout = tmp_path / "stubs", tmp_path / "checkout"
    stubs.mkdir(), checkout.mkdir()
    (checkout / "launch").symlink_to(REPOSITORY / "launch")
    executable(stubs / "srun", SRUN)
    executable(stubs / "scontrol", SCONTROL)
    env = environment(STUBS=str(stubs), SLURM_SUBMIT_DIR=str(checkout), SLURM_JOB_ID="4711", OMP_NUM_THREADS="1")
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    return env | {"PATH": f"{stubs}{os.pathsep}{env['PATH']}", "MASTER_PORT": str(free_port())}


def submit(env: dict[str, str], *arguments: str | Path, cwd: str = "/") -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SBATCH, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_slurm_job_trains_on_two_nodes_from_the_last_checkpoint_that_is_there(place, cluster):
    settings = {"micro_batch": 2}
    run = train(place.config(train={**settings, "stop_after": 3}))
    path = place.write(place.config(train=settings))
    job = submit(cluster, path)
    assert job.returncode == 0, job.stdout + job.stderr
    assert [(line["step"], line["world_size"]) for line in events(run) if line["event"] == "resume"] == [(3, 2)]
    assert losses(run) == pytest.approx(losses(train(place.config("alone", train=settings))), abs=1e-4)
    assert len(losses(run)) == 6 and not (Path(cluster["STUBS"]) / "scontrol.log").exists()


def test_slurm_job_gives_each_node_a_supervisor_with_its_own_name(cluster):
    shown = 'echo "$(printf "%q " "$@")threads $OMP_NUM_THREADS"\n'  # in one piece: two write at once
    executable(Path(cluster["STUBS"]) / "bash", shown)
    env = {key: value for key, value in cluster.items() if key not in ("MASTER_PORT", "OMP_NUM_THREADS")}
    env |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}
    # srun's own command runs in a real bash, what it starts is shown
    executable(Path(cluster["STUBS"]) / "srun", SRUN.replace('"$@" &', '/bin/bash "${@:2}" &'))
    command = ["/bin/bash", SBATCH, "my run.yaml", "train.lr=1e-3"]
    job = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=60)
    for node in ("localhost", "node-2"):
        wanted = f"launch/supervise.sh --name {node} --address {node} --nodes 2 --slots 4 --port 24711"
        assert f"{wanted} --config my\\ run.yaml train.lr=1e-3 threads 8\n" in job.stdout, job.stdout + job.stderr
    options = (Path(env["STUBS"]) / "srun.log").read_text()
    assert "--no-kill --kill-on-bad-exit=0" in options  # the nodes left go on


@pytest.mark.slow
def test_slurm_job_near_its_time_limit_makes_a_checkpoint_and_is_requeued(place, cluster):
    settings = {"micro_batch": 2, "steps": 5000, "schedule": "constant", "save_every": 5000}
    path = place.write(place.config(train=settings))
    out = place.output / "job"
    with out.open("w") as file:
        job = subprocess.Popen(["bash", SBATCH, path], env=cluster, cwd="/", stdout=file, stderr=subprocess.STDOUT)
    run = place.output / "run"
    while not (run / "log.jsonl").is_file() or not losses(run):
        assert job.poll() is None, out.read_text()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)  # as Slurm does to the script alone
    while not (Path(cluster["STUBS"]) / "asked").exists():
        time.sleep(0.05)
    for pid in _tree(job.pid)[1:]:  # srun sends it on to every process of the step; all but the ranks must survive it
        if "srun" not in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGUSR1)
    assert job.wait(300) == 75, out.read_text()
    assert (Path(cluster["STUBS"]) / "scontrol.log").read_text() == "requeue 4711\n"
    stop = [line for line in events(run) if line["event"] == "stop"][0]["step"]
    assert stop < 5000 and list_checkpoints(run / "checkpoints") == [run / "checkpoints" / f"step-{stop}"]


@pytest.mark.parametrize(
    ("asked", "code", "requeued"),
    [(True, 137, True), (True, 75, True), (True, 0, False), (True, 1, False), (True, 2, False)]
    + [(False, 75, True), (False, 137, False), (False, 0, False)],
)
def test_slurm_job_is_requeued_at_its_time_limit_also_where_a_node_was_killed_before(cluster, asked, code, requeued):
    stubs = Path(cluster["STUBS"])
    (stubs / "code").write_text(str(code))
    waits = """
trap 'exit $(cat "$STUBS/code")' USR1
touch "$STUBS/ready"
while [ ! -e "$STUBS/end" ]; do sleep 0.05; done
exit $(cat "$STUBS/code")
"""
    executable(stubs / "srun", waits)
    job = subprocess.Popen(["/bin/bash", SBATCH, "x.yaml"], env=cluster, cwd="/")
    while not (stubs / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1) if asked else (stubs / "end").touch()
    assert job.wait(60) == code
    assert (stubs / "scontrol.log").exists() is requeued


def test_slurm_job_asked_while_srun_is_starting_passes_it_on(cluster):
    stubs = Path(cluster["STUBS"])
    executable(stubs / "srun", "trap 'exit 75' USR1\nkill -USR1 $PPID\nfor _ in {1..1200}; do sleep 0.05; done\n")
    job = subprocess.run(["/bin/bash", SBATCH, "x.yaml"], env=cluster, cwd="/", timeout=90)
    assert job.returncode == 75
    assert (stubs / "scontrol.log").read_text() == "requeue 4711\n"


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    import psutil

    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def test_slurm_job_fails_as_its_training_fails(cluster):
    config = Path(cluster["STUBS"]) / "x.yaml"
    config.write_text("no_such_key: 1\n")
    job = submit(cluster, config)
    assert job.returncode == 2 and "unknown key" in job.stderr


@pytest.mark.parametrize(
    ("arguments", "changes", "reason"),
    [
        ([], {}, "which run?"),
        (["x.yaml"], {"SLURM_SUBMIT_DIR": "/"}, "submit from the checkout"),
        (["x.yaml"], {"SLURM_GPUS_ON_NODE": ""}, "ask for --gpus-per-node"),
    ],
)
def test_slurm_job_that_cannot_work_says_why(cluster, arguments, changes, reason):
    job = submit(cluster | changes, *arguments)
    assert job.returncode == 2 and job.stderr.startswith("slurm.sbatch: ") and reason in job.stderr


def test_slurm_directives_come_before_the_first_command():
    lines = SBATCH.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert len(directives) == len([line for line in lines[:first] if line.startswith("#SBATCH")]) > 5
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in directives)


@pytest.fixture
def manifest() -> dict:
    """The Job."""
    return yaml.safe_load(KUBERNETES.read_text(encoding="utf-8"))


def pod(manifest) -> dict:
    return manifest["spec"]["template"]["spec"]


def pod_environment(manifest) -> dict[str, str]:
    """Of the first pod."""
    entries = pod(manifest)["containers"][0]["env"]
    return {e["name"]: e.get("value", "127.0.0.1") for e in entries} | {"JOB_COMPLETION_INDEX": "0"}


def test_kubernetes_job_is_consistent(manifest):
    spec = manifest["spec"]
    assert (manifest["kind"], manifest["apiVersion"]) == ("Job", "batch/v1")
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    env = pod_environment(manifest)
    assert env["NODES"] == str(spec["completions"])
    assert env["RANKS_PER_NODE"] == str(pod(manifest)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert all(isinstance(value, str) for value in env.values())
    volumes = {volume["name"] for volume in pod(manifest)["volumes"]}
    assert {mount["name"] for mount in pod(manifest)["containers"][0]["volumeMounts"]} == volumes


def test_kubernetes_pod_comes_back_unless_the_user_must_act(manifest):
    rules = manifest["spec"]["podFailurePolicy"]["rules"]
    by_code = {c: r["action"] for r in rules for c in r.get("onExitCodes", {}).get("values", ())}
    assert by_code == {1: "FailJob", ConfigError.exit_code: "FailJob", Stopped.exit_code: "Ignore"}
    names = {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r}
    assert names == {pod(manifest)["containers"][0]["name"]}
    assert pod(manifest)["restartPolicy"] == "Never"  # which a failure policy demands
    assert pod(manifest)["terminationGracePeriodSeconds"] > 30


def command(manifest, *arguments: str) -> list[str]:
    return [*pod(manifest)["containers"][0]["command"], *arguments]


def test_kubernetes_pod_starts_a_supervisor_with_its_own_name(manifest, tmp_path):
    executable(tmp_path / "bash", 'printf "%q " "$@"\n')
    env = environment(**pod_environment(manifest) | {"JOB_COMPLETION_INDEX": "1", "POD_IP": "10.0.0.7"})
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    arguments = pod(manifest)["containers"][0]["args"]
    words = command(manifest, *arguments)
    out = subprocess.run(["/bin/bash", *words[1:]], env=env, capture_output=True, text=True, check=True)
    assert shlex.split(out.stdout) == [
        *("launch/supervise.sh", "--name", "moect-1", "--address", "10.0.0.7", "--nodes", "2", "--slots", "8"),
        *("--config", *arguments),
    ]


@pytest.mark.slow
def test_kubernetes_pod_that_is_asked_to_end_does_so_with_a_checkpoint_and_trains_on_when_it_is_back(manifest, place):
    env = environment(**pod_environment(manifest) | {"NODES": "1", "RANKS_PER_NODE": "1", "OMP_NUM_THREADS": "1"})
    path = place.write(place.config(train={"steps": 600, "save_every": 600}))
    run = place.output / "run"
    pods = [subprocess.Popen(command(manifest, str(path)), env=env, cwd=REPOSITORY)]
    while not (run / "log.jsonl").is_file() or not losses(run):
        assert pods[0].poll() is None
        time.sleep(0.05)
    pods[0].terminate()  # as Kubernetes does: the first process, no other
    assert pods[0].wait(300) == 75
    stop = [line for line in events(run) if line["event"] == "stop"][0]["step"]
    pods.append(subprocess.Popen(command(manifest, str(path)), env=env, cwd=REPOSITORY))
    assert pods[1].wait(300) == 0
    assert [line["step"] for line in events(run) if line["event"] == "resume"] == [stop] and len(losses(run)) == 600
