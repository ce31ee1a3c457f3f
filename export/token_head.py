"""The head of a merged bundle that tags words: logits of every token, inside the graph."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from edgetune.export.layout import constant


def add_token_head(model: ir.Model, weight: Tensor, bias: Tensor) -> None:
    """logits (B, S, labels) = last_hidden_state · W + b as constants; weight (labels, hidden), bias (labels,)."""
    graph = model.graph
    hidden = next(value for value in graph.outputs if value.name == "last_hidden_state")
    product = ir.node("MatMul", [hidden, constant(graph, "head.weight", weight.t().contiguous().numpy())])
    total = ir.node("Add", [product.outputs[0], constant(graph, "head.bias", bias.contiguous().numpy())])
    graph.extend([product, total])
    logits = total.outputs[0]
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["batch", "sequence", "labels"])
    graph.outputs.insert(0, logits)
