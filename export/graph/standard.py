"""The graph for other engines: standard inputs and outputs, without what only our runtime knows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgetune.export.graph.fuse import constant, drop_dead
from edgetune.export.graph.heads import _add_output, _output
from edgetune.export.graph.lower import add_float_input
from edgetune.runtime.bundle.manifest import SCORE_OUTPUT, STATES


def standard_decoder(engine: ir.Model) -> ir.Model:
    """The decoder behind the interface of optimum and onnxruntime-genai: attention_mask in, last
    logits out.
    """
    model = _copy(engine)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    ids, first = inputs["input_ids"], next(iter(graph))
    readers = list(ids.uses())
    mask = ir.Value(
        name="attention_mask",
        shape=ir.Shape(["batch", "total_sequence_length"]),
        type=ir.TensorType(ir.DataType.INT64),
    )

    def add(op: str, *operands: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(op, list(operands), attributes=attributes)  # type: ignore[arg-type]
        graph.insert_before(first, node)
        return node.outputs[0]

    def number(name: str, *values: int) -> ir.Value:
        return constant(graph, f"interface.{name}", np.array(values, np.int64))

    one, zero = number("one", 1), number("zero", 0)
    lengths = add("ReduceSum", mask, one, keepdims=0)  # (batch,)
    last = add("Sub", lengths, one)
    total = add("Squeeze", add("Shape", mask, start=1, end=2), zero)
    seq = add("Squeeze", add("Shape", ids, start=1, end=2), zero)
    index = add("Sub", last, add("Sub", total, seq))  # of the last real token among the new ones
    index = add("Max", add("Min", index, add("Sub", seq, one)), zero)
    # the new ids with the real ones first, whichever side is padded: what follows them is not read
    stop, width = (add("Shape", value, start=1, end=2) for value in (mask, ids))
    new = add("Slice", mask, add("Sub", stop, width), stop, one)
    start, step = (constant(graph, f"interface.{n}", np.array(n, np.int64)) for n in (0, 1))
    place = add("Range", start, seq, step)
    order = add("Where", add("Greater", new, zero), place, add("Add", place, seq))  # (batch, seq)
    keys = add("Cast", order, to=int(ir.DataType.FLOAT))
    first_real = ir.node("TopK", [keys, width], attributes={"largest": 0}, num_outputs=2)
    graph.insert_before(first, first_real)
    packed = add("GatherElements", ids, first_real.outputs[1], axis=1)
    for reader, place_of_ids in readers:
        reader.replace_input_with(place_of_ids, packed)
    replacements = {
        "seqlens_k": add("Cast", last, to=int(ir.DataType.INT32)),
        "total_sequence_length": add("Cast", total, to=int(ir.DataType.INT32)),
        "logits_index": add("Unsqueeze", index, one),
    }
    for name, value in replacements.items():
        ir.convenience.replace_all_uses_with(inputs[name], value)
        graph.inputs.remove(inputs[name])
    graph.inputs.insert(1, mask)
    standard_score(model)
    _default_adapters(graph)
    drop_dead(model)
    return model


def standard_encoder(engine: ir.Model) -> ir.Model:
    """The encoder with defaults for its adapter and head inputs: plain ONNX Runtime can run it as
    it is.
    """
    model = _copy(engine)
    _optional_types(model.graph)
    _default_adapters(model.graph)
    return model


def _optional_types(graph: ir.Graph) -> None:
    """Types of tokens that may be left out: one 0 by default, spread over the ids."""
    given = next((value for value in graph.inputs if value.name == "token_type_ids"), None)
    if given is None:
        return
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    first, place = next(iter(graph)), list(graph.inputs).index(given)
    types = ir.Value(
        name="token_type_ids",
        shape=ir.Shape(["types_batch", "types_sequence"]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    shape = ir.node("Shape", [ids])
    spread = ir.node("Expand", [types, shape.outputs[0]])
    for node in (shape, spread):
        graph.insert_before(first, node)
    ir.convenience.replace_all_uses_with(given, spread.outputs[0])
    graph.inputs[place] = types
    types.const_value = ir.tensor(np.zeros((1, 1), np.int64), name="token_type_ids")
    graph.register_initializer(types)


def _default_adapters(graph: ir.Graph) -> None:
    """Give adapter and head inputs an empty default (rank 0, no labels), which `LoraAdapter`
    replaces.
    """
    for value in graph.inputs:
        name = value.name or ""
        if not name.endswith((".lora_A", ".lora_B")) and name not in ("head.weight", "head.bias"):
            continue
        assert value.shape is not None
        free = 1 if name.endswith((".lora_B", ".bias")) else 2  # the dimension of rank or labels
        shape = [
            1 if i == 0 else 0 if i == free else int(size) for i, size in enumerate(value.shape)
        ]  # type: ignore[arg-type]
        value.const_value = ir.tensor(np.zeros(shape, np.float32), name=name)
        graph.register_initializer(value)


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))


def standard_score(model: ir.Model) -> None:
    """score (B, labels) of the last token in place of its state, for the graph that other engines
    open.

    W (group, hidden, labels) and b (group, labels) are inputs; a merged bundle's score stays what
    it is, as (B, 1). A graph that gives no states stays as it is.
    """
    graph = model.graph
    names = {value.name for value in graph.outputs}
    if STATES not in names:
        return
    axis = constant(graph, "head.axis", np.array([1], np.int64))
    states = _output(graph, STATES)
    if SCORE_OUTPUT in names:
        score = _output(graph, SCORE_OUTPUT)
        graph.outputs.remove(score)
        score.name = "score.kept"
        nodes = [ir.node("Squeeze", [score, axis])]
    else:
        assert states.shape is not None
        weight, bias = (
            add_float_input(graph, "head.weight", ("group", states.shape[-1], "labels")),
            add_float_input(graph, "head.bias", ("group", "labels")),
        )
        product = ir.node("MatMul", [states, weight])
        one = ir.node("Squeeze", [product.outputs[0], axis])
        nodes = [product, one, ir.node("Add", [one.outputs[0], bias])]
    graph.extend(nodes)
    graph.outputs.remove(states)
    _add_output(graph, nodes[-1].outputs[0], ["batch", "labels"])
