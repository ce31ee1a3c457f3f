"""Rounding that knows the layer's inputs: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

Of W (out, in) and H = Σ x xᵀ over a layer's inputs, columns are rounded one after the other, and
what each rounding loses is made up for by the columns that are still free: δ = −(w − ŵ) / [H⁻¹]ᵢᵢ ·
[H⁻¹]ᵢ (equation 2). Columns with the largest inputs come first ("act order"), on steps that each
block chose beforehand ("static groups"), so that blocks stay where `MatMulNBits` has them.

The result is again a float32 weight. It lies on a grid, with steps that float16 holds, and
`quantiser.quantise` keeps grids bit for bit: whatever stores, trains on or proves such a weight
needs to know nothing of how it was rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.quantisation.blocks import in_blocks, steps_of
from edgetune.quantisation.grids import find_grid

DAMPING = 0.01  # of the mean of H's diagonal, added to it
AT_ONCE = 128  # columns whose errors reach the later ones together


def round_to_inputs(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    block_size: int,
    offsets: bool = True,
) -> Tensor:
    """W (out, in) with every row on a grid of `bits`, given H = `gram` (in, in) of its inputs; rows
    on a grid already stay.
    """
    blocks = in_blocks(weight, block_size)
    kept, _ = find_grid(blocks, bits=bits, offsets=offsets and weight.shape[1] % block_size == 0)
    if kept.all():
        return weight.detach().clone()
    blocks = blocks[~kept]
    missing = blocks.shape[1] * block_size - gram.shape[0]  # columns that only fill the last block
    gram = torch.nn.functional.pad(gram.double(), (0, missing, 0, missing))
    gram += torch.eye(len(gram), dtype=gram.dtype) * DAMPING * (gram.diagonal().mean() or 1.0)
    importance = gram.diagonal().float()
    scale, zero = steps_of(blocks, bits=bits, importance=importance.view(1, -1, block_size))
    order = torch.argsort(importance, descending=True, stable=True)
    rounded = torch.empty_like(blocks.flatten(1))
    of_block = order // block_size
    rounded[:, order] = _column_by_column(
        blocks.flatten(1)[:, order].t(),
        scale[:, of_block].t(),
        zero[:, of_block].t(),
        _spread(gram, order),
        top=(1 << bits) - 1,
    ).t()
    result = weight.detach().float().clone()
    result[~kept] = rounded[:, : weight.shape[1]]
    return result


def on_grid(weight: Tensor, *, bits: int, block_size: int) -> bool:
    """Whether every row of W (out, in) lies on a grid, which `quantise` keeps."""
    return bool(
        find_grid(
            in_blocks(weight, block_size), bits=bits, offsets=weight.shape[1] % block_size == 0
        )[0].all()
    )


def _spread(gram: Tensor, order: Tensor) -> Tensor:
    """The upper Cholesky factor of H⁻¹, its columns in this order: row i says how column i's error
    spreads to later ones.
    """
    gram = gram[order][:, order]
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return inverse.float()
        gram = gram + torch.diag(gram.diagonal().mean().expand(len(gram)) * DAMPING)


def _column_by_column(
    weight: Tensor, scale: Tensor, zero: Tensor, spread: Tensor, *, top: int
) -> Tensor:
    """Weights, steps and zeros as (in, out), columns in the order in which they are rounded → the
    rounded weights.
    """
    weight, rounded = weight.contiguous(), torch.empty_like(weight)
    scale, zero = scale.contiguous(), zero.contiguous()
    for start in range(0, len(weight), AT_ONCE):
        stop = min(start + AT_ONCE, len(weight))
        part, lost = weight[start:stop], torch.empty_like(weight[start:stop])
        for i in range(stop - start):
            at = start + i
            rounded[at] = (
                torch.round(part[i] / scale[at] + zero[at]).clamp_(0, top) - zero[at]
            ) * scale[at]
            lost[i] = (part[i] - rounded[at]) / spread[at, at]
            part[i + 1 :].addr_(spread[at, at + 1 : stop], lost[i], alpha=-1)
        weight[stop:].addmm_(spread[start:stop, stop:].t(), lost, alpha=-1)
    return rounded
