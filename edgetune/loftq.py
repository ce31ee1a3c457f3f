"""LoftQ's start of an adapter: the rank-r part of what rounding the base loses (Li et al. 2023, arXiv 2310.08659).

Algorithm 1 with T = 1. The base is Q(W), as `base_precision` trains on it and a bundle holds it; s·B₀A₀ is the truncated SVD of
W − Q(W), the closest of rank r in the Frobenius norm, s being the adapter's scaling. Base and adapter together start nearer to W than
Q(W) alone. The base is the one that ships, so the adapter is saved as it is.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn

from edgetune.adapters import PREFIX
from edgetune.errors import RecipeError
from edgetune.gptq import on_grid
from edgetune.mutated_init import ADAPTER, adapted_layers
from edgetune.shipped_weights import is_transposed
from edgetune.weight_precision import Precision

NOTHING = 1e-4  # of a weight, lost: 8 bits lose 5e-3 of normal weights, weights rounded before about 1e-7


@torch.no_grad()
def start_from_rounding(model: PeftModel, original: nn.Module, precision: Precision) -> None:
    """Give the fresh adapter of `model`, whose base is rounded, the rank-r part of what `original`'s weights lost.

    Layers whose grid the rounding keeps have lost nothing: their adapter stays as PEFT drew it. RecipeError where all are such.
    """
    lossy = 0
    for name, layer in adapted_layers(model):
        path, base_layer = name.removeprefix(PREFIX), layer.get_base_layer()
        weight, rounded = (_upright(module) for module in (original.get_submodule(path), base_layer))
        lost, bits = weight - rounded, precision.bits([path])
        if lost.norm() <= NOTHING * weight.norm() or on_grid(weight, bits=bits, block_size=precision.block_size):
            continue
        lossy += 1
        scaling = layer.scaling[ADAPTER]
        a, b = closest_of_rank(lost / scaling, layer.r[ADAPTER])
        layer.lora_A[ADAPTER].weight.copy_(a)
        layer.lora_B[ADAPTER].weight.copy_(b)
        if ADAPTER in layer.lora_magnitude_vector:  # DoRA's magnitudes are those of the sum
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            magnitude.update_layer(base_layer=base_layer, lora_A=layer.lora_A[ADAPTER].weight, lora_B=layer.lora_B[ADAPTER].weight, scaling=scaling)
    if not lossy:
        raise RecipeError(
            f'init = "loftq" has nothing to start from: {precision.weights} keeps the grid that this base\'s weights lie on',
            where="parameters.init", expected="a base that base_precision rounds", fix="Remove init.",
        )  # fmt: skip


def closest_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), of the same size each, whose product BA is the truncated SVD of a matrix (out, in)."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _upright(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), in float32 on the CPU."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return (weight.t() if is_transposed(module) else weight).detach().float().cpu()
