"""Weights that already lie on a grid of 4 or 8 bits, found from their values alone, so that storing
them loses nothing.

A base out of a GGUF file was rounded once: Q4_0 and Q8_0 to d · q, Q4_1 to d · q + m, 32 weights a
block. Rounding it again to another grid costs as much as the first time. Here d, q and m are read
back from the float32 weights: for k = 15, 14, … 1 a block's range is k steps; where every weight is
a whole number of steps above the lowest, that is its grid.

A row of a weight counts as a whole: it keeps its grid where all its blocks have one. So weights may
be stacked freely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOP = 15  # the largest value of 4 bits
LARGEST_8BIT = 127  # Q8_0 puts a block's largest magnitude here
BEST = 4  # of a block's grid: without offset and exact to the last bit
CLOSE = 2.0**-23  # of a block's largest magnitude: the last bit of a float32


class Grid(NamedTuple):
    """w = scale · (q − zero) + offset: values (…, size) uint8; scale, zero, offset (…) float32; ok
    (…), where this is true.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor
    offset: Tensor
    ok: Tensor


def find_grid(blocks: Tensor, *, bits: int, offsets: bool) -> tuple[Tensor, Grid]:
    """The rows (rows,) of a float32 weight (rows, blocks, size) that lie on a grid, and the grid of
    just these rows.

    Every weight is reproduced to its last bit or the one beside. `offsets`: whether blocks may have
    one (4 bits only).
    """
    look = _eight_bit if bits == 8 else lambda b: _four_bit(b, offsets=offsets)
    rows = look(blocks[:, 0]).ok  # a row that is not on a grid shows it in its first block
    grid = look(blocks[rows].flatten(0, 1))
    grid = Grid(*(part.view(-1, blocks.shape[1], *part.shape[1:]) for part in grid))
    whole = grid.ok.all(-1)
    rows[rows.clone()] = whole
    return rows, Grid(*(part[whole] for part in grid))


def _eight_bit(blocks: Tensor) -> Grid:
    """Q8_0, or a grid of 4 bits around zero; blocks (n, size)."""
    largest = blocks.abs().amax(-1)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST_8BIT)
    zero = torch.full_like(scale, 128.0)
    wide = _verified(
        blocks, torch.round(blocks / scale[:, None]) + 128, scale, zero, torch.zeros_like(scale)
    )
    exact = (_again(wide) == blocks).all(-1)
    if exact.all():
        return wide
    four = _four_bit(blocks, offsets=False)
    centred = Grid(
        (four.values.float() - four.zero[:, None] + 128).to(torch.uint8),
        four.scale,
        zero,
        four.offset,
        four.ok,
    )
    return _where(exact | ~centred.ok, wide, centred)


def _four_bit(blocks: Tensor, *, offsets: bool) -> Grid:
    """The grid of each block (n, size): where there is a choice one without offset, and one exact
    to the last bit.
    """
    found = _constant(blocks)
    quality = torch.where(found.ok, BEST, 0)
    open_ = (quality < BEST).nonzero()[:, 0]  # blocks for which there may be a better grid
    for steps in range(TOP, 0, -1):
        if not len(open_):
            break
        part = blocks[open_]
        grid = _with_steps(part, steps)
        plain = grid.offset == 0
        reached = torch.where(
            grid.ok & (plain | offsets), 1 + 2 * plain + (_again(grid) == part).all(-1), 0
        )
        better = reached > quality[open_]
        quality[open_[better]] = reached[better]
        for whole, new in zip(found, grid, strict=True):
            whole[open_[better]] = new[better]
        open_ = open_[(quality[open_] < BEST) & ~(better & _finest(grid.values))]
    return found


def _constant(blocks: Tensor) -> Grid:
    """Blocks of one value: a step from the middle of the grid, or on it."""
    value = blocks[:, 0]
    scale = torch.where(value == 0, 1.0, value.abs())
    zero = torch.full_like(scale, 8.0)
    return _verified(
        blocks, (8 + value.sign())[:, None].expand_as(blocks), scale, zero, torch.zeros_like(scale)
    )


def _with_steps(blocks: Tensor, steps: int) -> Grid:
    """The grid on which a block's range is `steps` steps."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    exact = (high - low) / steps
    scale = exact.half().float()  # as GGUF stores it
    scale = torch.where(
        (scale - exact).abs() < exact * 1e-5, scale, exact
    )  # else a grid of another origin
    scale = torch.where(scale == 0, 1.0, scale)
    place = torch.round(-low / scale)  # of the number 0, in steps above the lowest weight
    shift = (-place).clamp(
        0, TOP - steps
    )  # moves the block up the grid, where that brings 0 onto it
    zero = (place + shift).clamp(0, TOP)
    offset = (low.double() + scale.double() * (zero - shift).double()).float()
    offset = torch.where(
        offset.abs() <= 2 * CLOSE * torch.maximum(low.abs(), high.abs()), 0.0, offset
    )
    values = torch.round((blocks - low[:, None]) / scale[:, None]) + shift[:, None]
    grid = _verified(blocks, values, scale, zero, offset)
    return grid._replace(ok=grid.ok & (offset.abs() <= scale))  # a coarser grid may reach 0


def _verified(blocks: Tensor, values: Tensor, scale: Tensor, zero: Tensor, offset: Tensor) -> Grid:
    """`ok` where the weights come back."""
    fits = (values.amin(-1) >= 0) & (values.amax(-1) <= 255)
    grid = Grid(values.clamp(0, 255).to(torch.uint8), scale, zero, offset, fits)
    return grid._replace(
        ok=fits & ((_again(grid) - blocks).abs().amax(-1) <= blocks.abs().amax(-1) * CLOSE)
    )


def _again(grid: Grid) -> Tensor:
    return (grid.values.float() - grid.zero[..., None]) * grid.scale[..., None] + grid.offset[
        ..., None
    ]


def _finest(values: Tensor) -> Tensor:
    """Whether no fewer steps would do: the distances from the lowest value have no common
    divisor.
    """
    from_lowest = values - values.amin(-1, keepdim=True)
    divisor = from_lowest[:, 0]
    for column in from_lowest.unbind(-1)[1:]:
        divisor = torch.gcd(divisor, column)
    return divisor == 1


def _where(first: Tensor, a: Grid, b: Grid) -> Grid:
    return Grid(
        *(
            torch.where(first.view(-1, *[1] * (x.dim() - 1)), x, y)
            for x, y in zip(a, b, strict=True)
        )
    )
