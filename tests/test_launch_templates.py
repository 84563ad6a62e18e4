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

from moect.train.loop import train

SBATCH = REPOSITORY / "launch" / "slurm.sbatch"
KUBERNETES = REPOSITORY / "launch" / "kubernetes.yaml"
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# one task a node, side by side, and the greatest exit code; options are written down
SRUN = """
echo "$*" >>"$STUBS/srun.log"
while [[ "$1" = --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
code=0
wait $first || code=$?
wait $second || code=$?
exit $code
"""
SCONTROL = """
echo "$*" >>"$STUBS/scontrol.log"
case "$1 $2" in
    "show hostnames") printf '%s\\n' localhost node-2 ;;
    "requeue 4711") kill "$(cat "$STUBS/srun.pid")" ;;
    *) exit 1 ;;
esac
"""


def environment(**changes: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHED and not key.startswith("SLURM")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)} | changes


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
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
    env |= {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    return env | {"PATH": f"{stubs}{os.pathsep}{env['PATH']}", "MASTER_PORT": str(free_port())}


def submit(env: dict[str, str], *arguments: str | Path, cwd: str = "/") -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SBATCH, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_slurm_job_trains_on_two_nodes_from_the_last_checkpoint_that_is_there(place, cluster):
    settings = {"micro_batch": 2}
    run = train(place.config(train={**settings, "stop_after": 3}))
    path = place.write(place.config(train=settings))
    job = submit(cluster, path)
    assert job.returncode == 0, job.stdout + job.stderr
    assert [(line["step"], line["world_size"]) for line in events(run) if line["event"] == "resume"] == [(3, 2)]
    assert losses(run) == pytest.approx(losses(train(place.config("alone", train=settings))), abs=1e-4)
    assert len(losses(run)) == 6 and not list(Path(cluster["SLURM_SUBMIT_DIR"]).glob("runs/.hostfile*"))


def test_slurm_job_gives_each_node_the_launcher_with_its_own_number(cluster):
    executable(Path(cluster["STUBS"]) / "deepspeed", 'echo "$*"; cat "$2"; echo "threads $OMP_NUM_THREADS"\n')
    env = {key: value for key, value in cluster.items() if key not in ("MASTER_PORT", "OMP_NUM_THREADS")}
    job = submit(env | {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}, "my run.yaml", "train.lr=1e-3")
    hostfile = Path(env["SLURM_SUBMIT_DIR"]) / "runs" / ".hostfile-4711"
    address = "--master_addr localhost --master_port 24711"
    for node in (0, 1):
        wanted = f"--hostfile {hostfile} --no_ssh --node_rank {node} {address} launch/train.py --config my run.yaml"
        assert f"{wanted} train.lr=1e-3 resume=auto\n" in job.stdout
    assert job.stdout.count("localhost slots=4\nnode-2 slots=4\n") == 2 and job.stdout.count("threads 8\n") == 2
    assert "--kill-on-bad-exit=1" in (Path(env["STUBS"]) / "srun.log").read_text()


def test_slurm_job_is_requeued_when_its_time_is_nearly_over(cluster):
    stubs = Path(cluster["STUBS"])
    executable(stubs / "srun", 'echo $$ >"$STUBS/srun.pid"\nexec sleep 300\n')
    process = subprocess.Popen(["bash", SBATCH, "x.yaml"], env=cluster, stdout=subprocess.PIPE, text=True)
    while not (stubs / "srun.pid").is_file() or not (stubs / "srun.pid").read_text().strip():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert "requeueing job 4711" in out and process.returncode != 0
    assert (stubs / "scontrol.log").read_text().splitlines() == ["show hostnames node-[1-2]", "requeue 4711"]


def test_slurm_job_fails_as_its_training_fails(cluster):
    executable(Path(cluster["STUBS"]) / "deepspeed", "exit $((SLURM_NODEID * 2))\n")
    assert submit(cluster, "x.yaml").returncode == 2


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
def manifest() -> tuple[dict, dict]:
    """Service and Job."""
    return tuple(yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8")))


def pod(manifest) -> dict:
    return manifest[1]["spec"]["template"]["spec"]


def pod_environment(manifest) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in pod(manifest)["containers"][0]["env"]}


def test_kubernetes_pods_find_one_another(manifest):
    service, job = manifest
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    name, spec = job["metadata"]["name"], job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod(manifest)["subdomain"] == service["metadata"]["name"]
    env = pod_environment(manifest)
    assert env["MASTER_ADDR"] == f"{name}-0.{pod(manifest)['subdomain']}"
    assert env["NODES"] == str(spec["completions"])
    assert env["RANKS_PER_NODE"] == str(pod(manifest)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert all(isinstance(value, str) for value in env.values())
    volumes = {volume["name"] for volume in pod(manifest)["volumes"]}
    assert {mount["name"] for mount in pod(manifest)["containers"][0]["volumeMounts"]} == volumes


def test_kubernetes_pod_fails_as_a_whole_rather_than_coming_back_alone(manifest):
    assert manifest[1]["spec"]["backoffLimit"] == 0 and pod(manifest)["restartPolicy"] == "Never"


def command(manifest, tmp_path: Path, *arguments: str) -> list[str]:
    """The container's command, with its hostfile in this test's own folder."""
    words = [
        word.replace("/tmp/hostfile", f"{tmp_path}/hostfile") for word in pod(manifest)["containers"][0]["command"]
    ]
    return [*words, *arguments]


def test_kubernetes_pod_starts_the_launcher_with_its_own_number(manifest, tmp_path):
    executable(tmp_path / "deepspeed", 'printf "%q " "$@"; echo; cat "$2"\n')
    env = environment(**pod_environment(manifest), JOB_COMPLETION_INDEX="1") | {"MASTER_ADDR": "localhost"}
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    arguments = pod(manifest)["containers"][0]["args"]
    out = subprocess.run(command(manifest, tmp_path, *arguments), env=env, capture_output=True, text=True, check=True)
    words, *hosts = out.stdout.splitlines()
    assert hosts == ["moect-0 slots=8", "moect-1 slots=8"]
    assert shlex.split(words) == [
        *("--hostfile", f"{tmp_path}/hostfile", "--no_ssh", "--node_rank", "1", "--master_addr", "localhost"),
        *("--master_port", "29500", "launch/train.py", "--config", *arguments, "resume=auto"),
    ]


def test_kubernetes_pod_trains(manifest, place, tmp_path):
    env = environment(**pod_environment(manifest), JOB_COMPLETION_INDEX="0")
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "NODES": "1", "RANKS_PER_NODE": "1"}
    env["OMP_NUM_THREADS"] = "1"
    path = place.write(place.config())
    made = subprocess.run(
        command(manifest, tmp_path, str(path)), env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0 and "finished at step 6" in made.stdout, made.stdout + made.stderr
