"""Small real runs: a tiny base, its tokenizer and texts of two languages; trainings in process or by a launcher."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import tiny_model

import moect
from moect.config import RunConfig, config_from_dict, config_to_yaml
from moect.data.vocabulary.tokenizer import train_tokenizer

REPOSITORY = Path(moect.__file__).parents[1]
VOCABULARY = 300
WORDS = {
    "en": "one two three four five six seven hundred and thousand",
    "cy": "un dau tri pedwar pump chwech saith cant",
}
ROLES = {"en": "old", "cy": "new"}
DOCUMENTS = {"train": 120, "test": 6}


@dataclass
class Place:
    """Where a test's base and texts lie, and where its runs go."""

    inputs: Path
    output: Path

    def config(self, name: str = "run", **sections) -> RunConfig:
        """A run that takes about a second; keywords change single keys of sections, or top-level keys."""
        return config_from_dict(self.values(name, **sections))

    def values(self, name: str = "run", **sections) -> dict:
        """The same as plain values."""
        values = {
            "name": name,
            "output": str(self.output),
            "seed": 5,
            "model": {"base": str(self.inputs / "base")},
            "moe": {"fusion": "gate", "experts": 4, "top_k": 2},
            "loss": {"balance": 0.05},
            "data": {
                "root": str(self.inputs),
                "languages": ROLES,
                "train": [{"path": f"{lang}.train.jsonl", "lang": lang} for lang in ROLES],
                "evaluation": [{"path": f"{lang}.test.jsonl", "lang": lang} for lang in ROLES],
                "sequence_length": 24,
                "replay": 0.25,
            },
            "train": {
                "steps": 6,
                "batch_size": 8,
                "micro_batch": 4,
                "lr": 0.01,
                "warmup": 2,
                "eps": 1e-4,  # Adam makes steps of rounding where gradients vanish; not with this
                "precision": "fp32",
                "log_every": 1,
                "save_every": 3,
            },
            "monitor": {"enabled": False},
        }
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
        return values

    def write(self, config: RunConfig) -> Path:
        """The configuration as a file, for a launcher."""
        path = self.output / f"{config.name}.yaml"
        path.write_text(config_to_yaml(config))
        return path


def make_inputs(folder: Path) -> Path:
    """A tiny Qwen3 with a tokenizer, and texts of two languages."""
    texts = {}
    for lang, words in WORDS.items():
        for part, count in DOCUMENTS.items():
            rng = random.Random(f"{lang} {part}")
            texts[lang, part] = [" ".join(rng.choices(words.split(), k=rng.randint(2, 15))) for _ in range(count)]
            lines = (json.dumps({"text": text}) + "\n" for text in texts[lang, part])
            (folder / f"{lang}.{part}.jsonl").write_text("".join(lines))
    train_tokenizer(texts["en", "train"], VOCABULARY, folder / "base")
    tiny_model("qwen3", vocab_size=VOCABULARY, initializer_range=0.2).save_pretrained(folder / "base")
    return folder


def events(run: Path) -> list[dict]:
    """The lines of log.jsonl that tell of something other than a step."""
    return [line for line in _log(run) if "event" in line]


def figures(run: Path) -> dict[int, dict]:
    """The lines of log.jsonl by step, those that a resume superseded left out."""
    steps = {}
    for line in _log(run):
        if line.get("event") == "resume":
            steps = {step: values for step, values in steps.items() if step <= line["step"]}
        elif "event" not in line:
            steps[line["step"]] = line
    return steps


def losses(run: Path) -> list[float]:
    """The losses of all steps."""
    return [values["loss"] for _, values in sorted(figures(run).items())]


def checkpoint(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step}"


def tensors(run: Path, step: int, *kinds: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, `KIND:NAME`: of the kinds of files named, else of all."""
    paths = sorted(checkpoint(run, step).glob("*.safetensors"))
    found = {(p.stem.split("-")[0], k): t for p in paths for k, t in load_file(p).items()}
    assert {kind for kind, _ in found} == {"module", "optimizer", "trainer"}
    return {f"{kind}:{k}": t for (kind, k), t in found.items() if kind in (kinds or (kind,))}


def assert_same_bits(run: Path, other: Path, step: int) -> None:
    """Two runs have the same module, optimizer state and balance state at a step."""
    mine, theirs = tensors(run, step), tensors(other, step)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, f"{len(different)} of {len(mine)} tensors differ, first {different[0]}"
    assert any(name.startswith("optimizer:exp_avg_sq.") and tensor.any() for name, tensor in mine.items())


def start(path: Path, ranks: int = 0, *overrides: str, script: Path | None = None) -> subprocess.Popen:
    """launch/train.py, or another script, on a configuration file: on `ranks` ranks by DeepSpeed's launcher, or in a
    plain python (0)."""
    if ranks:
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    else:
        command = [sys.executable]
    command += [script or REPOSITORY / "launch" / "train.py", "--config", path, *overrides]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by trainings in this process
    env = {name: value for name, value in os.environ.items() if name not in launched}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def launch(path: Path, ranks: int = 0, *overrides: str, code: int = 0, script: Path | None = None) -> tuple[str, str]:
    """What a launched training writes to stdout and stderr; its exit code must be `code`."""
    process = start(path, ranks, *overrides, script=script)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def copy_run(run: Path, name: str) -> Path:
    """The same run's folder under another name."""
    return Path(shutil.copytree(run, run.parent / name))


def _log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
