"""How far two models' outputs on the same positions are apart; a few positions at a time, so that
memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.core.arrays import Float32

ELEMENTS_AT_ONCE = 1 << 20  # in float64 8 MB: a few arrays of it stay in the cache


def mean_kl(p: Float32, q: Float32) -> float:
    """Mean over rows of KL(softmax(p) ‖ softmax(q)), in nats; p and q are logits (positions,
    classes).
    """
    return mean_kls(p, [q])[0]


def mean_kls(p: Float32, others: Sequence[Float32 | None]) -> list[float]:
    """`mean_kl` of one p and each of several q; None: a guess that favours no class."""
    sums = [0.0] * len(others)
    for part in pieces(p):
        log_p = _log_softmax(p[part])
        share = log_p.exp()
        for i, q in enumerate(others):
            log_q = -np.log(p.shape[-1]) if q is None else _log_softmax(q[part])
            sums[i] += float((share * (log_p - log_q)).sum())
    return [total / len(p) for total in sums]


@dataclass(frozen=True)
class Movement:
    """What an adapter moves states by (each row without its mean): in torch d, in the bundle e."""

    product: float
    """⟨d, e⟩"""
    size: float
    """|d|"""
    shipped: float
    """|e|"""
    states: float
    """|p|, of the trained states themselves"""


def movement(
    trained: Float32, trained_off: Float32, shipped: Float32, shipped_off: Float32
) -> Movement:
    """d = p − p₀ against e = q − q₀, each (positions, width); a constant added to all logits means
    nothing.
    """
    product = size = moved = states = 0.0
    for part in pieces(trained):
        p, q = _double(trained[part]), _double(shipped[part])
        d, e, p = (
            _centred(p - _double(trained_off[part])),
            _centred(q - _double(shipped_off[part])),
            _centred(p),
        )
        product += float((d * e).sum())
        size, moved, states = (
            total + float(x.square().sum()) for total, x in ((size, d), (moved, e), (states, p))
        )
    return Movement(product, size**0.5, moved**0.5, states**0.5)


def largest_difference(p: Float32, q: Float32) -> float:
    """max |p − q|; NaN where either has one."""
    return float(np.max([np.abs(p[part] - q[part]).max() for part in pieces(p)]))


def pieces(array: Float32) -> Iterator[slice]:
    """Runs of rows that hold about `ELEMENTS_AT_ONCE` numbers."""
    rows = max(1, ELEMENTS_AT_ONCE // max(1, array.shape[-1]))
    return (slice(start, start + rows) for start in range(0, len(array), rows))


def _double(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).double()


def _log_softmax(logits: Float32) -> Tensor:
    return torch.log_softmax(_double(logits), -1)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
