"""What trains, out of DeepSpeed and back into it, in a form that knows no ranks and no ZeRO stage.

Per trainable parameter three fp32 tensors of its full shape: the master weight and AdamW's two moments. Where DeepSpeed
0.19 keeps them:

    ZeRO 1, 2, 3                 in pieces over the ranks; reached through safe_get_full_* and safe_set_full_*
    no ZeRO, bf16                fp32_groups of the optimizer, whole on each rank
    no ZeRO, fp32                the parameter itself, and the state of torch's optimizer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moect.model.partition import full_shape
from moect.train.checkpoints.reading import carried_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable_parameters(engine) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that train, by their names in the causal LM."""
    for name, parameter in engine.module.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def owners(engine, world_size: int) -> dict[str, int]:
    """The rank that writes each trainable parameter, so that all write about as much."""
    sizes = {name: full_shape(p).numel() for name, p in trainable_parameters(engine)}
    load, owner = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable: the same on every rank
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def gather(engine, keep: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masters and moments on the CPU: `NAME`, and `exp_avg.NAME` and `exp_avg_sq.NAME`.

    Every rank must call it, and gets copies of those whose NAME it keeps; of the others one at a time passes through.
    """
    access = _access(engine)
    masters, moments = {}, {}
    for name, parameter in trainable_parameters(engine):
        for key in (None, *MOMENTS):
            value = access.get(parameter, key)
            if keep(name):
                copied = value.detach().to("cpu", torch.float32, copy=True)
                if key is None:
                    masters[name] = copied
                else:
                    moments[f"{key}.{name}"] = copied
    return masters, moments


@torch.no_grad()
def carried(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU, in fp32 where they are of floats, of what a checkpoint holds and no optimizer moves."""
    copies = {}
    for name, tensor in carried_tensors(model):
        with _whole(tensor):
            copied = tensor.detach().to("cpu", copy=True)
            copies[name] = copied.float() if copied.is_floating_point() else copied
    return copies


@torch.no_grad()
def put_carried(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `carried` took."""
    for name, tensor in carried_tensors(model):
        with _whole(tensor, writing=True):
            tensor.copy_(tensors[name])


def _whole(tensor: Tensor, writing: bool = False):
    """A context in which a tensor that ZeRO 3 has divided is there; every rank enters it."""
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([tensor], modifier_rank=0 if writing else None)


@torch.no_grad()
def scatter(engine, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Put back what `gather` took on all ranks, after `steps` optimizer steps.

    The optimizer must hold state already, as `make_engine` leaves it.
    """
    access = _access(engine)
    for name, parameter in trainable_parameters(engine):
        for key in (None, *MOMENTS):
            access.set(parameter, key, tensors[name if key is None else f"{key}.{name}"].to(engine.device))
    access.refresh()
    for state in torch_optimizer(engine).state.values():
        if "step" in state:
            state["step"].fill_(steps)
    engine.global_steps = steps
    engine.global_samples = steps * engine.train_batch_size()
    engine.micro_steps = steps * engine.gradient_accumulation_steps()


@torch.no_grad()
def wake_optimizer(engine) -> None:
    """Let torch allocate the optimizer's state, as it is before the first step; the learning rate must be 0.

    Else the first step would allocate it, which may be left out, and it is needed to put a checkpoint back. A step with
    gradients of zero, one tensor at a time.
    """
    optimizer = torch_optimizer(engine)
    groups, inner = optimizer.param_groups, engine.optimizer
    held = [(group, p) for group in groups for p in group["params"]]
    if hasattr(inner, "fp32_partitioned_groups_flat"):  # ZeRO 3 lends the optimizer each of these at a step
        held = [(groups[inner.sub_group_to_group_id[i]], p) for i, p in enumerate(inner.fp32_partitioned_groups_flat)]
    before = [group["params"] for group in groups]
    for group in groups:
        group["params"] = []
    for group, p in held:
        grad, p.grad = p.grad, torch.zeros_like(p)
        group["params"] = [p]
        optimizer.step()
        group["params"], p.grad = [], grad
    for group, parameters in zip(groups, before, strict=True):
        group["params"] = parameters
    for state in optimizer.state.values():
        state["step"].zero_()  # also of the step that DeepSpeed may have taken for the same reason


def set_learning_rate(engine, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def _access(engine):
    if engine.zero_optimization():
        return _Partitioned(engine)
    return _Replicated(engine)


class _Partitioned:
    """ZeRO 1, 2 and 3."""

    def __init__(self, engine):
        self.optimizer = engine.optimizer
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            # ZeRO 1 and 2 link parameters to their moments at the first step of the first parameter group, when later
            # groups have none yet: link again, with all of them there
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def get(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)

    def set(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if hasattr(parameter, "ds_id"):
            self._set_own_piece(parameter, key, value)
        elif key:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)

    def _set_own_piece(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """ZeRO 3: equal pieces of the flattened tensor, the last one padded. (safe_set_full_* of DeepSpeed 0.19 fails
        where a tensor does not divide by the ranks.)"""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = -(-value.numel() // dist.get_world_size())
        padding = size * dist.get_world_size() - value.numel()
        piece = nn.functional.pad(value.flatten(), (0, padding)).narrow(0, size * dist.get_rank(), size)
        if key:
            safe_set_local_optimizer_state(parameter, piece, key)
        else:
            safe_set_local_fp32_param(parameter, piece)

    def refresh(self) -> None:
        """Carry the masters to the copies that the forward pass uses."""
        if hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()
        else:  # ZeRO 3 has no public call for it
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if kept_whole := self.optimizer.persistent_parameters:  # small ones, whole since the last step
                kept_whole[0].partition(kept_whole)
                kept_whole[0].all_gather(kept_whole)


class _Replicated:
    """No ZeRO: everything whole on each rank."""

    def __init__(self, engine):
        optimizer = engine.optimizer
        self.state = torch_optimizer(engine).state
        self.masters = {}
        if hasattr(optimizer, "fp32_groups"):
            for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                self.masters.update(zip(low, full, strict=True))

    def get(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        master = self.masters.get(parameter, parameter)
        return self.state[master][key] if key else master

    def set(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        self.get(parameter, key).copy_(value)

    def refresh(self) -> None:
        """Carry the masters to the copies that the forward pass uses."""
        for parameter, master in self.masters.items():
            parameter.copy_(master)


def torch_optimizer(engine) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed has wrapped."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
