"""Load what was written and hold it against the model it was written from. An export that was not verified is not one.

B batch, S sequence
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from moect.errors import ExportError
from moect.model.append import is_appended, modules_of

BOUND = 1e-5


def verify(folder: Path, model: nn.Module, ids_BS: Tensor, bound: float = BOUND) -> float:
    """Account for every tensor of the folder, reload it through transformers, and compare logits.

    Args:
        folder: a Hugging Face folder.
        model: what it was written from, in the dtype it was written in, in evaluation mode.
        ids_BS: int64, tokens to compare logits on.
        bound: greatest difference of a logit that passes.

    Returns:
        The greatest difference of a logit.

    Raises:
        ExportError: a tensor is missing, left over or another, or a logit differs by more than the bound.
    """
    check_tensors(folder, model)
    difference = greatest_difference(_reload(folder, model), model, ids_BS)
    if not difference <= bound:  # this way round: NaN fails
        raise ExportError(
            f"{folder}: reloaded, its logits differ by {difference:.2e} (bound {bound:.0e}); please report"
        )
    return difference


def check_tensors(folder: Path, model: nn.Module) -> None:
    """Every tensor of the model is in the folder's safetensors files, bit for bit, and nothing else is.

    Of tensors that share memory (tied embeddings) one is enough.

    Raises:
        ExportError: names the first tensor for which this does not hold.
    """
    expected = model.state_dict()
    written: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name not in expected:
                    raise ExportError(f"{path}: holds {name}, which the model does not have")
                if name in written:
                    raise ExportError(f"{path}: holds {name} a second time")
                if not _same_bits(file.get_tensor(name), expected[name].cpu()):
                    raise ExportError(f"{path}: {name} is not what the model has")
                written.add(name)
    there = {expected[name].data_ptr() for name in written}
    missing = [name for name, t in expected.items() if name not in written and t.data_ptr() not in there]
    if missing:
        raise ExportError(f"{folder}: {len(missing)} tensors of the model are missing, first {missing[0]}")


def greatest_difference(a: nn.Module, b: nn.Module, ids_BS: Tensor) -> float:
    """The greatest difference of a logit between two causal LMs on the same tokens, both computing in fp32."""
    return (_fp32_logits(a, ids_BS) - _fp32_logits(b, ids_BS)).abs().max().item()


@torch.no_grad()
def _fp32_logits(model: nn.Module, ids_BS: Tensor) -> Tensor:
    # copies even of fp32: weights mapped from a file lie at odd addresses, where matrix products round differently
    weights = {name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters()}
    return functional_call(model, weights, ids_BS.to(model.device), {"use_cache": False}).logits.cpu()


def _reload(folder: Path, model: nn.Module) -> nn.Module:
    from transformers import AutoModelForCausalLM

    loader = AutoModelForCausalLM if is_appended(model) else type(model)
    reloaded, report = loader.from_pretrained(
        folder,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ExportError(
                f"{folder}: transformers reports {kind.replace('_', ' ')}, first {sorted(report[kind])[0]}"
            )
    for ours, theirs in zip(modules_of(reloaded), modules_of(model), strict=True):
        ours.experts.backend = theirs.experts.backend  # other kernels round otherwise
    return reloaded.to(model.device)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
