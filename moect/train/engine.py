"""DeepSpeed around the objective: optimizer, precision, ZeRO stage."""

from __future__ import annotations

import logging

import torch
from torch import nn

from moect.config import TrainConfig
from moect.errors import ConfigError
from moect.model.moe_ffn import MoEFFN
from moect.model.partition import full_shape
from moect.train import state
from moect.train.objective import Objective

BUCKET = 500_000_000  # numbers that ranks exchange at once, at most; DeepSpeed's default


def make_engine(objective: Objective, train: TrainConfig, world_size: int):
    """A DeepSpeed engine for what has `requires_grad` in the objective.

    Raises:
        ConfigError: nothing trains.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    groups = _parameter_groups(objective, train)
    if train.activation_checkpointing:
        objective.model.activation_checkpointing_enable({"use_reentrant": False})
    if train.zero_stage == 3 and objective.modules_L:
        _fetch_modules_whole(objective)
    # learning rate 0 until the loop sets it: before that, steps are taken to allocate the optimizer's state
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=tuple(train.betas), eps=train.eps, fused=torch.cuda.is_available()
    )
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        model_parameters=[p for group in groups for p in group["params"]],
        config=deepspeed_config(train, world_size, sum(full_shape(p).numel() for g in groups for p in g["params"])),
    )
    state.wake_optimizer(engine)
    return engine


def deepspeed_config(train: TrainConfig, world_size: int, trains: int = BUCKET) -> dict:
    """The DeepSpeed settings that a training configuration means, with `trains` numbers that train."""
    settings = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.batch_size // (train.micro_batch * world_size),
        # without ZeRO in fp32 it clips without keeping the norm: the loop does it
        "gradient_clipping": 0.0 if clips_itself(train) else train.clip,
        "bf16": {"enabled": train.precision == "bf16"},
        # DeepSpeed allocates the whole bucket, however little there is to go through it
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": min(BUCKET, trains)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # the loop prints
        "wall_clock_breakdown": False,
    }
    if train.zero_stage or train.precision == "fp32":  # DeepSpeed has no fp32 accumulation for bf16 without ZeRO
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def clips_itself(train: TrainConfig) -> bool:
    """Whether the loop computes and clips the gradient's norm, which DeepSpeed does elsewhere."""
    return train.zero_stage == 0 and train.precision == "fp32"


def _fetch_modules_whole(objective: Objective) -> None:
    """Make each appended module one unit for ZeRO-3.

    A gate may leave one rank's experts idle and another's not: fetched piece by piece, the ranks would wait for one
    another forever. DeepSpeed collects the gradients of such a unit when those of its inputs are there. In the lowest
    block no input wants a gradient, everything below being frozen, and it would collect zeros before the real ones
    are computed (0.19.8): so let the residual stream want one.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(objective, [MoEFFN])

    def want_gradient(module, args):
        if torch.is_grad_enabled() and not args[0].requires_grad:
            args[0].requires_grad_()

    objective.modules_L[0].register_forward_pre_hook(want_gradient)


def _parameter_groups(objective: nn.Module, train: TrainConfig) -> list[dict]:
    """Weight decay on matrices, none on vectors."""
    trainable = [p for p in objective.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("nothing trains with this configuration: check `method` and what it selects")
    groups = [
        {"params": [p for p in trainable if len(full_shape(p)) >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if len(full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
