"""Our dispatch as an experts implementation of transformers, for the stock mixture-of-experts models.

    import moect
    AutoModelForCausalLM.from_pretrained(DIR, experts_implementation="moect")

T tokens, K experts per token, D width
"""

from __future__ import annotations

from torch import Tensor, nn

from moect.dispatch.registry import dispatch
from moect.errors import DispatchError

NAME = "moect"


def moect_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module of transformers.

    Args:
        self: holds gate_up_proj (E, 2F, D), gate rows first, and down_proj (E, D, F).
        hidden_states: (T, D).
        top_k_index: int64 (T, K).
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of hidden_states.

    Raises:
        DispatchError: experts of another kind, which our kernels do not compute.
    """
    if reason := _unsupported(self):
        raise DispatchError(
            f"{type(self).__name__}: experts_implementation `{NAME}` computes SwiGLU experts only, and {reason}; "
            "use `grouped_mm`"
        )
    return dispatch(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


def _unsupported(experts: nn.Module) -> str | None:
    """Why these experts are not sum_k w_k down (silu(gate x) * up x); None where they are."""
    if not experts.has_gate:
        return "these have no gate"
    if experts.has_bias:
        return "these have biases"
    if experts.has_post_expert_norm:
        return "these have a norm behind them"
    if experts.is_transposed or not experts.is_concatenated:
        return "these keep their weights in another layout"
    if type(experts)._apply_gate.__module__ != "transformers.integrations.moe":
        return "these have a gate of their own"
    if not _is_silu(experts.act_fn):
        return f"these use {type(experts.act_fn).__name__}"
    if experts._is_expert_parallel:
        return "these are divided among devices"
    return None


def _is_silu(activation) -> bool:
    from transformers.activations import ACT2FN

    return isinstance(activation, nn.SiLU | type(ACT2FN["silu"])) or activation is nn.functional.silu
