"""Rows of embedding and head that train, beside matrices that do not: for tokens the base hardly knows, or never had.

The base's matrices W stay as they are. A chosen token i has a row of differences d_i of its own, zero at the start:

    embedding    W[i] + d_i
    logit        h·W_i + d_i·h            tied embeddings: one d for both; untied: one each

so at the start the model computes what it computed before, bit for bit. A token that was added to the vocabulary has no
row in W, and d_i is all of it; it starts as the mean of the rows of the pieces that its text was cut into before.

With a language gate the rows of tokens that the base has follow the token's gate value q, as the experts do. The gate
decides by the base's own embeddings, so d_i cannot come before it: it is added to the residual stream in the block
where the gate decides, beside the experts' output e (or to its input, by a gate that counts tokens and knows q by
then), and to the logits:

    block        r + f + q (e + d_i)

                     token with a row in W      added token, beyond W
    in training      h·W_i + q d_i·h            d_i·h + log q
    hard, q open     h·W_i + d_i·h              d_i·h
    hard, q closed   h·W_i, the base's bits     d_i·h + log q

The embedding of an added token is d_i whatever the gate says: there is no other. Its probability is scaled by q. It is
not zero even where the gate is closed: old text, cut by the extended tokenizer, holds added tokens too, and no text may
be impossible.

A token that old text never has needs no gate to tell: it opens the gate by itself, and its row counts from the
embedding on. Old text does not notice, and a script that the base does not know is learned as if there were no gate.

U rows, of tokens `ids`, ascending, some of which open the gate; V rows of the base; A added tokens beyond it; B batch,
S sequence, D width; N positions of which logits are wanted
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from moect.errors import ConfigError
from moect.model.record import RECORD, ForwardRecord
from moect.moe_config import MoeConfig


class TokenRows(nn.Module):
    """The differences of U rows, `delta` (U, D), of the tokens `ids` (U,) int64; with a language gate also which of
    them open it, `opens` (U,) uint8.

    Args:
        count: U.
        width: D.
        base_rows: V, rows of the base's matrix.
        added: A, the last of the tokens, which have no row there.
        spare: how many before these were added too, to rows of the base's matrix that its tokenizer left unused.
        config: of the appended module; its gate threshold counts here too.
    """

    def __init__(self, count: int, width: int, base_rows: int, added: int, spare: int, config: MoeConfig):
        super().__init__()
        self.base_rows, self.added, self.spare, self.config = base_rows, added, spare, config
        self.enabled = True
        self.delta = nn.Parameter(torch.empty(count, width))
        self.register_buffer("ids", torch.empty(count, dtype=torch.int64))
        if config.language_gate:
            self.register_buffer("opens", torch.empty(count, dtype=torch.uint8))

    @torch.no_grad()
    def reset(self, ids_U: Tensor | None = None, opening: Collection[int] = ()) -> None:
        """Start as the base's rows; added tokens with rows of zeros.

        Args:
            ids_U: the tokens; None: the first of the base, and the added ones.
            opening: those that open the language gate.
        """
        if ids_U is None:
            inside = len(self.ids) - self.added
            ids_U = torch.cat([torch.arange(inside), torch.arange(self.base_rows, self.base_rows + self.added)])
        self.ids.copy_(ids_U)
        self.delta.zero_()
        if self.config.language_gate:
            self.opens.copy_(torch.isin(ids_U.cpu(), torch.tensor(sorted(opening), dtype=torch.int64)))

    @torch.no_grad()
    def start_from_pieces(self, weight_VD: Tensor, first_id: int, pieces: list[list[int]]) -> None:
        """Let the rows of tokens `first_id` … be the means of the base's rows of their pieces, taken in fp32."""
        slots = torch.searchsorted(self.ids, torch.arange(first_id, first_id + len(pieces), device=self.ids.device))
        for token, (slot, old) in enumerate(zip(slots.tolist(), pieces, strict=True), start=first_id):
            row_D = weight_VD[old].float().mean(0)
            if token < self.base_rows:  # one of the base's spare rows
                row_D = row_D - weight_VD[token].float()
            self.delta[slot] = row_D.to(self.delta.dtype)

    @property
    def late(self) -> bool:
        """Whether differences of the base's own tokens come after the gate."""
        return self.config.language_gate

    def opened_by(self, tokens: Tensor) -> Tensor:
        """Whether each token, int64 (…), opens the language gate by itself: bool (…)."""
        return self._has(tokens, self._slots(tokens), self.opens.bool())

    def forward(
        self,
        base: Tensor | None = None,
        tokens: Tensor | None = None,
        hidden_ND: Tensor | None = None,
        gate_logit_N: Tensor | None = None,
    ) -> Tensor:
        """Change what the base computes.

        Args:
            base: embeddings of `tokens`, (…, D), or logits of `hidden_ND`, (N, V). None: what is wanted is what comes
                after the gate.
            tokens: int64 (…); the embeddings of added ones are whatever.
            hidden_ND: last hidden states, after the final norm.
            gate_logit_N: the language gate before its sigmoid, fp32; None without one.

        Returns:
            Embeddings (…, D), or logits (N, V + A); or what is to be added where the gate is open, (…, D).
        """
        if base is None:
            return self._rows_of(tokens, ~self._early_U())
        if tokens is not None:
            return self._embeddings(base, tokens)
        return self._logits(base, hidden_ND, gate_logit_N)

    def _embeddings(self, base: Tensor, tokens: Tensor) -> Tensor:
        if self.added:
            base = base.masked_fill((tokens >= self.base_rows)[..., None], 0)
        return base + self._rows_of(tokens, self._early_U() if self.late else None)

    def _early_U(self) -> Tensor:
        """The rows that count before the gate decides: of tokens that open it, and of those that have no other."""
        return self.opens.bool() | (torch.arange(len(self.ids), device=self.ids.device) >= self._own)

    def _rows_of(self, tokens: Tensor, wanted_U: Tensor | None) -> Tensor:
        """The difference of each token, (…, D), zero where it has none among the `wanted` rows; None: all."""
        slots = self._slots(tokens)
        delta = nn.functional.embedding(slots, self.delta)  # IndexError beyond the vocabulary, as everywhere
        return torch.where(self._has(tokens, slots, wanted_U)[..., None], delta, 0)

    def _slots(self, tokens: Tensor) -> Tensor:
        """Where each token's row is, if it has one."""
        slots = torch.searchsorted(self.ids, tokens)
        # the last token of the vocabulary need not be among ids
        return slots if self.added else slots.clamp_max(len(self.ids) - 1)

    def _has(self, tokens: Tensor, slots: Tensor, wanted_U: Tensor | None) -> Tensor:
        has_one = self.ids[slots] == tokens
        return has_one if wanted_U is None else has_one & wanted_U[slots]

    @property
    def _own(self) -> int:
        """Rows, the first ones, of tokens that the base's tokenizer has."""
        return len(self.ids) - self.added - self.spare

    def _logits(self, base_NV: Tensor, hidden_ND: Tensor, gate_logit_N: Tensor | None) -> Tensor:
        linear, inside = nn.functional.linear, len(self.ids) - self.added
        own = self._own
        soft = gate_logit_N is not None and self.training
        hard = gate_logit_N is not None and not self.training
        open_N = gate_logit_N > self.config.threshold_logit if hard else None
        if soft:
            q_N1 = gate_logit_N.sigmoid()[:, None].to(base_NV.dtype)
            logits = self._add(base_NV, q_N1 * linear(hidden_ND, self.delta[:own]))
        elif hard:
            token = open_N.nonzero()[:, 0]
            changed = self._add(base_NV[token], linear(hidden_ND[token], self.delta[:own]))
            logits = base_NV.index_copy(0, token, changed)  # a closed token keeps the base's bits
        else:
            logits = self._add(base_NV, linear(hidden_ND, self.delta[:own]))
        if own == len(self.ids):
            return logits
        added_NA = linear(hidden_ND, self.delta[own:])
        if gate_logit_N is not None:
            share_N = nn.functional.logsigmoid(gate_logit_N)
            if hard:
                share_N = share_N.masked_fill(open_N, 0)
            added_NA = added_NA + share_N[:, None].to(added_NA.dtype)
        if self.spare:
            logits = logits.index_add(-1, self.ids[own:inside], added_NA[:, : self.spare])
        return torch.cat([logits, added_NA[:, self.spare :]], -1) if self.added else logits

    def _add(self, base_NV: Tensor, change_NU: Tensor) -> Tensor:
        if change_NU.shape == base_NV.shape:
            return base_NV + change_NU
        return base_NV.index_add(-1, self.ids[: change_NU.shape[-1]], change_NU)


