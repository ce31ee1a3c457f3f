"""A graph file as `edgetune diff` compares it: operators counted, and a digest of all that is not description."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgetune.errors import BundleError
from edgetune.export.situations import adapted_graph
from edgetune.runtime.bundle_diff import VERIFY, Graph


def read_graph(path: Path) -> Graph:
    """Read a graph without its external weights; metadata, producer and documentation do not count.

    Of a graph that knows situations the nodes are those that run when an adapter is active. BundleError for a damaged file.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        nodes = Counter(node.op_type for node in adapted_graph(model).node)
    except (OSError, DecodeError, ValueError, StopIteration) as error:
        raise BundleError(f"this graph cannot be read: {error}", where=str(path), fix=VERIFY) from error
    del model.metadata_props[:]
    model.producer_name = model.producer_version = model.doc_string = ""
    return Graph(nodes, hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest())
