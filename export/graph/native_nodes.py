"""What a native plan is made of, read off single nodes of the lowered graph: products, norms, the
token embedding, places of tensors.

Everything is matched exactly: an operator, an attribute or an input that is not expected here
raises `NotExpressibleError`, because a plan that left it out would give other answers.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetune.export.graph.fuse import MICROSOFT
from edgetune.export.graph.onnx_file import DATA
from edgetune.runtime.bundle.manifest import Site
from edgetune.runtime.bundle.native_plan import INLINE_BYTES, Embedding, Norm, Product, WeightPlace

FLOAT, BYTES = ir.DataType.FLOAT, ir.DataType.UINT8
ANY, UNKNOWN = object(), object()
NORM = "SimplifiedLayerNormalization"
SKIP_NORM = f"Skip{NORM}"


class NotExpressibleError(Exception):
    """The graph has something that no plan can say; the message is for people."""


class Nodes:
    """The nodes of one graph; remembers which of them the plan has taken in."""

    def __init__(self, graph: ir.Graph, sites: tuple[Site, ...]) -> None:
        self.graph, self.taken = graph, set[ir.Node]()
        self.sites = {site.A: site for site in sites}

    def maker(self, value: ir.Value | None, *operators: str) -> ir.Node:
        """The node that makes a value, taken in; it is one of these operators."""
        node = None if value is None else value.producer()
        if node is None or node.op_type not in operators:
            raise NotExpressibleError(
                f"its graph has {_called(node, value)} where {' or '.join(operators)} is expected"
            )
        if node.domain not in ("", MICROSOFT):
            raise NotExpressibleError(f"its graph has {_called(node, value)} of {node.domain}")
        self.taken.add(node)
        return node

    def is_made_by(self, value: ir.Value | None, operator: str) -> bool:
        """Whether a node of this operator makes the value."""
        node = None if value is None else value.producer()
        return node is not None and node.op_type == operator

    def demand(self, true: bool, node: ir.Node) -> None:
        """NotExpressibleError that names the node, unless `true`."""
        if not true:
            raise NotExpressibleError(f"its graph has {_called(node, None)} in a form of its own")

    def attributes(self, node: ir.Node, **known: Any) -> dict[str, Any]:
        """The node's attributes; one that is not `known` is refused.

        Of a known one the value is what it has to be where the node has it; ANY: the node has it,
        with any value; None: it may be missing, and is None then.
        """
        values = {name: _as_written(attr.value) for name, attr in node.attributes.items()}
        for name, value in values.items():
            self.demand(
                name in known and (known[name] in (ANY, None) or known[name] == value), node
            )
        self.demand(all(name in values for name in known if known[name] is ANY), node)
        return known | values

    def inputs(self, node: ir.Node, *, least: int, most: int) -> list[ir.Value | None]:
        """The node's inputs, filled up with None to `most`."""
        self.demand(least <= len(node.inputs) <= most, node)
        return [*node.inputs, *[None] * (most - len(node.inputs))]

    def split_sizes(self, split: ir.Node, width: int) -> list[int]:
        """Widths of the parts that a Split makes of the last dimension."""
        given = self.attributes(split, axis=ANY, num_outputs=None)
        self.demand(given["axis"] in (-1, 2), split)
        if len(split.inputs) == 2:
            return [int(size) for size in self.numbers(split.inputs[1], split)]
        count = len(split.outputs)
        self.demand(given["num_outputs"] in (None, count) and width % count == 0, split)
        return [width // count] * count

    def numbers(self, value: ir.Value | None, node: ir.Node) -> np.ndarray:
        """A small constant that the node reads."""
        tensor = None if value is None else value.const_value
        self.demand(tensor is not None and value is not None and not value.is_graph_input(), node)
        assert tensor is not None
        return np.asarray(tensor.numpy())

    def number(self, value: ir.Value | None, node: ir.Node) -> float:
        """A constant of one float32."""
        array = self.numbers(value, node)
        self.demand(array.dtype == np.float32 and array.size == 1, node)
        return float(array.reshape(-1)[0])

    def place(
        self,
        value: ir.Value | None,
        node: ir.Node,
        *,
        shape: tuple[int, ...],
        dtype: ir.DataType = FLOAT,
    ) -> WeightPlace:
        """Where a constant of this shape lies; one dimension instead of two is the same bytes."""
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.dtype != dtype:
            kind = "no constant" if tensor is None else tensor.dtype.name.lower()
            raise NotExpressibleError(f"its graph's {_called(node, None)} reads {kind}")
        got = tuple(int(size) for size in tensor.shape.numpy())
        self.demand(got == shape or got == (int(np.prod(shape)),), node)
        if isinstance(tensor, ir.ExternalTensor):
            self.demand(str(tensor.location) == DATA and tensor.offset is not None, node)
            return WeightPlace(int(tensor.offset or 0), tensor.nbytes)
        self.demand(tensor.nbytes <= INLINE_BYTES, node)
        return WeightPlace(0, tensor.nbytes, base64.b64encode(tensor.tobytes()).decode())

    def product(self, value: ir.Value | None) -> tuple[Product, ir.Value | None]:
        """The linear layer that makes a value, its adapter included, and what it reads."""
        value, site, source = self._adapter(value)
        bias = None
        if self.is_made_by(value, "Add"):
            add = self.maker(value, "Add")
            value, bias = add.inputs
        node = self.maker(value, "MatMul", "MatMulNBits")
        if node.op_type == "MatMul":
            product, read = self._float_product(node, bias)
        else:
            self.demand(bias is None, node)
            product, read = self._block_product(node)
        if site is None:
            return product, read
        self.demand(read is source, node)
        fits = (site.in_features, site.out_features) == (product.inputs, product.outputs)
        self.demand(fits, node)
        return replace(product, site=site.name), read

    def _adapter(
        self, value: ir.Value | None
    ) -> tuple[ir.Value | None, Site | None, ir.Value | None]:
        """base + (x A) B → base, the site of A and B, x; any other value as it is."""
        add = value.producer() if value is not None else None
        up = add.inputs[1] if add is not None and add.op_type == "Add" else None
        if up is None or not self.is_made_by(up, "MatMul"):
            return value, None, None
        add, up_node = self.maker(value, "Add"), self.maker(up, "MatMul")
        down = self.maker(up_node.inputs[0], "MatMul")
        low, high = down.inputs[1], up_node.inputs[1]
        site = self.sites.get(low.name or "") if low is not None else None
        self.demand(site is not None and high is not None and high.name == site.B, add)
        return add.inputs[0], site, down.inputs[0]

    def _float_product(
        self, node: ir.Node, bias: ir.Value | None
    ) -> tuple[Product, ir.Value | None]:
        source, weight = node.inputs
        columns, rows = self._sizes(weight, node, rank=2)
        product = Product(
            outputs=rows,
            inputs=columns,
            bits=0,
            block_size=0,
            weight=self.place(weight, node, shape=(columns, rows)),
            bias=None if bias is None else self.place(bias, node, shape=(rows,)),
        )
        return product, source

    def _block_product(self, node: ir.Node) -> tuple[Product, ir.Value | None]:
        sizes = self.attributes(node, K=ANY, N=ANY, bits=ANY, block_size=ANY, accuracy_level=None)
        source, weight, scales, zeros, order, bias = self.inputs(node, least=3, most=6)
        self.demand(order is None, node)
        size, rows, columns = sizes["block_size"], sizes["N"], sizes["K"]
        means = self.is_made_by(source, "Concat")
        if means:
            columns = columns * size // (size + 1)
            self.demand(columns % size == 0 and columns + columns // size == sizes["K"], node)
            source = self._without_means(source, size, columns)
        blocks = -(-sizes["K"] // size)
        product = Product(
            outputs=rows,
            inputs=columns,
            bias=None if bias is None else self.place(bias, node, shape=(rows,)),
            means=means,
            **self._stored(weight, scales, zeros, node, (rows, blocks, size, sizes["bits"])),
        )
        return product, source

    def _without_means(self, value: ir.Value | None, size: int, columns: int) -> ir.Value | None:
        """[x, the mean of x over each block] → x."""
        concat = self.maker(value, "Concat")
        self.attributes(concat, axis=-1)
        self.demand(len(concat.inputs) == 2, concat)
        source, means = concat.inputs
        node = self.maker(means, "AveragePool", "MatMul")
        if node.op_type == "AveragePool":
            given = self.attributes(node, kernel_shape=ANY, strides=ANY)
            same = [*given["kernel_shape"]] == [*given["strides"]] == [size]
        else:
            blocks = np.repeat(np.eye(columns // size, dtype=np.float32), size, 0)
            same = np.array_equal(self.numbers(node.inputs[1], node), blocks / np.float32(size))
        self.demand(same and node.inputs[0] is source, node)
        return source

    def _stored(
        self,
        weight: ir.Value | None,
        scales: ir.Value | None,
        zeros: ir.Value | None,
        node: ir.Node,
        shape: tuple[int, int, int, int],
    ) -> dict[str, Any]:
        """Fields of a weight in blocks; `shape`: rows, blocks a row, block size, bits."""
        rows, blocks, size, bits = shape
        self.demand(bits in (4, 8), node)
        octets, packed = size * bits // 8, -(-blocks * bits // 8)
        flat = node.op_type == "GatherBlockQuantized"
        full = (rows, blocks * octets) if flat else (rows, blocks, octets)
        return {
            "bits": bits,
            "block_size": size,
            "weight": self.place(weight, node, shape=full, dtype=BYTES),
            "scales": self.place(scales, node, shape=(rows, blocks)),
            "zeros": (
                None
                if zeros is None
                else self.place(zeros, node, shape=(rows, packed), dtype=BYTES)
            ),
        }

    def _sizes(self, value: ir.Value | None, node: ir.Node, *, rank: int) -> tuple[int, ...]:
        tensor = None if value is None else value.const_value
        self.demand(tensor is not None and len(tensor.shape) == rank, node)
        assert tensor is not None
        return tuple(int(size) for size in tensor.shape.numpy())

    def norm(self, node: ir.Node, weight: ir.Value | None, width: int) -> Norm:
        """The norm of a node that is taken in already; `width` numbers are normed together."""
        given = self.attributes(node, epsilon=ANY, axis=-1, stash_type=1)
        return Norm("rms", float(given["epsilon"]), self.place(weight, node, shape=(width,)))

    def plain_norm(self, value: ir.Value | None, width: int) -> tuple[Norm | None, ir.Value | None]:
        """The norm that makes a value, and what it reads; None and the value where none does."""
        if not self.is_made_by(value, NORM):
            return None, value
        node = self.maker(value, NORM)
        self.demand(len(node.inputs) == 2, node)
        return self.norm(node, node.inputs[1], width), node.inputs[0]

    def embedding(self, value: ir.Value | None, columns: int) -> Embedding:
        """The rows of the token table that a value is, times a number or not."""
        multiplier = 1.0
        if self.is_made_by(value, "Mul"):
            node = self.maker(value, "Mul")
            multiplier, value = self.number(node.inputs[1], node), node.inputs[0]
        node = self.maker(value, "Gather", "GatherBlockQuantized")
        table, ids, scales, zeros = self.inputs(node, least=2, most=4)
        self.demand(is_input(ids, "input_ids"), node)
        rows, _ = self._sizes(table, node, rank=2)
        if node.op_type == "Gather":
            self.attributes(node, axis=0)
            place = self.place(table, node, shape=(rows, columns))
            return Embedding(rows, columns, 0, 0, place, None, None, multiplier)
        given = self.attributes(node, bits=ANY, block_size=ANY, gather_axis=0, quantize_axis=1)
        size = given["block_size"]
        self.demand(columns % size == 0, node)
        shape = (rows, columns // size, size, given["bits"])
        stored = self._stored(table, scales, zeros, node, shape)
        return Embedding(rows=rows, columns=columns, multiplier=multiplier, **stored)


def is_input(value: ir.Value | None, name: str) -> bool:
    """Whether a value is the graph's input of this name."""
    return value is not None and value.is_graph_input() and value.name == name


def _as_written(value: Any) -> Any:
    """An attribute as the file has it: in memory a float may have more digits."""
    return float(np.float32(value)) if isinstance(value, float) else value


def _called(node: ir.Node | None, value: ir.Value | None) -> str:
    """A node by its operator and name, or the value that no node makes."""
    if node is None:
        return f"the value {None if value is None else value.name}"
    return f"{node.op_type} ({node.name})"
