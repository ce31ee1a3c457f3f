"""The last passes: edgetune's linear layers and embeddings → the engine's operators, with adapter
and head inputs.

A packed linear layer is one `MatMul` or `MatMulNBits`; where a kept grid has offsets, two small
nodes before it append the means of x over each block, which the offsets' columns multiply. Where
adapters are inputs, three nodes follow it: y = W₀x + (xA)B with A (group, in, rank) and B (group,
rank, out); group is 1 (one adapter for the batch) or the batch.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgetune.export.graph.deberta import LINEAR_ROWS
from edgetune.export.graph.deberta_adapters import add_to_rows
from edgetune.export.graph.fuse import MICROSOFT, constant, drop_dead, new_node
from edgetune.export.graph.reshapes import replace
from edgetune.export.graph.symbolic_layers import DOMAIN
from edgetune.quantisation.blocks import Quantised, quantise
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import Part, Site

# activations in int8 inside MatMulNBits; level 1 (fp32) costs a third of decode speed
ACCURACY_LEVEL = 4


class _Lowering:
    """One walk over the graph; remembers what was quantised, so that a tied weight is stored
    once.
    """

    def __init__(self, model: ir.Model, precision: Precision) -> None:
        self.graph, self.precision = model.graph, precision
        self.quantised: dict[str, Quantised] = {}
        nodes = [
            node for node in model.graph if node.domain == DOMAIN and node.op_type == "Embedding"
        ]
        self.tables = {table.name for node in nodes if (table := node.inputs[1]) is not None}

    def linear(self, node: ir.Node) -> ir.Value:
        """Replace a Linear or Packed node by one matrix product; returns its result."""
        modules, _ = modules_and_widths(node)
        count = len(modules)
        source, weights, biases = (
            node.inputs[0],
            node.inputs[1 : 1 + count],
            node.inputs[1 + count :],
        )
        stacked = torch.cat([_torch(value) for value in weights])  # type: ignore[arg-type]
        bias = torch.cat([_torch(value) for value in biases]) if biases else None  # type: ignore[arg-type]
        name = _name(node)
        bits = self.precision.bits(modules)
        if bits == 8 and self.precision.activations == "int8":
            return self._dynamic(node, source, stacked, bias, name=name)
        if bits:
            tied = weights[0].name if count == 1 and weights[0] is not None else None
            return self._quantised(node, source, stacked, bias, bits=bits, name=name, tied=tied)
        weight = constant(self.graph, f"{name}.weight", stacked.t().contiguous().numpy())
        product = new_node(self.graph, node, "MatMul", [source, weight], name=name)[0]
        if bias is None:
            return product
        return new_node(
            self.graph, node, "Add", [product, constant(self.graph, f"{name}.bias", bias.numpy())]
        )[0]

    def _dynamic(
        self,
        node: ir.Node,
        source: ir.Value | None,
        weight: Tensor,
        bias: Tensor | None,
        *,
        name: str,
    ) -> ir.Value:
        """One product of 8-bit integers: the input rounded with one scale for all of it, the weight
        with one an output.
        """
        columns = weight.shape[1]
        q = quantise(weight, bits=8, block_size=columns, offsets=False)
        values, zeros = (
            q.values[:, 0].short(),
            (q.zeros if q.zeros is not None else torch.full_like(q.scales, 128)).short(),
        )
        steps = (values - zeros).clamp(-128, 127).to(torch.int8)
        inputs = [
            source,
            constant(self.graph, f"{name}.weight", steps.t().contiguous().numpy()),
            constant(self.graph, f"{name}.scales", q.scales[:, 0].numpy()),
        ]
        if bias is not None:
            inputs += [None, constant(self.graph, f"{name}.bias", bias.numpy())]
        return new_node(
            self.graph, node, "DynamicQuantizeMatMul", inputs, domain=MICROSOFT, name=name
        )[0]

    def _quantised(
        self,
        node: ir.Node,
        source: ir.Value | None,
        weight: Tensor,
        bias: Tensor | None,
        *,
        bits: int,
        name: str,
        tied: str | None,
    ) -> ir.Value:
        q = self._rounded(weight, bits, offsets=tied not in self.tables)
        if tied is not None:
            self.quantised[tied] = q
        zeros = q.packed_zeros()
        inputs = [
            source,
            constant(self.graph, f"{name}.weight", q.packed().numpy()),
            constant(self.graph, f"{name}.scales", q.scales.numpy()),
            None if zeros is None else constant(self.graph, f"{name}.zeros", zeros.numpy()),
            None,
            None if bias is None else constant(self.graph, f"{name}.bias", bias.numpy()),
        ]
        while inputs[-1] is None:
            inputs.pop()
        if q.inputs > q.columns:
            inputs[0] = self._with_means(node, source, q, name=name)
        sizes = {
            "K": q.inputs,
            "N": weight.shape[0],
            "bits": bits,
            "block_size": q.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        }
        return new_node(
            self.graph, node, "MatMulNBits", inputs, domain=MICROSOFT, attributes=sizes, name=name
        )[0]

    def _with_means(
        self, node: ir.Node, source: ir.Value | None, q: Quantised, *, name: str
    ) -> ir.Value:
        """[x, the mean of x over each block]; pooling takes (batch, sequence, in) as its channels
        and width.
        """
        assert source is not None
        if source.shape is not None and len(source.shape) == 3:
            window = {"kernel_shape": [q.block_size], "strides": [q.block_size]}
            means = new_node(
                self.graph, node, "AveragePool", [source], attributes=window, name=f"{name}.means"
            )[0]
        else:
            blocks = (
                torch.eye(q.inputs - q.columns).repeat_interleave(q.block_size, 0) / q.block_size
            )
            means = new_node(
                self.graph,
                node,
                "MatMul",
                [source, constant(self.graph, f"{name}.blocks", blocks.numpy())],
            )[0]
        return new_node(
            self.graph,
            node,
            "Concat",
            [source, means],
            attributes={"axis": -1},
            name=f"{name}.inputs",
        )[0]

    def _rounded(self, weight: Tensor, bits: int, *, offsets: bool) -> Quantised:
        return quantise(
            weight,
            bits=bits,
            block_size=self.precision.block_size,
            offsets=offsets,
            method=self.precision.quantiser,
        )

    def embedding(self, node: ir.Node) -> ir.Value:
        """A Gather; from the output projection's quantised bytes when the two are tied, so that
        they are kept once.
        """
        ids, table = node.inputs
        module = node.attributes["module"].as_string()
        assert table is not None
        q = self._table(module, table)
        return self._rows(node, ids, _torch(table) if q is None else q, name=module)

    def _rows(
        self, node: ir.Node, ids: ir.Value | None, table: Tensor | Quantised, *, name: str
    ) -> ir.Value:
        """The rows `ids` of a table."""
        if isinstance(table, Tensor):
            weight = constant(self.graph, f"{name}.weight", table.numpy())
            return new_node(self.graph, node, "Gather", [weight, ids], name=name)[0]
        zeros = table.packed_zeros()
        inputs = [
            constant(self.graph, f"{name}.weight", table.packed().flatten(1).numpy()),
            ids,
            constant(self.graph, f"{name}.scales", table.scales.numpy()),
            *([] if zeros is None else [constant(self.graph, f"{name}.zeros", zeros.numpy())]),
        ]
        attributes = {
            "bits": table.bits,
            "block_size": table.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        return new_node(
            self.graph,
            node,
            "GatherBlockQuantized",
            inputs,
            domain=MICROSOFT,
            attributes=attributes,
            name=name,
        )[0]

    def linear_rows(self, node: ir.Node) -> ir.Value:
        """A table of a linear layer's products with the rows of a constant; in 8 bits where the
        layer's weight is rounded.
        """
        ids, constants, weight, bias = node.inputs
        module = node.attributes["module"].as_string()
        bits = self.precision.bits([module])
        stored = (
            self._rounded(_torch(weight), bits, offsets=True).dequantise()
            if bits
            else _torch(weight)
        )
        products = torch.nn.functional.linear(_torch(constants), stored, _torch(bias))
        table = (
            self._rounded(products, 8, offsets=False)
            if bits and products.shape[1] % self.precision.block_size == 0
            else products
        )
        return self._rows(node, ids, table, name=f"{module}.{LINEAR_ROWS}")

    def _table(self, module: str, table: ir.Value) -> Quantised | None:
        """An embedding's quantised rows, or None where they stay float; see
        `Precision.embedding_bits`.
        """
        tied = self.quantised.get(table.name or "")
        bits = self.precision.embedding_bits(
            module,
            tied=tied.bits if tied else 0,
            is_input=module == input_embedding(self.graph),
            columns=int(table.shape[1]),  # type: ignore[index, arg-type]
        )
        if not bits:
            return None
        if tied is not None and tied.bits == bits:
            return tied
        return self._rounded(_torch(table), bits, offsets=False)


def lower(
    model: ir.Model, precision: Precision, *, adapter_inputs: bool, skip: Collection[str] = ()
) -> list[Site]:
    """Lower every linear layer and embedding in place; returns the adapter sites (none unless
    `adapter_inputs`).

    `skip` names modules that get no adapter inputs.
    """
    walk = _Lowering(model, precision)
    nodes = _layers(model.graph)
    precision.check([module for node in nodes for module in modules_and_widths(node)[0]])
    sites = []
    far = [node for node in model.graph if node.domain == DOMAIN and node.op_type == LINEAR_ROWS]
    for node in nodes:
        if node.op_type == "Embedding":
            continue
        result = walk.linear(node)
        if adapter_inputs and not set(modules_and_widths(node)[0]) & set(skip):
            result, site = _with_adapter(model.graph, node, result)
            sites.append(site)
        replace(node.outputs[0], result)
    for node in nodes:
        if node.op_type == "Embedding":
            replace(node.outputs[0], walk.embedding(node))
    add_to_rows(model.graph, far, [walk.linear_rows(node) for node in far], sites)
    drop_dead(model)
    return sites


def settle(model: ir.Model, precision: Precision) -> Precision:
    """The precision with every override said of all layers of the product it decides for; see
    `Precision.settled`.
    """
    nodes = _layers(model.graph)
    linears = [modules_and_widths(node)[0] for node in nodes if node.op_type != "Embedding"]
    return precision.settled(
        linears,
        [node.attributes["module"].as_string() for node in nodes if node.op_type == "Embedding"],
    )


def _layers(graph: ir.Graph) -> list[ir.Node]:
    """Linear layers, packed ones and embeddings."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type != LINEAR_ROWS]


