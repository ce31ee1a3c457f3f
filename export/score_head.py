"""The head of a decoder's reward adapters: a score from the state of a sequence's last token.

The engine's graph only gives the states (`last_hidden_state`, free where nobody asks for them) and the runtime applies
each row's own head; a merged bundle has the score in its graph, and the graph for other engines takes the head as inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from edgetune.bases import Base, load_body
from edgetune.export.layout import constant
from edgetune.heads import RewardModel
from edgetune.runtime.manifest import SCORE, STATES, HeadInfo


def causal_model(model: Any, base: Base) -> Any:
    """What is traced: a merged reward's body under the base's own output projection; another model as it is."""
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
    """Take the states out of the graph's outputs: of a merged bundle that generates nobody asks for them."""
    model.graph.outputs.remove(_output(model.graph, STATES))


def add_fixed_score(model: ir.Model, weight: Tensor) -> None:
    """score (B, K, 1) = states · Wᵀ beside the states; weight (1, hidden), as torch holds it."""
    graph = model.graph
    node = ir.node("MatMul", [_output(graph, STATES), constant(graph, "head.weight", weight.detach().t().contiguous().numpy())])
    graph.append(node)
    _add_output(graph, node.outputs[0], ["batch", "kept", 1])


def standard_score(model: ir.Model) -> None:
    """score (B, labels) of the last token in place of its state, for the graph that other engines open.

    W (group, hidden, labels) and b (group, labels) are inputs; a merged bundle's score stays what it is, as (B, 1). A
    graph that gives no states stays as it is.
    """
    graph = model.graph
    names = {value.name for value in graph.outputs}
    if STATES not in names:
        return
    axis = constant(graph, "head.axis", np.array([1], np.int64))
    states = _output(graph, STATES)
    if SCORE in names:
        score = _output(graph, SCORE)
        graph.outputs.remove(score)
        score.name = "score.kept"
        nodes = [ir.node("Squeeze", [score, axis])]
    else:
        assert states.shape is not None
        weight, bias = _input(graph, "head.weight", ("group", states.shape[-1], "labels")), _input(graph, "head.bias", ("group", "labels"))
        product = ir.node("MatMul", [states, weight])
        one = ir.node("Squeeze", [product.outputs[0], axis])
        nodes = [product, one, ir.node("Add", [one.outputs[0], bias])]
    graph.extend(nodes)
    graph.outputs.remove(states)
    _add_output(graph, nodes[-1].outputs[0], ["batch", "labels"])


def _output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)


def _add_output(graph: ir.Graph, value: ir.Value, shape: list[str | int]) -> None:
    value.name, value.dtype, value.shape = SCORE, ir.DataType.FLOAT, ir.Shape(shape)
    graph.outputs.append(value)


def _input(graph: ir.Graph, name: str, shape: tuple[object, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))  # type: ignore[arg-type]
    graph.inputs.append(value)
    return value