class EmbeddingWithRows:
    """Mixed into the class of the embedding, whose child `rows` is a `TokenRows`."""

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.rows.enabled:
            return super().forward(tokens)
        known = torch.where(tokens < self.num_embeddings, tokens, 0) if self.rows.added else tokens
        return self.rows(super().forward(known), tokens=tokens)


class ExtendedCausalLM:
    """Mixed into the class of a causal LM: a forward pass whose head knows the language gate's values."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As in every causal LM of transformers.

        Args:
            input_ids: int64 (B, S); or give inputs_embeds (B, S, D).
            attention_mask: (B, S), 0 at padding.
            position_ids: int64 (B, S); where they start again at 0, so does the document.
            past_key_values: a cache.
            labels: int64 (B, S), -100 where there is none; shifted here, not by the caller.
            use_cache: return a cache.
            logits_to_keep: logits of the last so many positions only, or of these positions; 0: of all.
            kwargs: for the base; `moect_record=ForwardRecord()` collects what routers and gates did.

        Returns:
            loss (with labels) and logits (B, S, V + A) in the dtype of the weights.
        """
        record = kwargs.setdefault(RECORD, ForwardRecord())
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BSD, gate_logit_BS = outputs.last_hidden_state, record.gate_logit_T
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if gate_logit_BS is not None:
            gate_logit_BS = gate_logit_BS.view(hidden_BSD.shape[:2])[:, keep]
        logits_BSV = logits_of(self, hidden_BSD[:, keep], gate_logit_BS)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=logits_BSV.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def logits_of(model: nn.Module, hidden: Tensor, gate_logit: Tensor | None = None) -> Tensor:
    """Logits (…, V + A) of a causal LM, with rows that train or without.

    Args:
        model: a causal LM.
        hidden: last hidden states (…, D), after the final norm.
        gate_logit: of the same positions, (…); None without a language gate.
    """
    logits = model.lm_head(hidden)
    rows = getattr(model.lm_head, "rows", None) or getattr(model.model.embed_tokens, "rows", None)
    if rows is None or not rows.enabled:
        return logits
    changed_NV = rows(
        logits.flatten(0, -2),
        hidden_ND=hidden.flatten(0, -2),
        gate_logit_N=None if gate_logit is None else gate_logit.flatten().to(hidden.device),
    )
    return changed_NV.view(*logits.shape[:-1], changed_NV.shape[-1])


