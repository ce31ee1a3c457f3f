"""Heads inside the graph: a score from a sequence's last state, logits of every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from edgetune.export.graph.fuse import constant
from edgetune.export.graph.lower import add_float_input
from edgetune.models.base import Base
from edgetune.models.heads import RewardModel
from edgetune.models.load import load_body
from edgetune.runtime.bundle.manifest import SCORE_OUTPUT, STATES, HeadInfo


def causal_model(model: Any, base: Base) -> Any:
    """What is traced: a merged reward's body under the base's own output projection; another model
    as it is.
    """
    if not isinstance(model, RewardModel):
        return model
    decoder = load_body(base).float().eval()
    setattr(decoder, model.body_name, model.body)
    decoder.tie_weights()
    return decoder


def decoder_head(hidden: int) -> HeadInfo:
    """Where a reward adapter's tensors go in a bundle that takes any."""
    return HeadInfo(weight="head.weight", bias="head.bias", in_features=hidden)


def drop_states(model: ir.Model) -> None:
    """Take the states out of the graph's outputs: of a merged bundle that generates nobody asks for
    them.
    """
    model.graph.outputs.remove(_output(model.graph, STATES))


def add_fixed_score(model: ir.Model, weight: Tensor) -> None:
    """score (B, K, 1) = states · Wᵀ beside the states; weight (1, hidden), as torch holds it."""
    graph = model.graph
    node = ir.node(
        "MatMul",
        [
            _output(graph, STATES),
            constant(graph, "head.weight", weight.detach().t().contiguous().numpy()),
        ],
    )
    graph.append(node)
    _add_output(graph, node.outputs[0], ["batch", "kept", 1])


def _output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)


def _add_output(graph: ir.Graph, value: ir.Value, shape: list[str | int]) -> None:
    value.name, value.dtype, value.shape = SCORE_OUTPUT, ir.DataType.FLOAT, ir.Shape(shape)
    graph.outputs.append(value)


def add_token_head(model: ir.Model, weight: Tensor, bias: Tensor) -> None:
    """logits (B, S, labels) = last_hidden_state · W + b as constants; weight (labels, hidden), bias
    (labels,).
    """
    graph = model.graph
    hidden = next(value for value in graph.outputs if value.name == "last_hidden_state")
    product = ir.node(
        "MatMul", [hidden, constant(graph, "head.weight", weight.t().contiguous().numpy())]
    )
    total = ir.node(
        "Add", [product.outputs[0], constant(graph, "head.bias", bias.contiguous().numpy())]
    )
    graph.extend([product, total])
    logits = total.outputs[0]
    logits.name, logits.dtype, logits.shape = (
        "logits",
        ir.DataType.FLOAT,
        ir.Shape(["batch", "sequence", "labels"]),
    )
    graph.outputs.insert(0, logits)


def add_head(
    model: ir.Model, weight: Tensor | None, bias: Tensor | None, *, hidden: int
) -> HeadInfo | None:
    """logits (B, labels) = pooled · W + b: as graph inputs (W (group, hidden, labels)), or
    constants when given.

    weight (labels, hidden) and bias (labels,), as torch holds them.
    """
    graph = model.graph
    pooled = next(value for value in graph.outputs if value.name == "pooled")
    maker = pooled.producer()
    assert maker is not None
    if weight is None:
        w = add_float_input(graph, "head.weight", ("group", hidden, "labels"))
        b = add_float_input(graph, "head.bias", ("group", "labels"))
    else:
        assert bias is not None
        w = constant(graph, "head.weight", weight.t().contiguous()[None].numpy())
        b = constant(graph, "head.bias", bias[None].contiguous().numpy())
    axis = constant(graph, "head.axis", np.array([1], np.int64))
    nodes = [ir.node("Unsqueeze", [pooled, axis])]
    nodes.append(ir.node("MatMul", [nodes[0].outputs[0], w]))
    nodes.append(ir.node("Unsqueeze", [b, axis]))
    nodes.append(ir.node("Add", [nodes[1].outputs[0], nodes[2].outputs[0]]))
    nodes.append(ir.node("Squeeze", [nodes[3].outputs[0], axis]))
    graph.extend(nodes)
    logits = nodes[-1].outputs[0]
    logits.name, logits.dtype, logits.shape = (
        "logits",
        ir.DataType.FLOAT,
        ir.Shape(["batch", "labels"]),
    )
    graph.outputs.insert(0, logits)
    return (
        HeadInfo(weight="head.weight", bias="head.bias", in_features=hidden)
        if weight is None
        else None
    )
