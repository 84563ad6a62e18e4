"""The three numbers that everything here is about."""

from __future__ import annotations

import math


def bits_per_byte(nll: float, n_bytes: int) -> float:
    """Cross-entropy in bits per UTF-8 byte of text: comparable across tokenizers, not across languages.

    Args:
        nll: summed negative log-likelihood in nats.
        n_bytes: bytes of the text that was scored; at least 1.
    """
    return nll / math.log(2) / n_bytes


def retention(bits: float, base_bits: float) -> float | None:
    """Base bits per byte / bits per byte, for an old language: 1 when nothing was lost, above 1 when something was won.

    None where it has no value: the model needs no bits at all and the base does.
    """
    if bits == 0:
        return 1.0 if base_bits == 0 else None
    return base_bits / bits


def gain(bits: float, base_bits: float) -> float | None:
    """1 - bits per byte / base bits per byte, for a new language: 0 when nothing was learned, negative when lost.

    None where it has no value: the base needs no bits at all and the model does.
    """
    if base_bits == 0:
        return 0.0 if bits == 0 else None
    return 1 - bits / base_bits
