"""Passes over the traced graph that make it small: fewer, larger nodes, none that the engine would
fold at load.

Each pass takes and changes an `ir.Graph` whose linear layers are still `edgetune::Linear` nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetune.export.graph.reshapes import (
    attend_to_packed,
    commute_transposes,
    constant_reshapes,
    drop_reshapes,
    fold_query_scale,
    keep_rows_apart,
    replace,
    same_shape,
    split_instead_of_unbind,
)
from edgetune.export.graph.symbolic_layers import DOMAIN

MICROSOFT = "com.microsoft"


def simplify(model: ir.Model) -> None:
    """Run every pass, in order, and drop what nothing reads any more."""
    graph = model.graph
    for tidy in (
        split_instead_of_unbind,
        commute_transposes,
        keep_rows_apart,
        drop_reshapes,
        fold_query_scale,
        constant_reshapes,
        attend_to_packed,
    ):
        tidy(graph)
    drop_dead(model)
    pack_linears(graph)
    fuse_silu(graph)
    fuse_skip_norm(graph)
    drop_dead(model)
    model.opset_imports[MICROSOFT] = 1


def drop_dead(model: ir.Model) -> None:
    """Remove nodes whose results nothing reads, and the constants only they used; bring nodes into
    order.
    """
    graph = model.graph
    outputs = {id(value) for value in graph.outputs}
    for node in reversed(list(graph)):
        if not any(value.uses() or id(value) in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    graph.sort()


def new_node(
    graph: ir.Graph,
    before: ir.Node,
    op: str,
    inputs: list[ir.Value | None],
    *,
    domain: str = "",
    outputs: int = 1,
    attributes: Mapping[str, Any] | None = None,
    name: str = "",
) -> list[ir.Value]:
    """Insert a node and return its outputs."""
    node = ir.node(
        op, inputs, attributes=attributes, domain=domain, num_outputs=outputs, name=name or None
    )  # type: ignore[arg-type]
    graph.insert_before(before, node)
    return list(node.outputs)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add an initialiser and return its value; one of the same name and numbers that is there
    already is that value.
    """
    there = graph.initializers.get(name)
    if (
        there is not None
        and there.const_value is not None
        and np.array_equal(there.const_value.numpy(), array)
    ):
        return there
    value = ir.Value(
        name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape)
    )
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value


def pack_linears(graph: ir.Graph) -> None:
    """Linear layers that read the same value become one, with their weights stacked.

    A grouped-query attention that alone reads q, k and v takes the packed result as it is; other
    readers get a Split.
    """
    readers: dict[tuple[ir.Value, str], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.domain == DOMAIN and node.op_type == "Linear" and node.inputs[0] is not None:
            owner = (
                node.attributes["module"].as_string().rpartition(".")[0]
            )  # what a whole stack reads stays a product a layer
            readers[node.inputs[0], owner].append(node)
    for (source, _), linears in readers.items():
        if len(linears) > 1 and len({len(node.inputs) for node in linears}) == 1:
            _pack(graph, source, linears)


def _pack(graph: ir.Graph, source: ir.Value, linears: list[ir.Node]) -> None:
    weights = [node.inputs[1] for node in linears]
    widths = [int(weight.shape[0]) for weight in weights]  # type: ignore
    paths = [node.attributes["module"].as_string() for node in linears]
    operands: list[ir.Value | None] = [source, *weights]
    if len(linears[0].inputs) == 3:
        operands += [node.inputs[2] for node in linears]
    packed = new_node(
        graph,
        linears[0],
        "Packed",
        operands,
        domain=DOMAIN,
        attributes={"modules": paths, "widths": widths},
        name=packed_name(paths),
    )[0]
    shape = linears[0].outputs[0].shape
    if shape is not None:
        packed.shape = ir.Shape([*list(shape)[:-1], sum(widths)])
    packed.dtype = linears[0].outputs[0].dtype
    results = [node.outputs[0] for node in linears]
    attention = _only_reader(results)
    if attention is not None and attention.op_type == "GroupQueryAttention":
        for place, value in enumerate((packed, None, None)):
            attention.replace_input_with(place, value)
        return
    sizes = constant(graph, f"{packed_name(paths)}.split", np.array(widths, np.int64))
    parts = new_node(
        graph, linears[0], "Split", [packed, sizes], outputs=len(linears), attributes={"axis": -1}
    )
    for old, new in zip(results, parts, strict=True):
        replace(old, new)


def _only_reader(values: list[ir.Value]) -> ir.Node | None:
    """The attention node that reads exactly these values as its q, k and v, and nothing else reads
    them.
    """
    users = {id(user): user for value in values for user, _ in value.uses()}
    if len(users) != 1:
        return None
    user = next(iter(users.values()))
    return user if len(values) == 3 and [*user.inputs[:3]] == values else None


def packed_name(paths: list[str]) -> str:
    """`model.layers.0.self_attn.q_proj`, `…k_proj`, … →
    `layers.0.self_attn.q_proj+k_proj+v_proj`.
    """
    parent, _, first = paths[0].rpartition(".")
    names = [first, *(path.rpartition(".")[2] for path in paths[1:])]
    return f"{parent}.{'+'.join(names)}" if parent else "+".join(names)


def fuse_silu(graph: ir.Graph) -> None:
    """x · sigmoid(x) → QuickGelu(x, alpha = 1)."""
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        for x, gate in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            maker = gate.producer() if gate is not None else None
            if maker is not None and maker.op_type == "Sigmoid" and maker.inputs[0] is x:
                fused = new_node(
                    graph, node, "QuickGelu", [x], domain=MICROSOFT, attributes={"alpha": 1.0}
                )[0]
                replace(node.outputs[0], fused)
                break


def fuse_skip_norm(graph: ir.Graph) -> None:
    """norm(a + b), the sum read again later, is one Skip…LayerNormalization node with the sum as
    fourth output.
    """
    for node in list(graph):
        if node.op_type not in ("SimplifiedLayerNormalization", "LayerNormalization"):
            continue
        total = node.inputs[0]
        add = total.producer() if total is not None else None
        if total is None or add is None or add.op_type != "Add" or not _hidden_states(add):
            continue
        kept = {"epsilon": node.attributes["epsilon"].as_float()}
        norm, _, _, again = new_node(
            graph,
            node,
            f"Skip{node.op_type}",
            [add.inputs[0], add.inputs[1], *node.inputs[1:]],
            domain=MICROSOFT,
            outputs=4,
            attributes=kept,
        )
        norm.dtype, again.dtype = total.dtype, total.dtype
        again.shape = total.shape
        replace(node.outputs[0], norm)
        replace(total, again)


def _hidden_states(add: ir.Node) -> bool:
    """Both operands are full hidden states (no broadcast bias, no constant)."""
    a, b = add.inputs
    return (
        a is not None
        and b is not None
        and a.shape is not None
        and b.shape is not None
        and same_shape(a, b)
    )
