"""`native.json`: one decoder for the native engine: its sizes, what each layer computes, and where
every tensor lies in `model.onnx.data`.

The exporter reads it off the finished graph, `native_reader` reads and checks the file, and the
native engine runs it without any graph. Everything is float32 unless it is said otherwise. A
token's way:

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

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgetune.core.settings import about
from edgetune.runtime.bundle.manifest import MAX_SIZE

PLAN_VERSION = 1
MAX_FACTOR = 1e6
"""Of what numbers are multiplied by: far above any model's, far below float32's end."""
INLINE_BYTES = 1024
"""A constant of at most so many bytes lies in the graph and not in the data file."""


@dataclass(frozen=True)
class WeightPlace:
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
    weight: WeightPlace
    scales: WeightPlace | None = None
    zeros: WeightPlace | None = None
    means: bool = False
    bias: WeightPlace | None = None
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
    weight: WeightPlace
    bias: WeightPlace | None = None


@dataclass(frozen=True)
class Rotary:
    """Tables cos and sin (positions, width / 2) that turn the first `width` dimensions of a head:
    a, b of width / 2 each → a · cos − b · sin, b · cos + a · sin.
    """

    cos: WeightPlace
    sin: WeightPlace
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
    scale: float = field(metadata=about(above=0.0, at_most=MAX_FACTOR))
    window: int = field(metadata=about(at_least=0, at_most=MAX_SIZE))
    softcap: float = field(metadata=about(at_least=0.0, at_most=MAX_FACTOR))
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
    weight: WeightPlace
    scales: WeightPlace | None
    zeros: WeightPlace | None
    multiplier: float = field(metadata=about(at_least=-MAX_FACTOR, at_most=MAX_FACTOR))


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
    logits_softcap: float = field(metadata=about(at_least=0.0, at_most=MAX_FACTOR))
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
