"""What a run trained, as tensors by their names in the model, each made when it is asked for: no model is built.

A tensor is read, merged with what was trained of it, and rounded once to the dtype of the export.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moect.config import RunConfig
from moect.data.vocabulary.extended_tokenizer import Extension
from moect.errors import ExportError
from moect.export.targets.form import EMBEDDING, HEAD, Subject
from moect.export.weights import FolderWeights
from moect.model.append import is_appended_tensor
from moect.model.block_expansion import inserted_blocks, places, row_of_blocks
from moect.model.build import DTYPES, build_model, load_base, lora_layers, weights_folder
from moect.model.embeddings import rows_of
from moect.model.families import config_of_blocks
from moect.train.checkpoints.reading import Tensors, check_shapes, trained_tensors
from moect.train.token_rows import kept_rows

log = logging.getLogger("moect.export")
OF_ROWS = ".rows."


class TrainedModel(Mapping[str, Tensor]):
    """The tensors of a trained model, on the CPU, in the dtype that they are exported in.

    Attributes:
        subject: what the model is.
        slots: a tensor on the meta device for each name: its shape and dtype.
    """

    def __init__(self, subject: Subject, slots: dict[str, Tensor], read: Callable[[str], Tensor]):
        self.subject, self.slots, self._read = subject, slots, read

    def __getitem__(self, name: str) -> Tensor:
        slot, tensor = self.slots[name], self._read(name)
        if tensor.shape != slot.shape:
            raise ExportError(f"{name} is {tuple(tensor.shape)}, the model has {tuple(slot.shape)}; give its own base")
        return tensor.to(slot.dtype)

    def exact(self, name: str) -> Tensor:
        """A tensor as it is read, in the dtype that it trained in."""
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def of_block(self, index: int) -> list[str]:
        """The names of a block's tensors."""
        start = f"model.layers.{index}."
        return [name for name in self.slots if name.startswith(start)]

    @property
    def outside(self) -> list[str]:
        """The names of the tensors outside all blocks."""
        return [name for name in self.slots if not name.startswith("model.layers.")]


def of_run(config: RunConfig, checkpoint: Path, dtype: str, extension: Extension | None = None) -> TrainedModel:
    """What a checkpoint of a run holds, with the base of the run.

    Args:
        config: the run.
        checkpoint: its folder.
        dtype: `fp32` or `bf16`.
        extension: tokens that were added to the base's.

    Raises:
        CheckpointError: the checkpoint is not of this model.
        ExportError: the base's files cannot be read.
    """
    in_dtype = replace(config, train=replace(config.train, precision=dtype))
    model = build_model(in_dtype, meta=True, rows=kept_rows(checkpoint), extension=extension)
    trained = Tensors(checkpoint, "module")
    check_shapes(trained.shapes, {name: slot.shape for name, slot in trained_tensors(model)}, checkpoint)
    base = _base_weights(config, model)
    if config.method == "lora":
        return _merged(model, base, trained, dtype)
    if config.method == "block-expansion":
        return _in_one_row(model, base, trained, dtype)

    means = _means(model, base, trained, extension) if extension else {}

    def read(name: str) -> Tensor:
        if name in trained:
            return trained[name]
        return means[name] if name in means else base[name]

    return TrainedModel(subject_of(model, dtype), _slots(model), read)


def of_model(model: nn.Module) -> TrainedModel:
    """The tensors of a causal LM in memory, as it is, extended by `append_moe` or plain."""
    dtype = {DTYPES[name]: name for name in DTYPES}.get(model.dtype)
    if dtype is None:
        raise ExportError(f"the model is in {model.dtype}: export it in float32 or bfloat16")
    tensors = model.state_dict()
    slots = {n: torch.empty_like(t, device="meta") for n, t in _without_tied(model, tensors).items()}
    return TrainedModel(subject_of(model, dtype), slots, lambda name: tensors[name].cpu())


def fold_rows(trained: TrainedModel, exact: bool = False) -> TrainedModel:
    """The same model with rows of tokens added to embedding and head, for architectures that know of no such rows.

    Logits agree to rounding, W + d being rounded where W·h and d·h were; `exact`: rounded to fp32 only.
    """
    subject, counts = trained.subject, trained.subject.rows
    if not counts:
        return trained
    base = copy.deepcopy(subject.base)
    base.vocab_size += counts["added_tokens"]
    places = {name for name in (EMBEDDING, HEAD) if name in trained.slots}
    slots = {n: t for n, t in trained.slots.items() if OF_ROWS not in n}
    for name in places:
        kind = torch.float32 if exact else slots[name].dtype
        slots[name] = slots[name].new_empty(base.vocab_size, slots[name].shape[1], dtype=kind)

    def read(name: str) -> Tensor:
        if name not in places:
            return trained[name]
        ids_U, delta_UD = (trained[name.replace(".weight", f"{OF_ROWS}{part}")] for part in ("ids", "delta"))
        wide_VD = torch.zeros(slots[name].shape, dtype=torch.float32)
        weight_VD = trained[name]
        wide_VD[: len(weight_VD)] = weight_VD.float()
        return wide_VD.index_add_(0, ids_U, delta_UD.float())

    return TrainedModel(replace(subject, base=base, rows=None), slots, read)


