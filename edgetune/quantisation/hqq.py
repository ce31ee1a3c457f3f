"""Steps and zeros of 4-bit blocks by half-quadratic search, without any text (HQQ, Badri and Shaji
2023, mobiusml.github.io/hqq_blog).

Minimises Σ|W − s (q − z)|ᵖ with p < 1, which forgives the few weights that are clipped and serves
the many others. With a second variable E for what is forgiven, each half has a solution of its own
(equations 3 and 4 there):

    E ← shrink(W − s (q − z))     sign(x) · max(0, |x| − |x|ᵖ⁻¹ / β) z ← mean(q − (W − E) / s), here
    rounded to an integer of the grid, because that is what `MatMulNBits` multiplies with s ← ⟨W −
    E, q − z⟩ / ‖q − z‖²  (HQQ keeps s; a step beside it costs nothing here)
"""

from __future__ import annotations

import torch
from torch import Tensor

P = 0.7
OUTLIER = 0.5  # of a step: what rounding alone cannot lose, so only clipped weights are forgiven
STRENGTH = OUTLIER ** (P - 2)  # β, for errors in steps: |x| = |x|ᵖ⁻¹ / β there
ROUNDS = 10
TOP = 15


def half_quadratic_steps(
    blocks: Tensor, scale: Tensor, zero: Tensor, *, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Scales and zeros (rows, blocks) of blocks (rows, blocks, size), from given ones; a block
    never gets worse by Σ|error|ᵖ.
    """
    values, error = _round(blocks, scale, zero)
    best_scale, best_zero, least = scale, zero, _loss(error)
    for _ in range(rounds):
        wanted = blocks - _forgiven(error / scale[..., None]) * scale[..., None]
        zero = (values - wanted / scale[..., None]).mean(-1).round_().clamp_(0, TOP)
        steps = values - zero[..., None]
        fitted = (wanted * steps).sum(-1) / steps.square().sum(-1)
        scale = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)
        values, error = _round(blocks, scale, zero)
        loss = _loss(error)
        better = loss < least
        if not better.any():
            break
        least = torch.where(better, loss, least)
        best_scale, best_zero = (
            torch.where(better, scale, best_scale),
            torch.where(better, zero, best_zero),
        )
    return best_scale, best_zero


def _round(blocks: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the grid, and what they miss."""
    values = torch.round(blocks / scale[..., None] + zero[..., None]).clamp_(0, TOP)
    return values, blocks - (values - zero[..., None]) * scale[..., None]


def _loss(error: Tensor) -> Tensor:
    return error.abs().pow_(P).sum(-1)


def _forgiven(error: Tensor) -> Tensor:
    """Errors in steps → the part of them that does not count."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-6).pow(P - 1) / STRENGTH).clamp_(min=0)
