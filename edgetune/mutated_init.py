"""LoRA initialisations that take their start out of the base weights (PiSSA, OLoRA), and the way back.

They train W_res + s·BA with W_res = W − s·B₀A₀. What was trained is W + s·(BA − B₀A₀), so the saved adapter has the
rows of A and A₀ and the columns of B and −B₀: twice the rank, on the base as it ships. (PEFT's own conversion:
`path_initial_model_for_weight_conversion`, `LoraModel.subtract_mutated_init`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

ADAPTER = "default"
Start = dict[str, tuple[Tensor, Tensor]]
"""module → A₀ (r, in), B₀ (out, r)"""


def start_of(model: PeftModel) -> Start:
    """The adapter as it was initialised, to be taken before the first step."""
    return {
        name: (layer.lora_A[ADAPTER].weight.detach().clone(), layer.lora_B[ADAPTER].weight.detach().clone())
        for name, layer in adapted_layers(model)
    }


@torch.no_grad()
def restore_base(model: PeftModel, start: Start) -> None:
    """Give the base its weights back and the adapter what makes up for it; the model computes as before."""
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
    config.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}
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
