"""What is left of a change ΔW once W + ΔW is rounded, of each layer's weights.

With Q for rounding, the change that ships is Q(W + ΔW) − Q(W). Against ΔW it has

    strength  = ⟨Q(W + ΔW) − Q(W), ΔW⟩ / |ΔW|²    1: all of it arrives on average; 0: rounding took
    it away direction = cos(Q(W + ΔW) − Q(W), ΔW)         lower the more of what ships is rounding
    noise

A small ΔW drowns in noise (direction falls, and what survives is an average over many weights); on
a base that already lies on the grid it disappears (strength falls), because nothing is pushed over
the middle between two points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgetune.core.layout import PEFT_PREFIX
from edgetune.models.heads import HEADS
from edgetune.quantisation.blocks import quantise
from edgetune.quantisation.precision import Precision

LEAST_STRENGTH = 0.5
PEFT_NAME = "default"
NOT_THE_BASE = {"lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save", *HEADS}


@dataclass(frozen=True)
class Survival:
    """Of one layer: strength and direction as above, and |ΔW|."""

    strength: float
    direction: float
    size: float


def survival(
    model: nn.Module, precision: Precision, *, trained: nn.Module | None = None
) -> dict[str, Survival]:
    """Layer → what survives rounding of the adapter on `model`, or of the change from `model` to
    `trained`.

    `precision` is the one in the bundle's manifest, in which the layers of one product are stored
    alike (`Precision.settled`). Empty where nothing is rounded. DoRA's layers are left out: their
    change is not one matrix added to W.
    """
    found = {}
    with torch.no_grad():
        for name, weight, change in (
            _changed(model) if trained is None else _differences(model, trained)
        ):
            bits = precision.bits([name])
            if bits and bool(change.any()):
                found[name] = _of(weight, change, precision, bits=bits)
    return found


def _of(weight: Tensor, change: Tensor, precision: Precision, *, bits: int) -> Survival:
    shipped = (
        _rounded(weight + change, precision, bits) - _rounded(weight, precision, bits)
    ).double()
    wanted = change.double()
    product, size, moved = (
        float((shipped * wanted).sum()),
        float(wanted.norm()),
        float(shipped.norm()),
    )
    return Survival(product / size**2, product / (size * moved) if moved else 0.0, size)


def _rounded(weight: Tensor, precision: Precision, bits: int) -> Tensor:
    return quantise(
        weight,
        bits=bits,
        block_size=precision.block_size,
        symmetric=precision.symmetric,
        method=precision.quantiser,
    ).dequantise()


def _changed(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, W (out, in), ΔW) of every plain LoRA layer."""
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, layer in layers:
        if PEFT_NAME in getattr(layer, "lora_A", {}) and PEFT_NAME not in getattr(
            layer, "lora_variant", {}
        ):
            base = layer.get_base_layer()
            change = layer.get_delta_weight(PEFT_NAME).float()
            yield (
                _plain_name(name),
                _weight(base),
                change.t() if isinstance(base, Conv1D) else change,
            )


def _differences(model: nn.Module, trained: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, layer in _linears(trained):
        before = _weight(model.get_submodule(name))
        yield name, before, _weight(layer) - before


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The base's own linear layers: no adapter's, no task head."""
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and not NOT_THE_BASE & set(name.split(".")):
            yield name, layer


def _weight(layer: Any) -> Tensor:
    """(out, in), fp32."""
    weight: Tensor = layer.weight.detach().float()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _plain_name(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer", "")


def survival_summary(layers: dict[str, Survival]) -> dict[str, Any]:
    """For the manifest: all layers together (weighted by |ΔW|²), the weakest one, and each."""
    total = sum(layer.size**2 for layer in layers.values())
    moved = sum(
        (layer.strength * layer.size / layer.direction) ** 2
        for layer in layers.values()
        if layer.direction
    )
    product = sum(layer.strength * layer.size**2 for layer in layers.values())
    weakest = min(layers, key=lambda name: layers[name].strength)
    return {
        "strength": product / total,
        "direction": product / (total * moved) ** 0.5 if moved else 0.0,
        "weakest": weakest,
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }
