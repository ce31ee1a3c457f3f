"""Transformers' own classifier layers in numpy: what a head reads of an encoder's states → what its
output layer reads. A row's work is two small products, so every row may have a head of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from edgetune.core.arrays import Float32
from edgetune.core.errors import BundleError
from edgetune.core.head_layers import HeadLayers
from edgetune.runtime.bundle.manifest import HeadInfo

DENSE_LAYER, NORM_LAYER = "head.dense", "head.norm"
LORA_A, LORA_B = "head.dense.lora_A", "head.dense.lora_B"
LAYER_TENSORS = frozenset(
    {LORA_A, LORA_B}
    | {f"{layer}.{part}" for layer in (DENSE_LAYER, NORM_LAYER) for part in ("weight", "bias")}
)
"""What an adapter brings beside its output layer; LORA_A is always there, in a head of such layers
only.
"""


def base_layers(folder: Path, head: HeadInfo | None) -> dict[str, Float32]:
    """The base's own layers before the output: `pooler.dense.weight` (out, in), as torch holds it.

    BundleError where the file holds others than the manifest says.
    """
    if head is None or head.file is None:
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path, width = folder / head.file, head.in_features
    try:
        found: dict[str, Float32] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"the head's layers cannot be read: {error}", where=str(path)) from error
    fits = all(
        array.dtype == np.float32 and array.ndim in (1, 2) and {*array.shape} == {width}
        for array in found.values()
    )
    if not fits or any(f"{layer}.weight" not in found for layer in head.own):
        raise BundleError(
            "this file holds other layers than the manifest says",
            where=str(path),
            expected=f"{', '.join(head.own)} of width {width}",
            got=", ".join(f"{name} {array.shape}" for name, array in found.items()),
            fix="Export the bundle again.",
        )
    return found


def before_output(
    states: Float32,
    layers: HeadLayers,
    tensors: Mapping[str, Float32],
    own: Mapping[str, Float32],
) -> Float32:
    """(…, hidden) → (…, hidden): `norm(activation(dense(states)))`; a layer that the adapter's
    tensors lack is the base's own.
    """
    weight, bias = _layer(DENSE_LAYER, layers.dense, tensors, own)
    inner = states @ weight + bias
    if (a := tensors[LORA_A][0]).shape[1]:
        inner = inner + (states @ a) @ tensors[LORA_B][0]
    inner = ACTIVATIONS[layers.activation](inner)
    if layers.norm is not None:
        weight, bias = _layer(NORM_LAYER, layers.norm, tensors, own)
        centred = inner - inner.mean(-1, keepdims=True)
        variance = np.square(centred).mean(-1, keepdims=True)
        inner = centred / np.sqrt(variance + np.float32(layers.norm_eps)) * weight + bias
    return np.asarray(inner, np.float32)


def read_by(layers: HeadLayers, states: Float32) -> Float32:
    """(tokens, hidden) of one text → what a classifier of texts reads, (hidden,)."""
    result: Float32 = states.mean(0) if layers.reads == "mean" else states[0]
    return result


def _layer(
    packed: str, name: str, tensors: Mapping[str, Float32], own: Mapping[str, Float32]
) -> tuple[Float32, Float32]:
    """weight (in, out) or (hidden,), and bias (hidden,)."""
    if f"{packed}.weight" in tensors:
        return tensors[f"{packed}.weight"][0], tensors[f"{packed}.bias"][0]
    weight = own[f"{name}.weight"]
    return weight.T, own.get(f"{name}.bias", np.zeros(len(weight), np.float32))


def _gelu(x: Float32) -> Float32:
    """x · Φ(x). The error function by Abramowitz and Stegun 7.1.26 in double precision, exact to
    1.5e-7.
    """
    scaled = x.astype(np.float64) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * np.abs(scaled))
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    erf = np.sign(scaled) * (1 - series * np.exp(-np.square(scaled)))
    return np.asarray(0.5 * x * (1 + erf), np.float32)


def _sigmoid(x: Float32) -> Float32:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)), np.float32)


ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {
    "gelu": _gelu,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}
