"""First weights of an adapter taken from its base: PiSSA, OLoRA and LoftQ, and the way back to the
base as it ships.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from edgetune.core.errors import RecipeError
from edgetune.core.layout import PEFT_PREFIX
from edgetune.models.fake_quantise import is_transposed
from edgetune.quantisation.gptq import on_grid
from edgetune.quantisation.precision import Precision

ADAPTER = "default"
Start = dict[str, tuple[Tensor, Tensor]]
"""module → A₀ (r, in), B₀ (out, r)"""


def start_of(model: PeftModel) -> Start:
    """The adapter as it was initialised, to be taken before the first step."""
    return {
        name: (
            layer.lora_A[ADAPTER].weight.detach().clone(),
            layer.lora_B[ADAPTER].weight.detach().clone(),
        )
        for name, layer in adapted_layers(model)
    }


@torch.no_grad()
def restore_base(model: PeftModel, start: Start) -> None:
    """Give the base its weights back and the adapter what makes up for it; the model computes as
    before.
    """
    config = model.peft_config[ADAPTER]
    for name, layer in adapted_layers(model):
        weight = layer.get_base_layer().weight
        a0, b0 = (tensor.to(weight.device) for tensor in start[name])
        weight += (layer.scaling[ADAPTER] * b0 @ a0).to(weight.dtype)
        layer.lora_A[ADAPTER] = _linear(torch.cat([layer.lora_A[ADAPTER].weight, a0]))
        layer.lora_B[ADAPTER] = _linear(torch.cat([layer.lora_B[ADAPTER].weight, -b0], dim=1))
        layer.r[ADAPTER] *= 2
    # The scaling, alpha / r or alpha / sqrt(r), must stay what it was.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha = factor * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {
        key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()
    }
    config.init_lora_weights = True


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Name and layer of everything in `model` that has an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and ADAPTER in module.lora_A:
            yield name, module


def _linear(weight: Tensor) -> nn.Linear:
    """A layer without bias that holds `weight` (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


# of a weight, lost: 8 bits lose 5e-3 of normal weights, weights rounded before about 1e-7
NOTHING = 1e-4


@torch.no_grad()
def start_from_rounding(model: PeftModel, original: nn.Module, precision: Precision) -> None:
    """Give the fresh adapter of `model`, whose base is rounded, the rank-r part of what
    `original`'s weights lost.

    Layers whose grid the rounding keeps have lost nothing: their adapter stays as PEFT drew it.
    RecipeError where all are such.
    """
    lossy = 0
    for name, layer in adapted_layers(model):
        path, base_layer = name.removeprefix(PEFT_PREFIX), layer.get_base_layer()
        weight, rounded = (
            _upright(module) for module in (original.get_submodule(path), base_layer)
        )
        lost, bits = weight - rounded, precision.bits([path])
        if lost.norm() <= NOTHING * weight.norm() or on_grid(
            weight, bits=bits, block_size=precision.block_size
        ):
            continue
        lossy += 1
        scaling = layer.scaling[ADAPTER]
        a, b = closest_of_rank(lost / scaling, layer.r[ADAPTER])
        layer.lora_A[ADAPTER].weight.copy_(a)
        layer.lora_B[ADAPTER].weight.copy_(b)
        if ADAPTER in layer.lora_magnitude_vector:  # DoRA's magnitudes are those of the sum
            magnitude = layer.lora_magnitude_vector[ADAPTER]
            magnitude.update_layer(
                base_layer=base_layer,
                lora_A=layer.lora_A[ADAPTER].weight,
                lora_B=layer.lora_B[ADAPTER].weight,
                scaling=scaling,
            )
    if not lossy:
        raise RecipeError(
            f'init = "loftq" has nothing to start from: {precision.weights} keeps the grid that'
            " this base's weights lie on",
            where="parameters.init",
            expected="a base that base_precision rounds",
            fix="Remove init.",
        )


def closest_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), of the same size each, whose product BA is the truncated SVD
    of a matrix (out, in).
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _upright(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), in float32 on the CPU."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return (weight.t() if is_transposed(module) else weight).detach().float().cpu()
