"""A native plan run by numpy: no activation is rounded, weights are what their bytes mean."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from export_helpers import make_adapter
from family_helpers import make_family
from numpy.typing import NDArray

from edgetune.adapters.folder import load_adapter
from edgetune.export.bundle import build_base
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.bundle.native_plan import (
    Embedding,
    Layer,
    NativePlan,
    Norm,
    Product,
    Rotary,
    WeightPlace,
)
from edgetune.runtime.bundle.native_reader import read_native_plan

Array = NDArray[Any]


@dataclass(frozen=True)
class PlanRun:
    """One plan over its data file; `tensors`: an adapter's packed A and B by the inputs' names."""

    plan: NativePlan
    manifest: Manifest
    data: bytes
    tensors: Mapping[str, Array]

    @classmethod
    def open(cls, bundle: Path, manifest: Manifest) -> PlanRun:
        assert manifest.graph.data is not None
        data = (bundle / manifest.graph.data).read_bytes()
        return cls(read_native_plan(bundle, manifest), manifest, data, {})

    def with_adapter(self, tensors: Mapping[str, Array]) -> PlanRun:
        return replace(self, tensors=tensors)

    def logits(self, ids: list[int]) -> Array:
        """(tokens, vocab) in float64."""
        plan = self.plan
        x = self.embedded(plan.embedding, ids)
        for layer in plan.layers:
            a = self.product(layer.attention_out, self.attention(layer, x))
            x = x + self.normed(layer.after_attention, a)
            gate_up = self.product(layer.gate_up, self.normed(layer.mlp_norm, x))
            gate, up = np.split(gate_up, 2, axis=-1)
            down = self.product(layer.down, activated(layer.activation, gate) * up)
            x = x + self.normed(layer.after_mlp, down)
        logits = self.product(plan.head, self.normed(plan.norm, x))
        return capped(logits, plan.logits_softcap)

    def attention(self, layer: Layer, x: Array) -> Array:
        plan, length = self.plan, len(x)
        packed = self.product(layer.qkv, self.normed(layer.attention_norm, x))
        heads = packed.reshape(length, -1, plan.head_dim).transpose(1, 0, 2)
        q, k, v = np.split(heads, [plan.heads, plan.heads + plan.kv_heads])
        q, k = self.normed(layer.q_norm, q), self.normed(layer.k_norm, k)
        if layer.rotary is not None:
            q, k = (self.rotated(plan.rotaries[layer.rotary], one) for one in (q, k))
        k, v = (np.repeat(one, plan.heads // plan.kv_heads, 0) for one in (k, v))
        scores = capped(layer.scale * q @ k.transpose(0, 2, 1), layer.softcap)
        back = np.arange(length)[:, None] - np.arange(length)[None, :]
        seen = (back >= 0) & ((back < layer.window) | (layer.window == 0))
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return out.transpose(1, 0, 2).reshape(length, -1)

    def rotated(self, rotary: Rotary, x: Array) -> Array:
        half = rotary.width // 2
        cos, sin = (
            self.floats(place, rotary.positions, half)[: x.shape[1]]
            for place in (rotary.cos, rotary.sin)
        )
        a, b, rest = np.split(x, [half, rotary.width], axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    def normed(self, norm: Norm | None, x: Array) -> Array:
        if norm is None:
            return x
        assert norm.kind == "rms" and norm.bias is None
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + norm.epsilon)
        return x * scale * self.floats(norm.weight, x.shape[-1])

    def product(self, product: Product, x: Array) -> Array:
        y = self.inputs(product, x) @ self.weight(product).T
        if product.bias is not None:
            y = y + self.floats(product.bias, product.outputs)
        for site in self.manifest.sites:
            if site.name == product.site and site.A in self.tensors:
                low, high = (self.tensors[name].astype(np.float64) for name in (site.A, site.B))
                y = y + x @ low.reshape(low.shape[-2:]) @ high.reshape(high.shape[-2:])
        return y

    def inputs(self, product: Product, x: Array) -> Array:
        """x, and where the weight has columns for them the means of its blocks."""
        if not product.means:
            return x
        means = x.reshape(len(x), -1, product.block_size).mean(-1)
        return np.concatenate([x, means], axis=-1)

    def weight(self, product: Product) -> Array:
        """(outputs, inputs), with the means' columns where there are some."""
        columns = product.inputs
        if product.means:
            columns += columns // product.block_size
        if not product.bits:
            return self.floats(product.weight, product.inputs, product.outputs).T
        return self.dequantised(product, product.outputs, product.blocks)[:, :columns]

    def embedded(self, table: Embedding, ids: list[int]) -> Array:
        if not table.bits:
            return self.floats(table.weight, table.rows, table.columns)[ids] * table.multiplier
        blocks = table.columns // table.block_size
        return self.dequantised(table, table.rows, blocks)[ids] * table.multiplier

    def dequantised(self, matrix: Product | Embedding, rows: int, blocks: int) -> Array:
        values = unpacked(self.bytes(matrix.weight), matrix.bits)
        values = values.reshape(rows, blocks, matrix.block_size).astype(np.float64)
        assert matrix.scales is not None
        scales = self.floats(matrix.scales, rows, blocks)
        zeros: Any = float(1 << (matrix.bits - 1))
        if matrix.zeros is not None:
            zeros = unpacked(self.bytes(matrix.zeros), matrix.bits).reshape(rows, -1)
            zeros = zeros[:, :blocks, None].astype(np.float64)
        return ((values - zeros) * scales[..., None]).reshape(rows, -1)

    def bytes(self, place: WeightPlace) -> Array:
        if place.inline is not None:
            return np.frombuffer(base64.b64decode(place.inline), np.uint8)
        return np.frombuffer(self.data, np.uint8, place.bytes, place.offset)

    def floats(self, place: WeightPlace, *shape: int) -> Array:
        return self.bytes(place).view("<f4").reshape(shape).astype(np.float64)