def modules_and_widths(node: ir.Node) -> tuple[list[str], list[int]]:
    """Module paths and output widths of a Linear or Packed node."""
    if node.op_type == "Packed":
        return list(node.attributes["modules"].as_strings()), list(
            node.attributes["widths"].as_ints()
        )
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return [node.attributes["module"].as_string()], [int(weight.shape[0])]  # type: ignore[arg-type]


def _name(node: ir.Node) -> str:
    """A packed product's own name, a layer's module path."""
    return node.name if node.op_type == "Packed" and node.name else modules_and_widths(node)[0][0]


def _with_adapter(graph: ir.Graph, node: ir.Node, base: ir.Value) -> tuple[ir.Value, Site]:
    """base + (x A) B, with A and B as new graph inputs."""
    modules, widths = modules_and_widths(node)
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    columns = int(weight.shape[1])  # type: ignore[arg-type]
    name = _name(node)
    low = add_float_input(graph, f"{name}.lora_A", ("group", columns, f"{name}.rank"))
    high = add_float_input(graph, f"{name}.lora_B", ("group", f"{name}.rank", sum(widths)))
    down = new_node(graph, node, "MatMul", [node.inputs[0], low], name=f"{name}.down")[0]
    up = new_node(graph, node, "MatMul", [down, high], name=f"{name}.up")[0]
    result = new_node(graph, node, "Add", [base, up], name=f"{name}.adapted")[0]
    ends = np.cumsum(widths).tolist()
    parts = tuple(
        Part(path, end - width, end) for path, width, end in zip(modules, widths, ends, strict=True)
    )
    return result, Site(
        name=name,
        A=str(low.name),
        B=str(high.name),
        in_features=columns,
        out_features=sum(widths),
        parts=parts,
    )


def input_embedding(graph: ir.Graph) -> str:
    """Module path of the token embedding: the one that reads `input_ids`."""
    for node in graph:
        if (
            node.domain == DOMAIN
            and node.op_type == "Embedding"
            and node.inputs[0] is not None
            and node.inputs[0].name == "input_ids"
        ):
            return node.attributes["module"].as_string()
    return ""


def add_float_input(graph: ir.Graph, name: str, shape: tuple[str | int, ...]) -> ir.Value:
    """A new float32 input of the graph; a text in `shape` names a size that may vary."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


def _torch(value: ir.Value | None) -> Tensor:
    tensor = value.const_value if value is not None else None
    assert tensor is not None, value
    return torch.from_numpy(np.array(tensor.numpy(), dtype=np.float32, copy=True))
