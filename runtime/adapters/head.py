"""A PEFT folder's task head → the tensors an engine takes: one linear layer, or transformers' own
layers for the family.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetune.core.arrays import Array, Float32
from edgetune.core.head_layers import TRANSFORMERS, HeadLayers
from edgetune.core.layout import ADAPTER_METADATA, PEFT_PREFIX
from edgetune.core.tasks import CLASSIFICATION, REWARD, TAGGING, VALUE
from edgetune.runtime.adapters.lora import LoraFolder
from edgetune.runtime.bundle.manifest import HeadInfo, Manifest
from edgetune.runtime.engine.head import DENSE_LAYER, LORA_A, LORA_B, NORM_LAYER

DENSE_TAGGERS = ("modernbert",)  # families whose tagger has a dense layer before its output


def task_of(read: LoraFolder, manifest: Manifest) -> str | None:
    """What the adapter was trained for; of another tool's, what PEFT's own configuration says."""
    if read.metadata is not None:
        task: str | None = read.metadata.get("task")
        return task
    if not read.head:
        return None
    if read.config.get("task_type") == "TOKEN_CLS":
        return TAGGING
    outputs = _output_rows(read, head_layers_of(read, manifest))
    return REWARD if manifest.is_decoder and outputs == 1 else CLASSIFICATION


def head_layers_of(read: LoraFolder, manifest: Manifest) -> HeadLayers | None:
    """The layers of the adapter's head, where they are transformers' own; None for a linear one."""
    if manifest.head is None or manifest.is_decoder:
        return None
    if read.metadata is not None:
        own = read.metadata.get("head") == TRANSFORMERS
        return manifest.head.layers(str(read.metadata.get("task"))) if own else None
    if not read.head:
        return None
    tags = read.config.get("task_type") == "TOKEN_CLS"
    return manifest.head.layers(TAGGING if tags else CLASSIFICATION)


def described_by_peft(read: LoraFolder, manifest: Manifest) -> dict[str, Any]:
    """What PEFT's own configuration says of an adapter without `edgetune_adapter.json`."""
    task = task_of(read, manifest)
    if task is None or task == REWARD:
        return {} if task is None else {"task": task}
    one = task == CLASSIFICATION and _output_rows(read, head_layers_of(read, manifest)) == 1
    return {"task": task} | ({"problem": "regression"} if one else {})


def labels_of(read: LoraFolder, manifest: Manifest) -> tuple[str, ...] | None:
    """The adapter's labels; those of another tool's head are numbered as transformers does, and a
    single one is a number.
    """
    labels = (read.metadata or {}).get("labels")
    if labels is not None:
        return tuple(str(label) for label in labels)
    task = task_of(read, manifest)
    rows = _output_rows(read, head_layers_of(read, manifest))
    if rows is None or task not in (CLASSIFICATION, TAGGING):
        return None
    if rows == 1 and task == CLASSIFICATION:
        return (VALUE,)
    return tuple(f"LABEL_{i}" for i in range(rows))


def head_problems(
    read: LoraFolder, manifest: Manifest, labels: tuple[str, ...] | None
) -> list[str]:
    """A line for each thing that keeps the head from answering as it was trained."""
    head = manifest.head
    if head is None:
        if not read.head:
            return []
        name, tensor = next(iter(read.head.items()))
        fix = "; export the bundle again" if manifest.is_decoder else ""
        return [f"{PEFT_PREFIX}{name} {tensor.shape}: unknown, this graph takes no task head{fix}"]
    layers = head_layers_of(read, manifest)
    if (read.metadata or {}).get("head") == TRANSFORMERS and layers is None:
        return [f"{ADAPTER_METADATA}: head: this bundle takes only a linear one; export it again"]
    if unlike := _foreign_problem(read, manifest, layers):
        return [unlike]
    problems = _output_problems(read, head, layers, labels, manifest)
    problems += [] if layers is None else _inner_problems(read, head, layers, manifest)
    used = {*_names(_output(read, layers))}
    for layer in () if layers is None else layers.inner:
        used |= _names(layer)
    problems += [
        f"{PEFT_PREFIX}{name} {read.head[name].shape}: unknown, no layer of this head"
        for name in sorted(read.head.keys() - used)
    ]
    return problems


def pack_head(read: LoraFolder, manifest: Manifest) -> dict[str, Float32]:
    """weight (1, hidden, labels) and bias (1, labels); of transformers' layers also those before
    the output that the adapter brings (DENSE_LAYER, NORM_LAYER), transposed likewise, and its
    low-rank weights on the dense layer.
    """
    head, layers = manifest.head, head_layers_of(read, manifest)
    if head is None or not read.head:
        return {}
    found = _pair(read, _output(read, layers), head.weight, head.bias)
    if layers is None:
        return found
    for layer, name in zip(layers.inner, (DENSE_LAYER, NORM_LAYER), strict=False):
        if f"{layer}.weight" in read.head:
            found |= _pair(read, layer, f"{name}.weight", f"{name}.bias")
    a, b = read.head_deltas.get(layers.dense) or (
        np.zeros((0, head.in_features), np.float32),
        np.zeros((head.in_features, 0), np.float32),
    )
    return found | {
        LORA_A: np.ascontiguousarray(a.T[None], np.float32),
        LORA_B: np.ascontiguousarray(b.T[None], np.float32),
    }


