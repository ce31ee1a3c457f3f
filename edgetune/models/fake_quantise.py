"""A base in torch with the weights that its bundle will hold: every weight that the exporter
quantises, dequantised.

The exporter decides on the traced graph, this on the modules; both ask `Precision` and both call
`quantise`, so the values are the same, bit for bit (rows of a weight are rounded on their own:
packing layers changes nothing).

In bf16 a frozen weight is rounded once more, held so or by autocast alike. On SmolLM2-135M (1,536
tokens of WikiText-2) that alone costs 1.3e-4 nats of KL, autocast as a whole 8.8e-4, rounding to 4
bits itself 0.46: training does not see the difference, and `edgetune eval` and the proof compute in
fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.models.heads import HEADS, UNUSED, unwrapped
from edgetune.quantisation.blocks import Quantised, in_blocks, quantise
from edgetune.quantisation.grids import find_grid
from edgetune.quantisation.precision import Precision

ADAPTERS_OWN = {
    "lora_A",
    "lora_B",
    "lora_magnitude_vector",
    "modules_to_save",
    *HEADS,
}  # parts of a path that no base has


@torch.no_grad()
def round_weights(model: Any, precision: Precision) -> None:
    """Replace every weight of a transformers model that a bundle of this precision stores in 4 or 8
    bits, in place.

    With an adapter or a task head on it, these stay as they are. An embedding tied to the output
    projection stays tied where both are stored in the same bits.
    """
    body = base_of_model(model)
    bits, modules = stored_bits(body, precision), linear_layers(body)
    name, table = _table(body)
    rows = {path for path, module in modules.items() if module.weight is table.weight} | {
        name
    }  # read row by row: no offsets there
    _untie(body, bits)
    done: set[int] = set()
    for path, module in [*modules.items(), (name, table)]:
        if not bits[path] or id(module.weight) in done:
            continue
        done.add(id(module.weight))
        store(module, quantised_weight(module, bits[path], precision, offsets=path not in rows))


def stored_bits(model: Any, precision: Precision) -> dict[str, int]:
    """Module path → 4, 8 or 0 (float), of every linear layer that a bundle has and of the token
    embedding.
    """
    linears = linear_layers(model)
    bits = {name: precision.bits([name]) for name in linears}
    name, table = _table(model)
    tied = next(
        (bits[path] for path, linear in linears.items() if linear.weight is table.weight), 0
    )
    bits[name] = precision.embedding_bits(
        name, tied=tied, is_input=True, columns=int(table.weight.shape[1])
    )
    return bits


def base_of_model(model: Any) -> Any:
    """The transformers model inside an adapted one, without its task head; the layers in it may be
    adapted still.
    """
    inner = unwrapped(model)
    return getattr(inner, "body", inner)


def _table(model: Any) -> tuple[str, Any]:
    """Path and module of the token embedding, adapted or not."""
    table = model.get_input_embeddings()
    name = next(path for path, module in model.named_modules() if module is table)
    return name, getattr(table, "base_layer", table)


def quantised_weight(module: Any, bits: int, precision: Precision, *, offsets: bool) -> Quantised:
    """The weight (out, in) of a linear layer or embedding as a bundle stores it; `offsets`: not for
    an embedding.
    """
    weight: Tensor = module.weight
    return quantise(
        weight.t() if is_transposed(module) else weight,
        bits=bits,
        block_size=precision.block_size,
        symmetric=precision.symmetric,
        offsets=offsets,
        method=precision.quantiser,
    )


def lies_on_grid(module: Any, precision: Precision) -> bool:
    """Whether a linear layer's weight is kept as it is in 4 bits, because it lies on a grid of this
    block size.
    """
    weight = module.weight.t() if is_transposed(module) else module.weight
    kept, _ = find_grid(
        in_blocks(weight, precision.block_size),
        bits=4,
        offsets=weight.shape[1] % precision.block_size == 0,
    )
    return bool(kept.all())


def store(module: Any, quantised: Quantised) -> None:
    """Give a linear layer or embedding the weight that the engine computes with."""
    weight = quantised.dequantise()
    module.weight.copy_(weight.t() if is_transposed(module) else weight)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Path → linear layer of every one that a bundle has; see `base_of_model` for what to give."""
    return dict(_linears(model))


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers that a bundle has, by their paths in the base: all but a pooler that
    nothing reads, and no adapter's own.
    """
    for name, module in model.named_modules():
        path = name.removesuffix(".base_layer")
        if (isinstance(module, nn.Linear) or is_transposed(module)) and not set(path.split(".")) & {
            *UNUSED,
            *ADAPTERS_OWN,
        }:
            yield path, module


def is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def _untie(model: Any, bits: dict[str, int]) -> None:
    """Give an output projection its own copy of the embedding's weight where the two are stored in
    different bits.
    """
    name, table = _table(model)
    for path, linear in _linears(model):
        if linear.weight is table.weight and bits[path] != bits[name]:
            linear.weight = nn.Parameter(linear.weight.detach().clone())
