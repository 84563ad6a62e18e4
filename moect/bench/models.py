"""Who takes part in `moect bench generate`: a base, the same base with a module in it, and a stock mixture.

Base and extended model hold the same tensors, so that none of them has more luck with where its weights lie. The floor
is the base's matrix products and nothing else: no attention, no norms, no cache.

T tokens, B batch, S prompt, N new tokens, L blocks, D width, F FFN width, V vocabulary, E experts, K experts per token
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moect.bench.cases import DTYPES
from moect.errors import ConfigError

FAR = 1e4  # the language gate's logit, one way or the other, far beyond what its weights can move
HEAD_DIM = 64
BASE, FLOOR = "base", "floor"
CLOSED, OPEN, BASE_ONLY = "gate closed", "gate open", "base_only()"
AS_IS, STOCK = "gate as it decides", "glm4_moe (stock)"


class Shape(NamedTuple):
    """A base like Qwen3-0.6B in its proportions, and what is appended to each of its blocks."""

    L: int
    D: int
    F: int
    V: int
    E: int
    K: int
    width: int

    def __str__(self) -> str:
        return ",".join(map(str, self))

    @property
    def weights(self) -> int:
        """Numbers in base, module and stock mixture together, roughly."""
        block, experts = 6 * self.D**2 + 3 * self.D * self.F, 3 * self.E * self.D * self.width
        return 2 * (self.L * (block + experts) + self.V * self.D) + self.D**2


LAPTOP = Shape(8, 512, 1536, 32768, 4, 2, 1536)


@dataclass(frozen=True)
class Contestant:
    """A model, how it is set while it is timed, and what a step of it reads.

    Attributes:
        step_bytes: weights that the matrix products of one step for B tokens read, in bytes; where experts take part,
            those of min(E, B·K) of them in each block, the most that B tokens can call for.
    """

    name: str
    model: nn.Module
    within: Callable[[], AbstractContextManager]
    step_bytes: int


def parse_shape(text: str) -> Shape:
    """`L,D,F,V,E,K,W` as a shape.

    Raises:
        ConfigError: not seven positive whole numbers, widths that cannot be, or K above E.
    """
    try:
        shape = Shape(*map(int, text.split(",")))
    except (ValueError, TypeError):
        shape = None
    if shape is None or min(shape) < 1:
        raise ConfigError(f"--shape {text}: expected L,D,F,V,E,K,W, seven whole numbers from 1, as in {LAPTOP}")
    if shape.D % HEAD_DIM:
        raise ConfigError(f"--shape {text}: the width D={shape.D} must be a multiple of {HEAD_DIM}")
    if shape.width % 8:
        raise ConfigError(f"--shape {text}: experts of width W={shape.width}; the kernels need a multiple of 8")
    if shape.K > shape.E:
        raise ConfigError(f"--shape {text}: a token goes to K={shape.K} experts, but there are E={shape.E}; lower K")
    return shape


def random_contestants(shape: Shape, dtype: str, device: str, batch: int, seed: int) -> list[Contestant]:
    """All that can be made from a shape, with random weights: base, gate closed and open, base only, stock mixture."""
    from transformers import AutoConfig, AutoModelForCausalLM, Glm4MoeConfig

    from moect.model.configuration_moect import MoectConfig
    from moect.model.modeling_moect import MoectForCausalLM
    from moect.moe_config import MoeConfig

    same = {
        "hidden_size": shape.D,
        "num_hidden_layers": shape.L,
        "num_attention_heads": 2 * shape.D // HEAD_DIM,
        "num_key_value_heads": shape.D // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "vocab_size": shape.V,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    make = AutoModelForCausalLM.from_config
    base = make(AutoConfig.for_model("qwen3", intermediate_size=shape.F, **same), dtype=DTYPES[dtype])
    moe = MoeConfig(fusion="add", language_gate=True, experts=shape.E, top_k=shape.K, width=shape.width)
    config = MoectConfig(base_config=base.config, moe=asdict(moe), dtype=DTYPES[dtype])
    extended = MoectForCausalLM._from_config(config)
    _share_base(base, extended, base)
    for block in extended.model.layers:  # they start silent, and what is silent could be left out
        nn.init.normal_(block.moe.experts.down_proj, std=0.02)
    stock = Glm4MoeConfig(
        intermediate_size=shape.F,
        moe_intermediate_size=shape.width,
        n_routed_experts=shape.E,
        num_experts_per_tok=shape.K,
        n_shared_experts=-(-shape.F // shape.width),
        first_k_dense_replace=0,
        use_qk_norm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        **same,
    )
    mixture = make(stock, dtype=DTYPES[dtype])
    for model in (base, extended, mixture):
        model.to(device).eval()
    return [
        *_of_pair(base, extended, batch, decides=False),
        Contestant(STOCK, mixture, nullcontext, _stock_bytes(mixture, shape, batch)),
    ]


def exported_contestants(folder: Path, dtype: str | None, device: str, batch: int) -> list[Contestant]:
    """An exported model as it is, with its gate forced shut and open, base only, and its base as the stock class.

    Raises:
        ConfigError: there is none, it cannot be loaded, or it is not of moect's own class.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    import moect  # noqa: F401  (its classes are then known to transformers)

    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {folder}: no exported model there (no config.json); make one with moect export RUN")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "moect":
            raise ConfigError(
                f"--model {folder}: a `{config.model_type}`, which holds no base to time beside it; "
                "give an export in moect's own class"
            )
        extended = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype] if dtype else "auto", use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"--model {folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
    for parameter in extended.parameters():  # what is mapped from a file lies at odd addresses and in small pages
        parameter.data = parameter.data.clone()
    base_config = copy.deepcopy(extended.config.base_config)
    base_config.vocab_size = extended.model.embed_tokens.num_embeddings  # without tokens that were added
    with no_init_weights():
        base = AutoModelForCausalLM.from_config(base_config, dtype=extended.dtype)
    _share_base(extended, base, base)
    for model in (base, extended):
        model.to(device).eval()
    return _of_pair(base, extended, batch, decides=True)


