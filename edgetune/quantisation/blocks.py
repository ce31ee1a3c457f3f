"""Block-wise weight quantisation: the one implementation that the exporter ships and training can
simulate.

A weight (out, in) is cut along `in` into blocks of `block_size`. Each block has a scale and holds
unsigned integers `q` of 4 or 8 bits: w ≈ scale · (q − zero). Symmetric blocks have zero = 8 (or
128); the layout of the packed bytes is that of ONNX Runtime's `MatMulNBits` (two 4-bit values a
byte, the lower one first).

Rows that lie on a grid of these bits already keep it (`grids`). A block of theirs may have an
offset that no integer zero expresses (GGUF's Q4_1): w = scale · (q − zero) + offset. Offsets become
columns of the product of their own, one a block, which the graph feeds with the block's mean input;
they are rounded to 4 bits, so that a weight moves by about a fiftieth of a step. Kept in float32
they would be exact, and cost more speed than int8 does (`docs/explanation/what-was-tried.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.quantisation.grids import find_grid
from edgetune.quantisation.hqq import half_quadratic_steps

# Candidate shrinkages of a block's range; the one with the least squared error is kept, block by
# block.
SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8)
# to be raised when any weight is rounded otherwise: adapters are trained against the values
ROUNDING = 2
SMALLEST_HALF = 2.0**-24  # above zero in float16
ELEMENTS_AT_ONCE = (
    1 << 18
)  # a piece that stays in the cache: 6 times faster than the whole weight at once


@dataclass(frozen=True)
class Quantised:
    """A quantised weight: values (out, blocks, block_size) uint8, scales (out, blocks), zeros (out,
    blocks) or None.

    `inputs`: columns that the product reads: `columns`, and where blocks have offsets one more a
    block, for its mean input.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    columns: int
    inputs: int

    @property
    def block_size(self) -> int:
        return int(self.values.shape[2])

    def dequantise(self) -> Tensor:
        """The weight (out, in) in float32 that the engine computes with."""
        zero = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros.float()[..., None]
        weight = ((self.values.float() - zero) * self.scales[..., None]).flatten(1)[
            :, : self.inputs
        ]
        weight, added = weight[:, : self.columns], weight[:, self.columns :]
        if added.shape[1]:
            weight = weight + (added / self.block_size).repeat_interleave(self.block_size, 1)
        return weight.contiguous()

    def packed(self) -> Tensor:
        """values as bytes: (out, blocks, block_size · bits / 8)."""
        return pack_nibbles(self.values) if self.bits == 4 else self.values

    def packed_zeros(self) -> Tensor | None:
        """zeros as bytes: (out, blocks) for 8 bits, (out, ceil(blocks / 2)) for 4."""
        if self.zeros is None or self.bits == 8:
            return self.zeros
        even = torch.nn.functional.pad(self.zeros, (0, self.zeros.shape[1] % 2), value=8)
        return pack_nibbles(even)


def pack_nibbles(values: Tensor) -> Tensor:
    """(…, n) values of 0..15 → (…, n / 2) bytes, the even index in the lower half."""
    return values[..., 0::2] | (values[..., 1::2] << 4)


