"""What the tests of moect.export share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import disturb, tiny_model

import moect
from moect.export.folder import export_model
from moect.export.run import ExportOptions
from moect.export.run import export_run as write_run
from moect.model import MoeConfig, append_moe, modules_of

REPOSITORY = Path(moect.__file__).parents[1]


def extended(family="llama", variant=None, dtype=torch.float32, **changes):
    """A tiny model whose module does something, the selection bias included."""
    # wide weights: greedy text that does not get stuck on one token
    model = append_moe(tiny_model(family, dtype=dtype, initializer_range=0.2, **changes), MoeConfig(**(variant or {})))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # transformers begins with norms of one and biases of nothing, which hide where they go
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    disturb(model, scale=0.3)
    for moe in modules_of(model):
        if moe.router.selection_bias is not None:
            moe.router.selection_bias.copy_(torch.linspace(-0.3, 0.3, moe.num_experts))
    return model.eval()


def exported(model, folder):
    """The model, exported in our own class without a tokenizer."""
    export_model(model, folder, "moect")
    return folder


def python(code: str, *arguments, cwd: Path, isolated: bool = False) -> str:
    """What a fresh interpreter prints; `isolated`: without moect in reach."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(cwd / "modules")
    if not isolated:
        env["PYTHONPATH"] = str(REPOSITORY)
    flags = ["-I"] if isolated else []
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def export_run(run: Path, checkpoint: str | None = None, output: Path | None = None, **options) -> Path:
    """The folder that `moect export` writes."""
    return write_run(run, ExportOptions(checkpoint, output, **options)).folder