def append_rows(
    model: nn.Module,
    ids: list[int],
    first_id: int = 0,
    pieces: list[list[int]] = (),
    within: Callable[[nn.Module, nn.Module], AbstractContextManager] | None = None,
    opening: Collection[int] = (),
) -> nn.Module:
    """Give tokens rows of their own in embedding and head of an extended model, in place; they train.

    `model.config.vocab_size` becomes V + A.

    Args:
        model: as `append_moe` makes it; on the meta device only shapes are made.
        ids: tokens of the base.
        first_id: of the tokens added to the vocabulary; spare rows of the base are used first.
        pieces: of each added token, the tokens that its text was before.
        within: as in `append_moe`, from the embedding (or head) and its rows.
        opening: those of the tokens that open the language gate.

    Returns:
        The same model.

    Raises:
        ConfigError: added tokens that do not follow the base's.
    """
    embedding, head = model.model.embed_tokens, model.lm_head
    V = embedding.num_embeddings
    ids = sorted({*ids, *range(first_id, first_id + len(pieces))})
    beyond = [i for i in ids if i >= V]
    if beyond != list(range(V, V + len(beyond))):
        raise ConfigError(
            f"the tokenizer's added tokens begin at {first_id}, the model's embedding ends at {V - 1}: tokens between "
            "them have no row; take the base's own tokenizer"
        )
    spare = len(pieces) - len(beyond)
    for place in (embedding,) if model.config.tie_word_embeddings else (embedding, head):
        rows = place_rows(place, len(ids), len(beyond), spare, model.moe_config)
        if place.weight.device.type != "meta":
            with within(place, rows) if within else nullcontext():
                rows.reset(torch.tensor(ids), opening)
                rows.start_from_pieces(place.weight, first_id, pieces)
    if not isinstance(model, ExtendedCausalLM):
        _mix_in(model, ExtendedCausalLM)
    model.config.vocab_size = V + len(beyond)
    return model


