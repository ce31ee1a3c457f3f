"""A graph file as `edgetune diff` compares it: operators counted, and a digest of all that is not description."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import onnx

from edgetune.runtime.bundle_diff import Graph


def read_graph(path: Path) -> Graph:
    """Read a graph without its external weights; metadata, producer and documentation do not count."""
    model = onnx.load(str(path), load_external_data=False)
    nodes = Counter(node.op_type for node in model.graph.node)
    del model.metadata_props[:]
    model.producer_name = model.producer_version = model.doc_string = ""
    return Graph(nodes, hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest())
