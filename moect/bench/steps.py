"""One round of generation: every contestant through the same tokens, in turns as short as a step.

In a round each contestant reads the prompt into a new cache (prefill), then all make their first step, all their second
one, and so on (generation), in an order drawn anew each time: so what slows the machine for a while slows them alike.
A step takes the likeliest token, as greedy decoding does, and goes on with the text's own instead: all contestants
compute on the same tokens, and how many of them the gate lets through depends on the text alone.

B batch, S prompt and what follows it
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from time import perf_counter

import torch
from torch import Tensor, nn

from moect.bench.models import Contestant, floor_of


@dataclass(frozen=True)
class Taken:
    """Seconds of one contestant in one round: of its prefill, and of each step."""

    prefill: float
    steps: list[float]


def one_round(runners: dict[str, Runner | FloorRunner], new: int, draw: Random) -> dict[str, Taken]:
    """All read the prompt, then all make step after step."""
    names = list(runners)
    prefill = {name: runners[name].prefill() for name in draw.sample(names, len(names))}
    steps: dict[str, list[float]] = {name: [] for name in names}
    for n in range(new):
        for name in draw.sample(names, len(names)):
            steps[name].append(runners[name].step(n))
    return {name: Taken(prefill[name], steps[name]) for name in names}


class Runner:
    """A contestant on its way through the tokens."""

    def __init__(self, contestant: Contestant, ids_BS: Tensor, prompt: int, device: str):
        self.model, self.within = contestant.model, contestant.within
        self.ids_BS, self.prompt, self.device = ids_BS, prompt, device
        self.cache = None

    def prefill(self) -> float:
        self.cache = None
        return self._pass(self.ids_BS[:, : self.prompt], logits_to_keep=1)

    def step(self, n: int) -> float:
        return self._pass(self.ids_BS[:, self.prompt + n, None], past_key_values=self.cache)

    @torch.no_grad()
    def _pass(self, ids_BS: Tensor, **kwargs) -> float:
        with self.within():
            began = _now(self.device)
            output = self.model(ids_BS, use_cache=True, **kwargs)
            output.logits[:, -1].argmax(-1)
            taken = _now(self.device) - began
        self.cache = output.past_key_values
        return taken


class FloorRunner:
    """The floor, in the same steps."""

    def __init__(self, base: nn.Module, batch: int, prompt: int, device: str):
        self.of_prompt, self.of_step = floor_of(base, batch, prompt)
        self.device = device

    def prefill(self) -> float:
        began = _now(self.device)
        self.of_prompt()
        return _now(self.device) - began

    def step(self, n: int) -> float:
        began = _now(self.device)
        self.of_step()
        return _now(self.device) - began


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()
