"""Reads `native.json` strictly: a plan is data from somewhere else, and the native engine reads
memory by it.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import BundleError
from edgetune.core.files import read_json
from edgetune.core.settings import from_dict, shown
from edgetune.runtime.bundle.manifest import GraphInfo, Manifest, Site
from edgetune.runtime.bundle.native_plan import (
    INLINE_BYTES,
    PLAN_VERSION,
    Embedding,
    Layer,
    NativePlan,
    Norm,
    Product,
    Rotary,
    WeightPlace,
)

PLACE_ALIGNMENT = 64  # of every tensor in the data file, bytes: exporters write whole pages
MAX_LAYERS = 1024
FLOAT_BYTES = 4  # bytes


def read_native_plan(folder: str | Path, manifest: Manifest) -> NativePlan:
    """Read and check the plan of a bundle whose manifest names one. BundleError names the file, the
    field, expected and got.
    """
    graph = manifest.graph
    if graph.native is None or graph.data is None:
        raise BundleError("this bundle has no native plan", where=str(folder))
    path, data = Path(folder) / graph.native, Path(folder) / graph.data
    document = read_json(path, error=BundleError)
    try:
        data_bytes = data.stat().st_size
    except OSError as problem:
        raise BundleError(f"cannot be read: {problem.strerror}", where=str(data)) from problem
    return native_plan_from_dict(
        document, graph, manifest.sites, data_bytes=data_bytes, where=str(path)
    )


def native_plan_from_dict(
    document: Any,
    graph: GraphInfo,
    sites: tuple[Site, ...],
    *,
    data_bytes: int,
    where: str,
) -> NativePlan:
    """Build a NativePlan from parsed JSON; BundleError for a missing or unknown field, a wrong
    type, sizes that do not fit each other, the manifest or the data file of `data_bytes`.
    """
    if not isinstance(document, dict):
        raise BundleError(
            "a native plan is a JSON object", where=where, got=type(document).__name__
        )
    if document.get("version") != PLAN_VERSION:
        raise BundleError(
            "the native plan has another version",
            where=where,
            expected=str(PLAN_VERSION),
            got=shown(document.get("version")),
            fix="Export the bundle again with this version of edgetune, or upgrade edgetune.",
        )
    plan = from_dict(
        NativePlan,
        document,
        where=where,
        error=BundleError,
        table="an object",
        fix="The bundle was written by another version of edgetune: export it again.",
    )
    _Check(plan, where, data_bytes).all(graph, sites)
    return plan


@dataclass(frozen=True)
class _Check:
    """A plan's sizes against each other, against the manifest and against the data file."""

    plan: NativePlan
    where: str
    data_bytes: int

    def all(self, graph: GraphInfo, sites: tuple[Site, ...]) -> None:
        plan = self.plan
        self.same("hidden", plan.hidden, graph.hidden_size)
        self.same("vocab", plan.vocab, graph.vocab_size)
        self.same("kv_heads", plan.kv_heads, graph.kv_heads)
        self.same("head_dim", plan.head_dim, graph.head_dim)
        self.same("number of layers", len(plan.layers), graph.layers)
        self.that(1 <= len(plan.layers) <= MAX_LAYERS, "layers", f"1 to {MAX_LAYERS}")
        self.that(plan.heads % plan.kv_heads == 0, "heads", "a multiple of kv_heads")
        self.same("embedding.rows", plan.embedding.rows, plan.vocab)
        self.same("embedding.columns", plan.embedding.columns, plan.hidden)
        self.matrix("embedding", plan.embedding, blocks=self.embedding_blocks())
        for at, rotary in enumerate(plan.rotaries):
            self.rotary(f"rotaries.{at}", rotary, graph.max_length)
        for at, layer in enumerate(plan.layers):
            self.layer(f"layers.{at}", layer)
        self.norm("norm", plan.norm, plan.hidden)
        self.product("head", plan.head, plan.hidden, plan.vocab)
        self.sites(sites)

    def layer(self, name: str, layer: Layer) -> None:
        plan = self.plan
        for norm in ("attention_norm", "after_attention", "mlp_norm", "after_mlp"):
            self.norm(f"{name}.{norm}", getattr(layer, norm), plan.hidden)
        for norm in ("q_norm", "k_norm"):
            self.norm(f"{name}.{norm}", getattr(layer, norm), plan.head_dim)
        if layer.rotary is not None:
            self.that(
                0 <= layer.rotary < len(plan.rotaries), f"{name}.rotary", "an index of rotaries"
            )
        queries, width = plan.heads * plan.head_dim, layer.down.inputs
        packed = queries + 2 * plan.kv_heads * plan.head_dim
        self.product(f"{name}.qkv", layer.qkv, plan.hidden, packed)
        self.product(f"{name}.attention_out", layer.attention_out, queries, plan.hidden)
        self.product(f"{name}.gate_up", layer.gate_up, plan.hidden, 2 * width)
        self.product(f"{name}.down", layer.down, width, plan.hidden)

    def sites(self, sites: tuple[Site, ...]) -> None:
        """Every site of the manifest is one product: an adapter that enters nowhere would answer as
        the base.
        """
        named = [(product.site, product) for _, product in self.plan.products() if product.site]
        expected = {site.name: (site.in_features, site.out_features) for site in sites}
        found = {name: (product.inputs, product.outputs) for name, product in named}
        self.that(len(found) == len(named), "site", "one product a site")
        if different := sorted(
            name for name in expected | found if expected.get(name) != found.get(name)
        ):
            raise self.error(
                f"the site {different[0]:.80}",
                f"in, out {expected.get(different[0])} as in the manifest",
                str(found.get(different[0])),
            )

    def product(self, name: str, product: Product, inputs: int, outputs: int) -> None:
        self.same(f"{name}.inputs", product.inputs, inputs)
        self.same(f"{name}.outputs", product.outputs, outputs)
        if product.bits and product.means:
            self.block_size(name, product.bits, product.block_size)
            whole = product.inputs % product.block_size == 0
            self.that(whole, f"{name}.inputs", "whole blocks where there are means")
        self.that(product.bits != 0 or not product.means, f"{name}.means", "false in float32")
        blocks = product.blocks if product.bits and product.block_size > 0 else 0
        self.matrix(name, product, blocks=blocks)
        self.place(f"{name}.bias", product.bias, product.outputs * FLOAT_BYTES)

    def embedding_blocks(self) -> int:
        table = self.plan.embedding
        if not table.bits or table.block_size <= 0:
            return 0
        whole = table.columns % table.block_size == 0
        self.that(whole, "embedding.columns", "whole blocks")
        return table.columns // table.block_size

    def matrix(self, name: str, matrix: Product | Embedding, *, blocks: int) -> None:
        """Weight, scales and zeros of `blocks` a row."""
        rows, columns = (
            (matrix.outputs, matrix.inputs)
            if isinstance(matrix, Product)
            else (matrix.rows, matrix.columns)
        )
        if not matrix.bits:
            plain = matrix.scales is None and matrix.zeros is None and matrix.block_size == 0
            self.that(plain, name, "no scales, no zeros and block_size 0 in float32")
            self.place(f"{name}.weight", matrix.weight, rows * columns * FLOAT_BYTES)
            return
        self.block_size(name, matrix.bits, matrix.block_size)
        self.that(matrix.scales is not None, f"{name}.scales", "a place")
        octets = blocks * matrix.block_size * matrix.bits // 8
        self.place(f"{name}.weight", matrix.weight, rows * octets)
        self.place(f"{name}.scales", matrix.scales, rows * blocks * FLOAT_BYTES)
        self.place(f"{name}.zeros", matrix.zeros, rows * -(-blocks * matrix.bits // 8))

    def block_size(self, name: str, bits: int, size: int) -> None:
        self.that(bits in (4, 8), f"{name}.bits", "0, 4 or 8")
        powers = size in (16, 32, 64, 128, 256)
        self.that(powers, f"{name}.block_size", "16, 32, 64, 128 or 256")

    def norm(self, name: str, norm: Norm | None, width: int) -> None:
        if norm is not None:
            self.place(f"{name}.weight", norm.weight, width * FLOAT_BYTES)
            self.place(f"{name}.bias", norm.bias, width * FLOAT_BYTES)
            self.that(norm.kind == "layer" or norm.bias is None, f"{name}.bias", "null for rms")

    def rotary(self, name: str, rotary: Rotary, length: int) -> None:
        fits = rotary.width % 2 == 0 and rotary.width <= self.plan.head_dim
        self.that(fits, f"{name}.width", "an even number of at most head_dim")
        self.that(rotary.positions >= length, f"{name}.positions", f"at least {length}")
        for part in ("cos", "sin"):
            size = rotary.positions * (rotary.width // 2) * FLOAT_BYTES
            self.place(f"{name}.{part}", getattr(rotary, part), size)

    def place(self, name: str, place: WeightPlace | None, size: int) -> None:
        """A tensor of `size` bytes is there, whole."""
        if place is None:
            return
        self.same(f"{name}.bytes", place.bytes, size)
        if place.inline is None:
            end = place.offset + place.bytes
            self.that(
                place.offset % PLACE_ALIGNMENT == 0,
                f"{name}.offset",
                f"a multiple of {PLACE_ALIGNMENT}",
            )
            if end > self.data_bytes:
                raise self.error(name, f"an end at {self.data_bytes} or before", str(end))
            return
        try:
            stored = len(base64.b64decode(place.inline, validate=True))
        except (binascii.Error, ValueError) as problem:
            raise self.error(f"{name}.inline", "base64", shown(place.inline)) from problem
        self.that(stored <= INLINE_BYTES, f"{name}.inline", f"at most {INLINE_BYTES} bytes")
        self.that(place.offset == 0, f"{name}.offset", "0 where the bytes are inline")
        self.same(f"{name}.inline", stored, size)

    def same(self, name: str, got: int, expected: int | None) -> None:
        if got != expected:
            raise self.error(name, str(expected), str(got))

    def that(self, true: bool, name: str, expected: str) -> None:
        if not true:
            raise self.error(name, expected, "")

    def error(self, what: str, expected: str, got: str) -> BundleError:
        return BundleError(
            f"the native plan does not fit: {what}",
            where=self.where,
            expected=expected,
            got=got,
            fix="Copy the bundle again, or export it again.",
        )
