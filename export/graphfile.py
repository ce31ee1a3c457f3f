"""Writing graphs: one shared data file with every weight once, and small `.onnx` files that point into it.

`engine.onnx` is what edgetune's runtime opens; `model.onnx` is the same graph behind the interface other tools
expect (an attention mask, adapter inputs with zero-rank defaults so that ONNX Runtime's `LoraAdapter` reaches them).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgetune import __version__
from edgetune.export.layout import constant, drop_dead
from edgetune.export.score_head import standard_score

ENGINE, BY_SITUATION, STANDARD, DATA = "engine.onnx", "situations.onnx", "model.onnx", "model.onnx.data"
ALIGNMENT = 4096  # a page: the engine maps the file instead of reading it
INLINE_BYTES = 1024  # smaller constants stay inside the graph
IR_VERSION = 10


def write_data(model: ir.Model, folder: Path) -> None:
    """Move the weights into `folder/model.onnx.data`; equal bytes are stored once, whatever shape reads them."""
    places: dict[str, int] = {}
    with (folder / DATA).open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            array = np.ascontiguousarray(tensor.numpy())
            if array.nbytes <= INLINE_BYTES:
                continue
            key = hashlib.sha256(array.data).hexdigest()
            if key not in places:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                places[key] = file.tell()
                file.write(array.data)
            value.const_value = ir.ExternalTensor(
                DATA, places[key], array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=value.name or "", base_dir=folder
            )


def write_graph(model: ir.Model, path: Path, *, metadata: dict[str, str]) -> None:
    """Write the graph without weights; `metadata` is what Netron shows."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "edgetune", __version__
    model.graph.name = "edgetune"
    model.doc_string = "; ".join(f"{key}: {value}" for key, value in metadata.items() if key != "edgetune")
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        _drop_unused_outputs(node)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
    model.metadata_props.update(metadata)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _drop_unused_outputs(node: ir.Node) -> None:
    """Optional outputs at the end that nobody reads: OpenVINO's reader refuses a skip-norm that names them."""
    if node.op_type in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
        used = [i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
        node.resize_outputs(max(used, default=0) + 1)


def standard_decoder(engine: ir.Model) -> ir.Model:
    """The decoder behind the interface of optimum and onnxruntime-genai: attention_mask in, last logits out."""
    model = _copy(engine)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    ids, first = inputs["input_ids"], next(iter(graph))
    mask = ir.Value(name="attention_mask", shape=ir.Shape(["batch", "total_sequence_length"]), type=ir.TensorType(ir.DataType.INT64))

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
    """The encoder with defaults for its adapter and head inputs: plain ONNX Runtime can run it as it is."""
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
    types = ir.Value(name="token_type_ids", shape=ir.Shape(["types_batch", "types_sequence"]), type=ir.TensorType(ir.DataType.INT64))
    shape = ir.node("Shape", [ids])
    spread = ir.node("Expand", [types, shape.outputs[0]])
    for node in (shape, spread):
        graph.insert_before(first, node)
    ir.convenience.replace_all_uses_with(given, spread.outputs[0])
    graph.inputs[place] = types
    types.const_value = ir.tensor(np.zeros((1, 1), np.int64), name="token_type_ids")
    graph.register_initializer(types)


def _default_adapters(graph: ir.Graph) -> None:
    """Give adapter and head inputs an empty default (rank 0, no labels), which `LoraAdapter` replaces."""
    for value in graph.inputs:
        name = value.name or ""
        if not name.endswith((".lora_A", ".lora_B")) and name not in ("head.weight", "head.bias"):
            continue
        assert value.shape is not None
        free = 1 if name.endswith((".lora_B", ".bias")) else 2  # the dimension of rank or labels
        shape = [1 if i == 0 else 0 if i == free else int(size) for i, size in enumerate(value.shape)]  # type: ignore[arg-type]
        value.const_value = ir.tensor(np.zeros(shape, np.float32), name=name)
        graph.register_initializer(value)


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(onnx.ModelProto.FromString(ir.to_proto(model).SerializeToString()))