def subject_of(model: nn.Module, dtype: str) -> Subject:
    """What a model is, as `build_model` makes it, the meta device being enough, when it is written in `dtype`."""
    base, rows = copy.deepcopy(getattr(model.config, "base_config", model.config)), rows_of(model)[:1]
    if inserted_blocks(model):
        base = config_of_blocks(base, row_of_blocks(model))
    base.vocab_size = model.model.embed_tokens.num_embeddings
    base.dtype = DTYPES[dtype]
    counts = [{"rows": len(r.ids), "added_tokens": r.added, "spare_tokens": r.spare} for r in rows]
    return Subject(base, getattr(model, "moe_config", None), dtype, counts[0] if counts else None)


def _slots(model: nn.Module) -> dict[str, Tensor]:
    return _without_tied(model, model.state_dict())


def _without_tied(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head is the embedding: it is no tensor of its own."""
    tied = model.config.get_text_config().tie_word_embeddings
    return {name: tensor for name, tensor in tensors.items() if not (tied and name == HEAD)}


def _means(model: nn.Module, base: Mapping, trained: Mapping, extension: Extension) -> dict[str, Tensor]:
    """Rows of added tokens that did not train: no checkpoint holds them, they are the means of their pieces."""
    means = {}
    for name in (EMBEDDING, HEAD):
        delta = name.replace(".weight", f"{OF_ROWS}delta")
        if delta in model.state_dict() and delta not in trained:
            rows = copy.deepcopy(model.get_submodule(name.removesuffix(".weight")).rows).to_empty(device="cpu")
            rows.reset(trained[delta.replace("delta", "ids")])
            rows.start_from_pieces(base[name].to(rows.delta.dtype), extension.first_id, extension.pieces)
            means[delta] = rows.delta.detach()
    return means


def _base_weights(config: RunConfig, model: nn.Module) -> Mapping[str, Tensor]:
    """The base's tensors by name: in its files, or made anew where it has none."""
    if config.model.from_config is not None:
        return load_base(config.model, DTYPES[config.train.precision], config.seed).state_dict()
    weights = FolderWeights(weights_folder(config.model))
    known = {name.replace(".base_layer.", ".") for name in model.state_dict()}
    if unknown := sorted(weights.keys() - known):
        log.warning("%s: %d tensors are none of the model's, first %s", weights.folder, len(unknown), unknown[0])
    if config.method != "full" and (missing := sorted(n for n in known if _of_base(n, model) and n not in weights)):
        raise ExportError(
            f"{weights.folder}: has no tensor named {missing[0]}; load the base with transformers and save it anew"
        )
    if (
        model.config.tie_word_embeddings
        and {HEAD, EMBEDDING} <= weights.keys()
        and not torch.equal(weights[HEAD], weights[EMBEDDING])
    ):
        raise ExportError(f"{weights.folder}: config.json ties head and embedding, and the files have two; mend either")
    return weights


def _of_base(name: str, model: nn.Module) -> bool:
    """Whether the tensor of this name has to be among the base's."""
    tied = name == HEAD and model.config.tie_word_embeddings
    return not tied and not is_appended_tensor(name) and ".lora_" not in name


def _merged(model: nn.Module, base: Mapping, trained: Mapping, dtype: str) -> TrainedModel:
    """Low-rank updates added to the weights, in fp32: W + (alpha / r) B A."""
    layers = {name: layer for name, layer in model.named_modules() if layer in lora_layers(model)}
    subject = subject_of(model, dtype)

    def read(name: str) -> Tensor:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            return base[name]
        A_RD, B_FR = (trained[f"{name.removesuffix('.weight')}.lora_{x}.default.weight"] for x in "AB")
        return base[name].float() + (B_FR @ A_RD) * layer.scaling["default"]

    plain = {n.replace(".base_layer.", "."): t for n, t in _slots(model).items() if ".lora_" not in n}
    return TrainedModel(subject, plain, read)


def _in_one_row(model: nn.Module, base: Mapping, trained: Mapping, dtype: str) -> TrainedModel:
    """Inserted blocks between those of the base: a model of the base's family with more blocks."""
    place, slots, here = places(model), {}, {}
    for name, slot in _slots(model).items():
        start = max((s for s in place if name.startswith(s)), key=len, default="")
        there = place.get(start, "") + name.removeprefix(start)
        slots[there], here[there] = slot, name
    read = lambda name: (trained if here[name] in trained else base)[here[name]]  # noqa: E731
    return TrainedModel(subject_of(model, dtype), slots, read)