def place_rows(place: nn.Module, count: int, added: int, spare: int, config: MoeConfig) -> TokenRows:
    """Give embedding or head, with the base's matrix, room for `count` rows; nothing is in it as yet.

    Args:
        place: the embedding, which then uses them, or the head, whose model has to.
        count, added, spare, config: as in `TokenRows`.
    """
    is_embedding = isinstance(place, nn.Embedding)
    V, D = (
        (place.num_embeddings, place.embedding_dim) if is_embedding else (place.out_features, place.in_features)
    )  # a divided weight has no shape
    with torch.device("meta"):
        rows = TokenRows(count, D, V, added, spare, config)
    rows.to(dtype=place.weight.dtype).to_empty(device=place.weight.device)
    place.rows = rows.train(place.training)
    if is_embedding:
        _mix_in(place, EmbeddingWithRows)
    return rows


def append_counted_rows(model: nn.Module, rows: int, added_tokens: int = 0, spare_tokens: int = 0) -> nn.Module:
    """Room for so many rows, counted as `MoectConfig` does; which tokens they are of is among the tensors to load."""
    added = added_tokens + spare_tokens
    first_id = model.model.embed_tokens.num_embeddings - spare_tokens
    return append_rows(model, range(rows - added), first_id, [[0]] * added)


def remove_rows(model: nn.Module) -> None:
    """Undo `append_rows`, if it was done."""
    if not rows_of(model):
        return
    embedding = model.model.embed_tokens
    for place in (embedding, model.lm_head):
        if hasattr(place, "rows"):
            del place.rows
    for module in (embedding, model):
        module.__class__ = vars(type(module)).get("mixed_into", type(module))  # an exported model's class stays
    model.config.vocab_size = embedding.num_embeddings


def rows_of(model: nn.Module) -> list[TokenRows]:
    """The rows that were appended, of the embedding first; empty for a model without."""
    return [m for m in model.modules() if isinstance(m, TokenRows)]


def describe_rows(model: nn.Module) -> dict | None:
    """How many tokens have rows of their own, for plan and screen; None for a model without."""
    rows = rows_of(model)[:1]
    if not rows:
        return None
    return {
        "rows": len(rows[0].ids),
        "added": rows[0].added + rows[0].spare,
        "vocabulary": rows[0].base_rows + rows[0].added,
        "train": rows[0].delta.requires_grad,
    }


def _mix_in(module: nn.Module, mixin: type) -> None:
    base = type(module)
    module.__class__ = type(
        f"Extended{base.__name__}", (mixin, base), {"__module__": base.__module__, "mixed_into": base}
    )