def floor_of(base: nn.Module, batch: int, prompt: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The base's matrix products alone, on inputs that are there: of a prompt (its head at the end only), of a step."""
    head = base.lm_head.weight
    weights = [p for n, p in base.model.layers.named_parameters() if p.dim() == 2]
    inputs = {
        (rows, width): head.new_ones(rows, width)
        for rows in {batch * prompt, batch}
        for width in {w.shape[1] for w in (*weights, head)}
    }

    def products(rows: int) -> None:
        for weight in weights:
            nn.functional.linear(inputs[rows, weight.shape[1]], weight)
        nn.functional.linear(inputs[batch, head.shape[1]], head)

    return torch.no_grad()(lambda: products(batch * prompt)), torch.no_grad()(lambda: products(batch))


@torch.no_grad()
def share_let_through(contestant: Contestant, ids_BS: Tensor) -> float:
    """The share of these tokens that the contestant's language gate lets through."""
    from moect.model.record import ForwardRecord

    record = ForwardRecord()
    with contestant.within():
        contestant.model(ids_BS, use_cache=False, logits_to_keep=1, moect_record=record)
    return record.open_T.float().mean().item()


def _of_pair(base: nn.Module, extended: nn.Module, batch: int, decides: bool) -> list[Contestant]:
    """The base and what can be made of the extended model by setting its gate; `decides`: also as it is."""
    from moect.model.append import modules_of
    from moect.model.embeddings import rows_of

    plain = _bytes(base.model.layers.parameters()) + base.lm_head.weight.nbytes
    modules, rows = modules_of(extended), rows_of(extended)
    gates = [m.language_gate for m in modules if m.language_gate is not None]
    gate = sum(_bytes(g.parameters()) for g in gates)
    experts = sum(
        m.router.weight.nbytes
        + _bytes(m.experts.parameters()) * min(m.num_experts, batch * m.config.top_k) // m.num_experts
        + _bytes(m.fusion.parameters())
        for m in modules
    )
    gate += rows[-1].delta.nbytes if rows else 0  # they come with the head, whatever the gate says
    found = [Contestant(BASE, base, nullcontext, plain)]
    if decides or not gates:
        found.append(Contestant(AS_IS if gates else "experts", extended, nullcontext, plain + gate + experts))
    if gates:
        found.append(Contestant(CLOSED, extended, lambda: _forced(gates[0], -FAR), plain + gate))
        found.append(Contestant(OPEN, extended, lambda: _forced(gates[0], FAR), plain + gate + experts))
    found.append(Contestant(BASE_ONLY, extended, extended.base_only, plain))
    return found


@contextmanager
def _forced(gate: nn.Module, logit: float):
    handle = gate.register_forward_hook(lambda module, args, logit_T: torch.full_like(logit_T, logit))
    try:
        yield
    finally:
        handle.remove()


def _share_base(source: nn.Module, target: nn.Module, base: nn.Module) -> None:
    """Let `target` hold the very tensors that `source` has under the names of `base`, which is one of the two."""
    names = {name for name, _ in base.named_parameters()}
    tensors = {name: tensor for name, tensor in source.named_parameters() if name in names}
    assert tensors.keys() == names
    target.load_state_dict(tensors, strict=False, assign=True)
    target.tie_weights()


def _stock_bytes(mixture: nn.Module, shape: Shape, batch: int) -> int:
    total = 0
    for name, parameter in mixture.model.layers.named_parameters():
        called = min(shape.E, batch * shape.K)
        total += (
            parameter.nbytes * called // shape.E if ".experts." in name and parameter.dim() == 3 else parameter.nbytes
        )
    return total + mixture.lm_head.weight.nbytes


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters)
