"""A language gate that counts: what each token, and each pair of neighbours, speaks for, added up along the text.

Evidence is in nats, positive for new languages; `moect.train.gate_counts` finds it in the text that a run trains on. It
does not train: by gradient it became no better (docs/concepts.md). As it is a matter of tokens alone, the gate's value
is known before the block that decides has computed anything.

The sum is held between LOW and HIGH, so that a text may change its language: however long it was in one, a few words of
another turn the sum. A step of it is x -> clamp(x + e, LOW, HIGH), and such functions compose to functions of the same
form, so all positions are had in log2 S rounds. Evidence is rounded to GRAIN, which makes sums exact: batched, packed,
padded or cached, the gate decides the same.

B batch, S sequence, T = B·S tokens, V tokens of the base's vocabulary, P entries of the table of pairs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

LOW, HIGH = -15.0, 30.0  # nats; thresholds are probabilities, and above HIGH they cannot be told apart
GRAIN = 2.0**-10  # nats
PAIRS = 2**20  # P
NONE = -1  # instead of a token before: a text begins here
FACTORS = (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85)  # odd, below 2^63


@dataclass
class Tokens:
    """What a pass is about, for a gate that counts.

    Attributes:
        ids_BS: integers.
        mask: (B, P + S) of any dtype, 0 at padding, P tokens having come before in a cache; None: there is no padding.
    """

    ids_BS: Tensor
    mask: Tensor | None = None

    def real_BS(self, before: int) -> Tensor:
        """Which of the tokens behind so many are none of padding, bool."""
        S = self.ids_BS.shape[1]
        if self.mask is None:
            return torch.ones_like(self.ids_BS, dtype=torch.bool)
        enough = self.mask.shape[1] >= before + S
        return (self.mask[:, before : before + S] if enough else self.mask[:, -S:]).bool()


class CountingGate(nn.Module):
    """q = sigmoid(Σ_t e_t), the sum bounded, e_t = e[token t] + e[tokens t-1, t]. For `moe.gate_sees: pairs`.

    A token whose own evidence is exactly 0 was in no text, or only begins and ends texts: it speaks in no pair either.
    Pairs share the entries of their table by a hash.

    Args:
        vocab: V; tokens beyond speak in pairs only.
    """

    highest = HIGH  # logit that text can reach

    def __init__(self, vocab: int):
        super().__init__()
        self.register_buffer("of_token", torch.empty(vocab))
        self.register_buffer("of_pair", torch.empty(PAIRS))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Nothing speaks for anything: q is 1/2."""
        self.of_token.zero_()
        self.of_pair.zero_()

    def resize(self, vocab: int) -> None:
        """For another V: new tokens speak for nothing."""
        more = vocab - len(self.of_token)
        self.of_token = nn.functional.pad(self.of_token, (0, more)) if more > 0 else self.of_token[:vocab].clone()

    @torch.no_grad()
    def forward(self, tokens: Tokens, position_ids: Tensor, sums: Sums | None = None) -> Tensor:
        """The logit of q, (T,) fp32. Padding, wherever it is, changes nothing.

        Args:
            tokens: of this pass.
            position_ids: integers (B, S) or (1, S); where they are 0, a text begins.
            sums: of the passes before, if there is a cache; goes on with this one's.
        """
        device = self.of_token.device
        ids_BS = tokens.ids_BS.to(device, torch.int64)
        B, S = ids_BS.shape
        sum_B, last_B = torch.zeros(B, device=device, dtype=torch.float32), torch.full_like(ids_BS[:, 0], NONE)
        seen = sums.get_seq_length() if sums is not None else 0
        if seen:
            sum_B, last_B = sums.last(device)
        real_BS = tokens.real_BS(seen).to(device)
        place_BS = torch.where(real_BS, torch.arange(1, S + 1, device=device), 0).cummax(1).values  # of the last real
        said_BS = torch.cat([last_B[:, None], ids_BS], 1).gather(1, place_BS)
        before_BS = torch.cat([last_B[:, None], said_BS[:, :-1]], 1)
        begins_BS = (position_ids.to(device).expand(B, S) == 0) & real_BS
        before_BS = before_BS.masked_fill(begins_BS, NONE)
        e_BS = self.evidence(ids_BS, before_BS).masked_fill(~real_BS, 0)
        sums_BS = bounded_sums(e_BS, before_BS == NONE, sum_B)
        if sums is not None:
            sums.go_on(sums_BS, said_BS)
        return sums_BS.flatten()

    def evidence(self, ids: Tensor, before: Tensor) -> Tensor:
        """e of each token behind that before it, or behind NONE, in nats: fp32, of the arguments' shape."""
        of_token, speaks = self._of_token(ids)
        of_pair = self.of_pair[pair_entry(before, ids)].float()
        in_pair = (before != NONE) & speaks & self._of_token(before.clamp_min(0))[1]
        return ((of_token + of_pair.masked_fill(~in_pair, 0)) / GRAIN).round() * GRAIN

    def _of_token(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Evidence of tokens by themselves, fp32, and whether they speak at all, bool."""
        V = len(self.of_token)
        beyond = ids >= V
        of_token = self.of_token[ids.clamp_max(V - 1)].float().masked_fill(beyond, 0)
        return of_token, beyond | (of_token != 0)


def pair_entry(first: Tensor, second: Tensor) -> Tensor:
    """Where the table of pairs has two neighbours: int64 in 0 … P-1. Arguments int64, of one shape."""
    mixed = first * FACTORS[0] + second * FACTORS[1]  # modulo 2^64
    return ((mixed ^ (mixed >> 29)) * FACTORS[1] >> 40) & (PAIRS - 1)


def bounded_sums(e_BS: Tensor, starts_BS: Tensor, sum_B: Tensor) -> Tensor:
    """s_t = clamp(s_{t-1} + e_t, LOW, HIGH), with s_{t-1} = 0 where a text starts.

    Args:
        e_BS: fp32, multiples of GRAIN.
        starts_BS: bool.
        sum_B: fp32, the sum before the first position.

    Returns:
        fp32 (B, S), as exact as one after another.
    """
    reach = 2 * (HIGH - LOW)  # a farther step ends at a bound all the same
    alone_BS = e_BS.clamp(LOW, HIGH)  # a start is the function that forgets what was
    add_BS = e_BS.clamp(-reach, reach).masked_fill(starts_BS, 0)
    low_BS = torch.where(starts_BS, alone_BS, LOW)
    high_BS = torch.where(starts_BS, alone_BS, HIGH)
    shift = 1
    while shift < e_BS.shape[1]:
        add, low, high = (x_BS[:, shift:] for x_BS in (add_BS, low_BS, high_BS))
        add0, low0, high0 = (x_BS[:, :-shift] for x_BS in (add_BS, low_BS, high_BS))
        after = (
            (add0 + add).clamp(-reach, reach),
            (low0 + add).clamp(low, high),
            (high0 + add).clamp(low, high),
        )
        add_BS, low_BS, high_BS = (
            torch.cat([x_BS[:, :shift], y], 1) for x_BS, y in zip((add_BS, low_BS, high_BS), after, strict=True)
        )
        shift *= 2
    return (sum_B[:, None] + add_BS).clamp(low_BS, high_BS)


class Sums(DynamicLayer):
    """The gate's place in a cache, behind the base's layers: keys are sums, values tokens, (B, 1, S, 1) in fp32.

    A layer as others, so a cache that is cut, reordered or copied takes it along. fp32 holds tokens below 2^24.

    Args:
        first: the cache's first layer.
    """

    def __init__(self, first: CacheLayerMixin):
        super().__init__()
        self.first = first

    def prefetch(self) -> None:
        """Behind its last layer an offloaded cache fetches the first one."""
        super().prefetch()
        self.first.prefetch()

    def last(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The sum, fp32 (B,), and the token, int64 (B,), that the next pass goes on from."""
        return self.keys[:, 0, -1, 0].to(device), self.values[:, 0, -1, 0].to(device, torch.int64)

    def go_on(self, sums_BS: Tensor, said_BS: Tensor) -> None:
        """Add a pass, wherever the cache has this layer by now."""
        device = self.device if self.is_initialized else sums_BS.device
        self.update(*(x_BS[:, None, :, None].to(device, torch.float32) for x_BS in (sums_BS, said_BS)))


def sums_in(cache: Cache, blocks: int, index: int) -> Sums:
    """The gate's layer of a cache, made if there is none.

    Args:
        cache: of the base.
        blocks: of the base, each of which has a layer.
        index: of the block that decides and has not run in this pass.

    Raises:
        ValueError: the cache holds tokens that the gate did not see.
    """
    found = [layer for layer in cache.layers if isinstance(layer, Sums)]
    if not found:
        for _ in range(blocks - len(cache.layers)):  # else the base would take this layer for one of its own
            cache.layers.append(cache.layer_class_to_replicate())
        found = [Sums(cache.layers[0])]
        found[0].is_compileable = cache.is_compileable  # what is made of the mask depends on all layers' being alike
        cache.layers += found
    seen, held = found[0].get_seq_length(), int(cache.get_seq_length(index))
    if seen != held:
        raise ValueError(
            f"the cache holds {held} tokens and the language gate saw {seen} of them: begin with an empty cache, and "
            "do not mix passes with and without the module"
        )
    return found[0]