def _pair(read: LoraFolder, layer: str, weight_name: str, bias_name: str) -> dict[str, Float32]:
    weight: Array = read.head[f"{layer}.weight"]
    bias = read.head.get(f"{layer}.bias", np.zeros(weight.shape[0], np.float32))
    return {
        weight_name: np.ascontiguousarray(weight.T[None], np.float32),
        bias_name: bias[None].astype(np.float32),
    }


def _names(layer: str) -> set[str]:
    return {f"{layer}.weight", f"{layer}.bias"}


def _output(read: LoraFolder, layers: HeadLayers | None) -> str:
    """The last layer's name."""
    if layers is not None:
        return layers.output
    found = [name for name in ("classifier", "score") if f"{name}.weight" in read.head]
    scores = (read.metadata or {}).get("task") == REWARD or (
        read.config.get("modules_to_save") or ("classifier",)
    )[0] == "score"
    return found[0] if found else "score" if scores else "classifier"


def _output_rows(read: LoraFolder, layers: HeadLayers | None) -> int | None:
    weight = read.head.get(f"{_output(read, layers)}.weight")
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])


def _foreign_problem(read: LoraFolder, manifest: Manifest, layers: HeadLayers | None) -> str | None:
    """Why another tool's head would answer otherwise here than there, where this bundle does not
    know the layers before its output.
    """
    if read.metadata is not None or not read.head or layers is not None:
        return None
    kind = read.config.get("task_type")
    name, tensor = next(iter(read.head.items()))
    if manifest.is_decoder:
        if kind != "TOKEN_CLS":
            return None
        what = "tags words, which a decoder's bundle does not; train an encoder for tags"
        return f"{PEFT_PREFIX}{name} {tensor.shape}: this head {what}"
    if kind == "TOKEN_CLS" and manifest.base.model_type not in DENSE_TAGGERS:
        return None
    return (
        f"{PEFT_PREFIX}{name} {tensor.shape}: this head ({kind or 'no task_type'}) reads what"
        f" transformers' dense layer or pooler of {manifest.base.model_type} gives, which this"
        " bundle does not hold, so it would give other labels; export the bundle again"
    )


def _output_problems(
    read: LoraFolder,
    head: HeadInfo,
    layers: HeadLayers | None,
    labels: tuple[str, ...] | None,
    manifest: Manifest,
) -> list[str]:
    name = _output(read, layers)
    weight, bias = read.head.get(f"{name}.weight"), read.head.get(f"{name}.bias")
    key = f"{PEFT_PREFIX}{name}"
    task = task_of(read, manifest)
    if weight is None:
        heads = (read.metadata or {}).get("task") in (REWARD, CLASSIFICATION, TAGGING)
        wanted = read.modules is not None and (
            bool(read.config.get("modules_to_save")) or bool(read.head) or heads
        )
        return [f"{key}.weight: missing"] if wanted else []
    rows = len(labels) if labels else 1 if task == REWARD else weight.shape[0]
    expected, problems = (rows, head.in_features), []
    if weight.shape != expected:
        problems.append(f"{key}.weight: expected {expected}, got {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        problems.append(f"{key}.bias: expected {weight.shape[:1]}, got {bias.shape}")
    return problems


def _inner_problems(
    read: LoraFolder, head: HeadInfo, layers: HeadLayers, manifest: Manifest
) -> list[str]:
    problems, width = [], head.in_features
    for layer, shape in zip(layers.inner, ((width, width), (width,)), strict=False):
        weight, bias = read.head.get(f"{layer}.weight"), read.head.get(f"{layer}.bias")
        key = f"{PEFT_PREFIX}{layer}"
        if weight is None and layer not in head.own:
            modules = ", ".join(map(repr, layers.modules))
            problems.append(
                f"{key}.weight: missing, and the base has none: PEFT drew it at random and did not"
                f" save it; train with modules_to_save = [{modules}]"
            )
        if weight is not None and weight.shape != shape:
            problems.append(f"{key}.weight: expected {shape}, got {weight.shape}")
        if bias is not None and bias.shape != (width,):
            problems.append(f"{key}.bias: expected {(width,)}, got {bias.shape}")
    for layer, (a, b) in read.head_deltas.items():
        if layer == layers.dense and (a.shape[1], b.shape[0]) != (width, width):
            problems.append(f"{PEFT_PREFIX}{layer}.lora_A.weight: expected {width} columns")
    return problems