def quantise(
    weight: Tensor,
    *,
    bits: int,
    block_size: int = 32,
    symmetric: bool = True,
    offsets: bool = True,
    method: str = "rtn",
) -> Quantised:
    """Keep the grid of rows of a weight (out, in) that lie on one; round each block of the others
    to the best of a few.

    `offsets`: whether a grid may be kept that needs offsets, which an embedding's operator cannot
    add. `method`: "hqq" searches the 4-bit grids of blocks further (`hqq`), with zeros of their
    own.
    """
    search = bits == 4 and method == "hqq"
    symmetric = symmetric and not search
    columns = weight.shape[1]
    blocks = in_blocks(weight, block_size)
    offsets = offsets and columns % block_size == 0
    parts = [
        _stored(rows, bits, symmetric, offsets, search)
        for rows in blocks.split(max(1, ELEMENTS_AT_ONCE // blocks[0].numel()))
    ]
    values, scales, zeros, added = (torch.cat([part[i] for part in parts]) for i in range(4))
    inputs = columns
    if added.any():
        inputs += added.shape[1]
        more = torch.nn.functional.pad(added * block_size, (0, -added.shape[1] % block_size)).view(
            len(added), -1, block_size
        )
        pairs = zip((values, scales, zeros), _rounded(more, bits, False), strict=True)
        values, scales, zeros = (torch.cat(pair, 1) for pair in pairs)
    if symmetric:
        values, scales, zeros = _centred(values, scales, zeros, bits)
    needed = not symmetric or bool((zeros != 1 << (bits - 1)).any())
    return Quantised(values, scales, zeros if needed else None, bits, columns, inputs)


def _centred(
    values: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same weights with every zero in the middle, where all blocks allow it: then the file and
    the engine need no zeros.
    """
    half = 1 << (bits - 1)
    if bool((zeros == half).all()):
        return values, scales, zeros
    steps = values.short() - zeros.short()[..., None]
    low, high = steps.amin(-1), steps.amax(-1)
    upright, turned = (low >= -half) & (high < half), (high <= half) & (low > -half)
    if not bool((upright | turned).all()):
        return values, scales, zeros
    sign = torch.where(upright, 1, -1).short()
    return (
        (steps * sign[..., None] + half).to(torch.uint8),
        scales * sign,
        torch.full_like(zeros, half),
    )


def in_blocks(weight: Tensor, block_size: int) -> Tensor:
    """(out, in) → (out, blocks, block_size) in float32, the last block filled up with zeros."""
    padded = torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % block_size))
    return padded.view(weight.shape[0], -1, block_size)


def steps_of(blocks: Tensor, *, bits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros (rows, blocks) of symmetric blocks whose values are yet to be chosen; scales
    are ones that float16 holds, as `grids` reads them back.

    `importance` (…, block_size): weight of each column's squared error.
    """
    scale, zero = _choose(_candidates(blocks, bits, True), blocks, bits, importance)
    stored = scale.half().float()
    return torch.where(stored == 0, torch.where(scale < 0, -1.0, 1.0) * SMALLEST_HALF, stored), zero


def _stored(
    blocks: Tensor, bits: int, symmetric: bool, offsets: bool, search: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, scales, zeros, offsets of a few rows (rows, blocks, block_size)."""
    kept, grid = find_grid(blocks, bits=bits, offsets=offsets)
    if kept.all():
        return grid.values, grid.scale, grid.zero.to(torch.uint8), grid.offset
    values, scales, zeros = _searched(blocks) if search else _rounded(blocks, bits, symmetric)
    added = torch.zeros_like(scales)
    values[kept], scales[kept], zeros[kept], added[kept] = (
        grid.values,
        grid.scale,
        grid.zero.to(torch.uint8),
        grid.offset,
    )
    return values, scales, zeros, added


def _rounded(blocks: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """values, scales, zeros: each weight at the nearest point of the best of a few grids a
    block.
    """
    scales, zeros = _choose(_candidates(blocks, bits, symmetric), blocks, bits, None)
    values = torch.round(blocks / scales[..., None] + zeros[..., None]).clamp_(0, (1 << bits) - 1)
    return values.to(torch.uint8), scales, zeros.to(torch.uint8)


def _searched(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values, scales, zeros of 4 bits: each weight at the nearest point of the grid that `hqq`
    finds.
    """
    scales, zeros = half_quadratic_steps(
        blocks, *_choose(_candidates(blocks, 4, False), blocks, 4, None)
    )
    values = torch.round(blocks / scales[..., None] + zeros[..., None]).clamp_(0, 15)
    return values.to(torch.uint8), scales, zeros.to(torch.uint8)


def _candidates(blocks: Tensor, bits: int, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
    """Several (scale, zero) a block, the plain one first."""
    shrinkages = SHRINK if bits == 4 else (1.0,)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if (
        symmetric
    ):  # the value of largest magnitude sits exactly on the grid's far end, as in GGUF's Q4_0
        half = 1 << (bits - 1)
        extreme = torch.where(high.abs() > low.abs(), high, low) / -half
        zero = torch.full_like(extreme, float(half))
        return [(extreme * shrink, zero) for shrink in shrinkages]
    top = (1 << bits) - 1  # the block's range fills the grid; zero is an integer of the grid
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = [(high - low) * shrink / top for shrink in shrinkages]
    return [
        (scale, torch.round(-low * shrink / torch.where(scale == 0, 1.0, scale)).clamp(0, top))
        for scale, shrink in zip(scales, shrinkages, strict=True)
    ]


def _choose(
    candidates: list[tuple[Tensor, Tensor]], blocks: Tensor, bits: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of several (scale, zero) a block, the one with the least squared error."""
    top = (1 << bits) - 1
    (scales, zeros), *others = candidates
    if others:
        least = _error(blocks, scales, zeros, top, importance)
        for scale, zero in others:
            error = _error(blocks, scale, zero, top, importance)
            better = error < least
            least = torch.where(better, error, least)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return torch.where(scales == 0, 1.0, scales), zeros


def _error(
    blocks: Tensor, scale: Tensor, zero: Tensor, top: int, importance: Tensor | None
) -> Tensor:
    """Squared error a block in units that all its candidates share."""
    scale = torch.where(scale == 0, 1.0, scale)[..., None]
    low = -zero[..., None]
    q = (blocks * scale.reciprocal()).round_().clamp_(min=low, max=low + top)
    squared = q.mul_(scale).sub_(blocks).square_()
    return (squared if importance is None else squared.mul_(importance)).sum(-1)
