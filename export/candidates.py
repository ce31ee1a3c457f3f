"""The precisions that `--precision auto` tries, in the order of their size; which layers a mixed
one keeps at 8 bits is measured.

A *kind* is the layers that a model has once a layer, by the end of their paths
(`self_attn.o_proj`); kinds that read the same input (q, k, v; gate, up) are one product in the
graph and stand together. What a kind suffers from 4 bits is the KL divergence of the model's
answers on the probe with only that kind rounded, per byte that 8 bits cost more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgetune.export.proof.distances import mean_kl
from edgetune.export.proof.probe import torch_outputs
from edgetune.models.fake_quantise import (
    base_of_model,
    lies_on_grid,
    linear_layers,
    quantised_weight,
    store,
    stored_bits,
)
from edgetune.quantisation.precision import INT4_DECODER, Precision, named

INT4_BLOCKS, INT8_BLOCKS, MIXED_BLOCK = (128, 64, 32, 16), (128, 32), 32
NUMBERED = re.compile(r".*\.\d+\.(?P<end>.+)")
SCALE_BYTES = 4
LayerKind = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A precision to try, and the bytes that its weights are estimated to take."""

    precision: Precision
    bytes: float

    @property
    def careful(self) -> bool:
        """Whether weights are rounded by more than the nearest point."""
        return self.precision.quantiser != "rtn"

    @property
    def name(self) -> str:
        """`int4, blocks of 32, int8: mlp.down_proj lm_head`, `int4 by gptq, blocks of 128`."""
        if self.precision.weights == "fp32":
            return "fp32"
        weights = self.precision.weights + (
            f" by {self.precision.quantiser}" if self.careful else ""
        )
        kept = dict.fromkeys(self.precision.overrides.values())
        lists = [
            f"{kind}:"
            f" {' '.join(name for name, of in self.precision.overrides.items() if of == kind)}"
            for kind in kept
        ]
        return ", ".join([weights, f"blocks of {self.precision.block_size}", *lists])


def candidates(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    keep: Mapping[str, str],
    decoder: bool,
    quantisers: Sequence[str] = ("rtn",),
    merged: bool = False,
) -> list[Candidate]:
    """All precisions smaller than fp32, smallest first. `model` in torch, with the adapter on; it
    is left as it is.

    `rows`: token ids of the probe; `keep`: what the user wants stored otherwise, in every one of
    them; `quantisers`: how 4-bit weights are rounded, each tried where it can differ from the
    first; `merged`: the adapter goes into the weights, off any grid.
    """
    body = base_of_model(model)
    four = (INT4_DECODER if decoder else {}) | dict(keep)
    wanted = [Precision("int4", size, overrides=four) for size in INT4_BLOCKS]
    wanted += [Precision("int8", size, overrides=dict(keep)) for size in INT8_BLOCKS]
    plain = Precision("int4", MIXED_BLOCK, overrides=four)
    sensitive = _by_sensitivity(model, rows, plain, keep)
    for count in range(1, len(sensitive)):
        kept = {end: "int8" for kind in sensitive[:count] for end in kind}
        wanted.append(Precision("int4", MIXED_BLOCK, overrides=kept | four))
    whole = estimated_bytes(body, Precision("fp32"))
    found = [
        Candidate(one, estimated_bytes(body, one))
        for precision in wanted
        for one in _by_each(body, precision, quantisers, merged)
    ]
    return sorted((one for one in found if one.bytes < whole), key=lambda one: one.bytes)


def estimated_bytes(body: Any, precision: Precision) -> float:
    """Bytes of the linear layers' and the token embedding's weights; one tied and stored alike
    counts once.
    """
    modules, stored, total = linear_layers(body), stored_bits(body, precision), 0.0
    table = body.get_input_embeddings()
    seen: set[tuple[int, int]] = set()
    for path, bits in stored.items():
        weight = modules[path].weight if path in modules else table.weight
        if (id(weight), bits) in seen:
            continue
        seen.add((id(weight), bits))
        zeros = 0.5 / precision.block_size if bits == 4 and precision.quantiser == "hqq" else 0.0
        total += weight.numel() * (
            bits / 8 + SCALE_BYTES / precision.block_size + zeros if bits else 4
        )
    return total


def _by_each(
    body: Any, precision: Precision, quantisers: Sequence[str], merged: bool
) -> list[Precision]:
    """The precision by the first quantiser, and by the others where its 4-bit weights are not kept
    as they are anyway.
    """
    layers = linear_layers(body)
    four = [layer for path, layer in layers.items() if precision.bits([path]) == 4]
    if not four:
        return [precision]
    differ = len(quantisers) > 1 and (
        merged or not all(lies_on_grid(layer, precision) for layer in four)
    )
    return [
        replace(precision, quantiser=name) for name in (quantisers if differ else quantisers[:1])
    ]


def _by_sensitivity(
    model: Any, rows: Sequence[Sequence[int]], precision: Precision, keep: Mapping[str, str]
) -> list[LayerKind]:
    """Kinds that 4 bits would be used for, those first that suffer most per byte; none that `keep`
    decides for.
    """
    layers = linear_layers(base_of_model(model))
    reference = torch_outputs(model, rows, adapter=True).logits
    suffered: dict[LayerKind, float] = {}
    for kind, paths in kinds(model, rows[0]).items():
        four = [path for path in paths if precision.bits([path]) == 4]
        if not four or any(named(end, paths) for end in keep):
            continue
        with _rounded([layers[path] for path in four], precision):
            answers = torch_outputs(model, rows, adapter=True).logits
        loss = (
            mean_kl(reference, answers)
            if reference.shape[-1] > 1
            else float(((reference - answers) ** 2).mean())
        )
        suffered[kind] = loss / sum(layers[path].weight.numel() for path in four)
    return sorted(suffered, key=lambda kind: -suffered[kind])


def kinds(model: Any, row: Sequence[int]) -> dict[LayerKind, list[str]]:
    """Kind → paths of its layers, found by running the model on a row of token ids: what reads one
    tensor stands together.
    """
    layers, groups, inputs, hooks = (
        linear_layers(base_of_model(model)),
        dict[int, list[str]](),
        list[Tensor](),
        [],
    )
    for path, layer in layers.items():

        def note(_: Any, given: tuple[Tensor, ...], path: str = path) -> None:
            inputs.append(given[0])  # kept: an id is only one object's while it lives
            groups.setdefault(id(given[0]), []).append(path)

        hooks.append(layer.register_forward_pre_hook(note))
    try:
        torch_outputs(model, [row], adapter=True)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[LayerKind, list[str]] = {}
    for paths in groups.values():
        numbered = [match["end"] for path in paths if (match := NUMBERED.fullmatch(path))]
        if len(numbered) == len(
            paths
        ):  # layers that stand alone, as an output projection, have precisions of their own
            found.setdefault(tuple(numbered), []).extend(paths)
    return found


@contextmanager
def _rounded(layers: Sequence[Any], precision: Precision) -> Iterator[None]:
    """These layers' weights as 4 bits would have them."""
    kept = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            store(layer, quantised_weight(layer, 4, precision, offsets=True))
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