def unpacked(octets: Array, bits: int) -> Array:
    """Bytes → values; of two 4-bit ones the lower half comes first."""
    return octets if bits == 8 else np.stack([octets & 15, octets >> 4], axis=-1).reshape(-1)


def capped(x: Array, cap: float) -> Array:
    return cap * np.tanh(x / cap) if cap else x


def activated(kind: str, x: Array) -> Array:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        from scipy.special import erf

        return x * 0.5 * (1 + erf(x / np.sqrt(2)))
    assert kind == "gelu_tanh"
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def exact_logits(
    bundle: Path, manifest: Manifest, ids: list[int], tensors: Mapping[str, Array]
) -> Array:
    """(tokens, vocab) of `engine.onnx` in ONNX Runtime, with its products' inputs left in float."""
    model = onnx.load(str(bundle / manifest.graph.engine), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    path = bundle / "exact.onnx"
    onnx.save(model, str(path))
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph, length = manifest.graph, len(ids)
    cache = np.zeros((1, graph.kv_heads or 0, length, graph.head_dim or 0), np.float32)
    feed: dict[str, Array] = {
        "input_ids": np.array([ids]),
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "logits_index": np.arange(length)[None],
    }
    for site in manifest.sites:
        feed[site.A] = np.zeros((1, site.in_features, 0), np.float32)
        feed[site.B] = np.zeros((1, 0, site.out_features), np.float32)
    given = {value.name for value in session.get_inputs()}
    feed |= {name: cache for name in given if name.startswith("past_key_values.")}
    feed |= {
        name: tensor.reshape(1, *tensor.shape[-2:])
        for name, tensor in tensors.items()
        if name in given
    }
    logits: Array = session.run(["logits"], {k: v for k, v in feed.items() if k in given})[0][0]
    return logits


TAKEN: dict[str, set[str]] = {
    "gemma": {"scaled embedding", "tanh"},
    "gemma2": {
        "windows",
        "windows of some layers",
        "softcaps",
        "scaled embedding",
        "norms after",
        "tanh",
    },
    "gemma3_text": {
        "windows",
        "windows of some layers",
        "scaled embedding",
        "norms after",
        "q and k norms",
        "tanh",
        "two tables",
    },
    "llama": set(),
    "mistral": {"windows"},
    "phi3": {"windows", "part of a head"},
    "qwen2": {"biases"},
    "qwen3": {"q and k norms"},
    "smollm3": {"layers not turned"},
}
COPIES = {"llama", "gemma", "mistral"}
PRECISIONS = {
    "fp32": Precision("fp32"),
    "int8": Precision("int8"),
    "int4": Precision("int4", overrides={"lm_head": "int8"}),
}
IDS = np.random.default_rng(0).integers(5, 300, 23).tolist()


@dataclass
class Family:
    """A tiny model, its adapter, and bundles without proof in every precision."""

    base: Path
    adapter: Path
    folder: Path
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def build(self, precision: Precision, name: str) -> tuple[Path, Manifest]:
        """The bundle of this name, made the first time."""
        out = self.folder / name
        if name not in self.manifests:
            out.mkdir()
            base = resolve_base(str(self.base))
            self.manifests[name] = build_base(base, out, precision=precision)
        return out, self.manifests[name]

    def torch_logits(self, *, adapter: bool) -> Array:
        model: Any = load_body(resolve_base(str(self.base)))
        if adapter:
            model = load_adapter(model, self.adapter)
        with torch.no_grad():
            return np.asarray(model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0])


def make(name: str, like: Path, folder: Path, **values: Any) -> Family:
    base = make_family(name, like, folder / name, **values)
    return Family(base, make_adapter(base, folder / "adapter", strength=0.2), folder)
