"""An adapter's factors made small: a lower rank, and few bits a number."""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.core.adapter_codes import middle_of

# Steps of a row's scale that are tried, as shares of the one that reaches its largest number.
SHARES = {2: (0.3, 1.0), 3: (0.35, 1.0), 4: (0.45, 1.0), 8: (0.9, 1.0)}
TRIED = 29


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best A (rank, in) and B (out, rank) for B A (Eckart & Young 1936), of equal norms,
    row by column, and all singular values of B A (r,).

    From the QR of both factors: the product (out, in) is never formed.
    """
    left, upper_left = torch.linalg.qr(b.double())  # (out, r), (r, r)
    right, upper_right = torch.linalg.qr(a.double().T)  # (in, r), (r, r)
    u, values, v = torch.linalg.svd(upper_left @ upper_right.T)
    roots = values[:rank].sqrt()
    new_b = left @ (u[:, :rank] * roots)
    new_a = (v[:rank].T * roots).T @ right.T
    return new_a.float(), new_b.float(), values.float()


def scales_of(rows: Tensor, bits: int) -> Tensor:
    """For each row (rows, width) the scale with the least squared error; 0 for a row of zeros."""
    largest = rows.abs().amax(1) / middle_of(bits)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in torch.linspace(*SHARES[bits], TRIED).tolist():
        scales = largest * share
        error = (rounded(rows, scales, bits) - rows).square().sum(1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def codes_of(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest codes, uint8 (rows, width)."""
    middle = middle_of(bits)
    steps = rows / torch.where(scales == 0, 1.0, scales)[:, None]
    return (steps + middle).round().clamp(0, 2**bits - 1).to(torch.uint8)


def rounded(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The numbers that the codes stand for."""
    return (codes_of(rows, scales, bits).float() - middle_of(bits)) * scales[:, None]
