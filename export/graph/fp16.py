"""A lowered graph in fp16: weights, activations and the cache; for providers with fp16 kernels
(CUDA, DirectML, CoreML, QNN).

Token ids, lengths and masks stay as they are. Adapter and head inputs stay fp32 and are cast
inside, so that the same adapter files fit every bundle; `logits`, `pooled` and `last_hidden_state`
go out as fp32. ONNX Runtime's CPU has fp16 kernels for attention and norms, and puts casts around
the rest, so that the proof can run anywhere.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetune.export.graph.fuse import new_node

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
CACHE = ("past_key_values.", "present.")


def to_half(model: ir.Model) -> None:
    """Change a graph in place; its interface is said in the module's docstring.

    A value gets a type of its own: copies of a traced graph share their types (`trace.Traced`).
    """
    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value is not None and value.dtype == FLOAT:
            value.const_value = _half(value.const_value, value.name or "")
            value.type = ir.TensorType(HALF)
    for node in graph:
        _change(node)
    for value in graph.inputs:
        if value.dtype == FLOAT and (value.name or "").startswith(CACHE):
            value.type = ir.TensorType(HALF)
        elif value.dtype == FLOAT:
            _cast_input(graph, value)
    for place, value in enumerate(graph.outputs):
        if value.dtype in (HALF, None) and not (value.name or "").startswith(CACHE):
            graph.outputs[place] = _cast_output(graph, value)


def _change(node: ir.Node) -> None:
    """Constants, casts and results of one node."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FLOAT:
            node.attributes[name] = ir.AttrTensor(name, _half(attribute.as_tensor(), name))
        elif node.op_type == "Constant" and name in ("value_float", "value_floats"):
            numbers = attribute.as_float() if name == "value_float" else attribute.as_floats()
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.tensor(_clipped(np.array(numbers, np.float32)))
            )
    if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(HALF))
    for value in node.outputs:
        if value.dtype == FLOAT:
            value.type = ir.TensorType(HALF)


def _half(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(_clipped(np.asarray(tensor.numpy(), np.float32)), name=name)


def _clipped(array: np.ndarray) -> np.ndarray:
    """fp16 without infinities: a mask's most negative number stays a number."""
    return np.clip(array, -LARGEST, LARGEST).astype(np.float16)


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    users = list(value.uses())
    if not users:
        return
    first = next(node for node in graph if any(user is node for user, _ in users))
    half = new_node(
        graph, first, "Cast", [value], attributes={"to": int(HALF)}, name=f"{value.name}.half"
    )[0]
    half.dtype, half.shape = HALF, value.shape
    for user, place in users:
        user.replace_input_with(place, half)


def _cast_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The value under its own name in fp32; its fp16 original gets another name."""
    name, shape = value.name, value.shape
    value.name = f"{name}.half"
    cast = ir.node("Cast", [value], attributes={"to": int(FLOAT)})
    graph.append(cast)
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = name, FLOAT, shape
    return result
