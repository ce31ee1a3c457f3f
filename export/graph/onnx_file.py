"""Writing graphs: one shared data file with every weight once, and small `.onnx` files that point
into it.

`engine.onnx` is what edgetune's runtime opens; `model.onnx` is the same graph behind the interface
other tools expect (an attention mask, adapter inputs with zero-rank defaults so that ONNX Runtime's
`LoraAdapter` reaches them).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgetune import __version__
from edgetune.core.errors import BundleError
from edgetune.export.graph.adapter_branch import adapted_graph
from edgetune.runtime.bundle.diff import VERIFY, Graph
from edgetune.runtime.bundle.native_plan import INLINE_BYTES

ENGINE, STANDARD, DATA, NATIVE = (
    "engine.onnx",
    "model.onnx",
    "model.onnx.data",
    "native.json",
)
ALIGNMENT = 4096  # a page: the engine maps the file instead of reading it
IR_VERSION = 10


def write_data(model: ir.Model, folder: Path) -> None:
    """Move the weights into `folder/model.onnx.data`; equal bytes are stored once, whatever shape
    reads them.
    """
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
                DATA,
                places[key],
                array.nbytes,
                tensor.dtype,
                shape=ir.Shape(array.shape),
                name=value.name or "",
                base_dir=folder,
            )


def write_graph(model: ir.Model, path: Path, *, metadata: dict[str, str]) -> None:
    """Write the graph without weights; `metadata` is what Netron shows."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "edgetune", __version__
    model.graph.name = "edgetune"
    model.doc_string = "; ".join(
        f"{key}: {value}" for key, value in metadata.items() if key != "edgetune"
    )
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
    """Optional outputs at the end that nobody reads: OpenVINO's reader refuses a skip-norm that
    names them.
    """
    if node.op_type in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
        used = [
            i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()
        ]
        node.resize_outputs(max(used, default=0) + 1)


def read_graph(path: Path) -> Graph:
    """Read a graph without its external weights; metadata, producer and documentation do not count.

    Of a graph that knows situations the nodes are those that run when an adapter is active.
    BundleError for a damaged file.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        nodes = Counter(node.op_type for node in adapted_graph(model).node)
    except (OSError, DecodeError, ValueError, StopIteration) as error:
        raise BundleError(
            f"this graph cannot be read: {error}", where=str(path), fix=VERIFY
        ) from error
    del model.metadata_props[:]
    model.producer_name = model.producer_version = model.doc_string = ""
    return Graph(nodes, hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest())
