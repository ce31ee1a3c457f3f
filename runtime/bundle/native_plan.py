"""`native.json`: one decoder for the native engine: its sizes, what each layer computes, and where
every tensor lies in `model.onnx.data`.

The exporter reads it off the finished graph; the native engine runs it without any graph.
Everything is float32 unless it is said otherwise. A token's way:

    x = multiplier · embedding[token]                            (hidden,)
    for each layer:
        q, k, v = qkv(attention_norm(x));  q_norm, k_norm on each head;  rotary on q and k
        a = attention_out(softmax(softcap(scale · q kᵀ)) v)
        x = x + after_attention(a)
        gate, up = gate_up(mlp_norm(x))
        x = x + after_mlp(down(activation(gate) · up))
    logits = softcap(head(norm(x)))                              (vocab,)

`softcap(s)` is c · tanh(s / c), or s itself where c is 0. An adapter adds (x A) B to a product that
has a site, where x is what the product reads, before anything else reads the result.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.core.errors import BundleError
from edgetune.core.files import read_json
from edgetune.core.settings import about, from_dict, shown
from edgetune.runtime.bundle.manifest import MAX_SIZE, GraphInfo, Manifest, Site

VERSION = 1
INLINE_BYTES = 1024
"""A constant of at most so many bytes lies in the graph and not in the data file."""
ALIGNMENT = 64  # of every tensor in the data file, bytes: exporters write whole pages
MAX_LAYERS = 1024
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie, little-endian: `offset` into `model.onnx.data`, or `inline`, the
    bytes themselves in base64 (then `offset` is 0).
    """

    offset: int = field(metadata=about(at_least=0))
    bytes: int = field(metadata=about(at_least=1))
    inline: str | None = None


@dataclass(frozen=True)
class Product:
    """One linear layer, y = W x + bias, with `outputs` N and `inputs` K.

    `bits` 0: `weight` is float32 (K, N), as ONNX's MatMul has it; `block_size` is 0. 4 or 8:
    unsigned integers as MatMulNBits has them, `weight` (N, blocks, block_size · bits / 8) bytes
    (of two 4-bit values the lower half comes first), `scales` (N, blocks), `zeros` None (8 or 128
    everywhere) or (N, blocks) bytes, in 4 bits (N, ceil(blocks / 2)); w = scale · (value − zero).
    `means`: the weight has one more column for each block of x, which reads that block's mean;
    these columns follow the K others in further blocks, the last filled up with columns that read
    nothing. `site`: the manifest's Site whose adapter adds to this product.
    """

    outputs: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    inputs: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    bits: int
    block_size: int
    weight: Place
    scales: Place | None = None
    zeros: Place | None = None
    means: bool = False
    bias: Place | None = None
    site: str | None = None

    @property
    def blocks(self) -> int:
        """Blocks of a stored row, those of the means included."""
        own = -(-self.inputs // self.block_size)
        return own + -(-own // self.block_size) if self.means else own


@dataclass(frozen=True)
class Norm:
    """rms: weight · x / sqrt(mean(x²) + epsilon). layer: of x − mean(x), and bias (or none) added.

    `weight` is what is multiplied by, even where a family keeps it less 1.
    """

    kind: str = field(metadata=about(choices=("rms", "layer")))
    epsilon: float = field(metadata=about(at_least=0.0, at_most=1.0))
    weight: Place
    bias: Place | None = None


@dataclass(frozen=True)
class Rotary:
    """Tables cos and sin (positions, width / 2) that turn the first `width` dimensions of a head:
    a, b of width / 2 each → a · cos − b · sin, b · cos + a · sin.
    """

    cos: Place
    sin: Place
    positions: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    width: int = field(metadata=about(at_least=2, at_most=MAX_SIZE))


@dataclass(frozen=True)
class Layer:
    """One decoder layer; see this file's first lines for the order.

    `qkv` gives q (heads · head_dim), k and v (kv_heads · head_dim each) side by side; `gate_up` the
    gate and then as much of up. `q_norm`, `k_norm`: weights (head_dim,), the same for every head.
    `rotary`: index into the plan's `rotaries`, None: not turned. `window`: tokens that a query
    sees, itself included; 0: all before it. `softcap` of the scores, 0: none. `after_attention`,
    `after_mlp`: of a branch, before it is added.
    """

    attention_norm: Norm
    qkv: Product
    q_norm: Norm | None
    k_norm: Norm | None
    rotary: int | None
    scale: float = field(metadata=about(above=0.0))
    window: int = field(metadata=about(at_least=0, at_most=MAX_SIZE))
    softcap: float = field(metadata=about(at_least=0.0))
    attention_out: Product
    after_attention: Norm | None
    mlp_norm: Norm
    gate_up: Product
    activation: str = field(metadata=about(choices=("silu", "gelu", "gelu_tanh")))
    down: Product
    after_mlp: Norm | None


@dataclass(frozen=True)
class Embedding:
    """The token embedding (rows, columns), each value times `multiplier`.

    `bits` 0: float32. 4 or 8: the bytes, scales and zeros of a Product (rows, columns) without
    means; a tied output projection has the same places.
    """

    rows: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    columns: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    bits: int
    block_size: int
    weight: Place
    scales: Place | None
    zeros: Place | None
    multiplier: float


@dataclass(frozen=True)
class NativePlan:
    """The whole of `native.json`. `logits_softcap` 0: none."""

    version: int
    hidden: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    vocab: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    heads: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    kv_heads: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    head_dim: int = field(metadata=about(at_least=1, at_most=MAX_SIZE))
    embedding: Embedding
    layers: tuple[Layer, ...]
    norm: Norm
    head: Product
    logits_softcap: float = field(metadata=about(at_least=0.0))
    rotaries: tuple[Rotary, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, ready for `write_json`."""
        return dataclasses.asdict(
            self,
            dict_factory=lambda pairs: {k: v for k, v in pairs if k != "inline" or v is not None},
        )

    def products(self) -> Iterator[tuple[str, Product]]:
        """Every linear layer with its name in the plan, in the order in which they run."""
        for at, layer in enumerate(self.layers):
            for name in ("qkv", "attention_out", "gate_up", "down"):
                yield f"layers.{at}.{name}", getattr(layer, name)
        yield "head", self.head


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
    if document.get("version") != VERSION:
        raise BundleError(
            "the native plan has another version",
            where=where,
            expected=str(VERSION),
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
        self.place(f"{name}.bias", product.bias, product.outputs * FLOAT)

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
            self.place(f"{name}.weight", matrix.weight, rows * columns * FLOAT)
            return
        self.block_size(name, matrix.bits, matrix.block_size)
        self.that(matrix.scales is not None, f"{name}.scales", "a place")
        octets = blocks * matrix.block_size * matrix.bits // 8
        self.place(f"{name}.weight", matrix.weight, rows * octets)
        self.place(f"{name}.scales", matrix.scales, rows * blocks * FLOAT)
        self.place(f"{name}.zeros", matrix.zeros, rows * -(-blocks * matrix.bits // 8))

    def block_size(self, name: str, bits: int, size: int) -> None:
        self.that(bits in (4, 8), f"{name}.bits", "0, 4 or 8")
        powers = size in (16, 32, 64, 128, 256)
        self.that(powers, f"{name}.block_size", "16, 32, 64, 128 or 256")

    def norm(self, name: str, norm: Norm | None, width: int) -> None:
        if norm is not None:
            self.place(f"{name}.weight", norm.weight, width * FLOAT)
            self.place(f"{name}.bias", norm.bias, width * FLOAT)
            self.that(norm.kind == "layer" or norm.bias is None, f"{name}.bias", "null for rms")

    def rotary(self, name: str, rotary: Rotary, length: int) -> None:
        fits = rotary.width % 2 == 0 and rotary.width <= self.plan.head_dim
        self.that(fits, f"{name}.width", "an even number of at most head_dim")
        self.that(rotary.positions >= length, f"{name}.positions", f"at least {length}")
        for part in ("cos", "sin"):
            size = rotary.positions * (rotary.width // 2) * FLOAT
            self.place(f"{name}.{part}", getattr(rotary, part), size)

    def place(self, name: str, place: Place | None, size: int) -> None:
        """A tensor of `size` bytes is there, whole."""
        if place is None:
            return
        self.same(f"{name}.bytes", place.bytes, size)
        if place.inline is None:
            end = place.offset + place.bytes
            self.that(place.offset % ALIGNMENT == 0, f"{name}.offset", f"a multiple of {ALIGNMENT}")
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
