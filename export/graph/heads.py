"""Heads inside the graph: a score from a sequence's last state, logits of every token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save
from torch import Tensor

from edgetune.core.head_layers import head_layers
from edgetune.core.tasks import CLASSIFICATION, TAGGING
from edgetune.export.graph.fuse import constant
from edgetune.export.graph.lower import add_float_input
from edgetune.models.base import Base
from edgetune.models.heads import (
    DecoderClassifier,
    RewardModel,
    SequenceClassifier,
    TokenClassifier,
)
from edgetune.models.load import checkpoint_head, load_body
from edgetune.runtime.bundle.manifest import SCORE_OUTPUT, STATES, HeadInfo


def causal_model(model: Any, base: Base) -> Any:
    """What is traced: the body of a merged reward or classifier under the base's own output
    projection; another model as it is.
    """
    if not isinstance(model, (DecoderClassifier, RewardModel)):
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


HEAD_FILE = "head.safetensors"


def with_layers(head: HeadInfo, base: Base, config: Any, folder: Path) -> HeadInfo:
    """The head of an encoder that takes any adapter, with transformers' own classifiers: what is
    before their output, and in `folder` what of it the base brings.
    """
    sequence, words = (head_layers(config.to_dict(), task) for task in (CLASSIFICATION, TAGGING))
    own = checkpoint_head(base, sequence)
    if own:
        (folder / HEAD_FILE).write_bytes(save(dict(sorted(own.items()))))
    return replace(
        head,
        sequence=sequence,
        words=words,
        own=tuple(sorted({name.rpartition(".")[0] for name in own})),
        file=HEAD_FILE if own else None,
    )


def add_input_head(model: ir.Model, *, hidden: int) -> HeadInfo:
    """logits (B, labels) = pooled · W + b with W (group, hidden, labels) and b as graph inputs."""
    w = add_float_input(model.graph, "head.weight", ("group", hidden, "labels"))
    b = add_float_input(model.graph, "head.bias", ("group", "labels"))
    axis = constant(model.graph, "head.axis", np.array([1], np.int64))
    nodes = _Nodes(model.graph)
    rows = nodes.add("Unsqueeze", _output(model.graph, "pooled"), axis)
    total = nodes.add("Add", nodes.add("MatMul", rows, w), nodes.add("Unsqueeze", b, axis))
    _add_logits(model.graph, nodes.add("Squeeze", total, axis), ["batch", "labels"])
    return HeadInfo(weight="head.weight", bias="head.bias", in_features=hidden)


def add_fixed_head(model: ir.Model, classifier: SequenceClassifier, *, pooling: str) -> None:
    """A trained head as constants: logits (B, labels) of the text, or (B, S, labels) of every
    token; `pooling` is that of the graph's `pooled`.
    """
    graph, layers = model.graph, classifier.layers
    nodes = _Nodes(graph)
    of_words = isinstance(classifier, TokenClassifier)
    if of_words:
        value = _output(graph, STATES)
    elif layers is None or layers.reads == pooling:
        value = _output(graph, "pooled")
    else:
        value = nodes.read(layers.reads)
    if layers is not None:
        dense, *norm = (classifier.layer(name) for name in layers.inner)
        value = nodes.activated(nodes.linear(value, dense, "head.dense"), layers.activation)
        for layer in norm:
            value = nodes.normed(value, layer)
    logits = nodes.linear(value, classifier.output, "head")
    _add_logits(graph, logits, ["batch", "sequence", "labels"] if of_words else ["batch", "labels"])


def _add_logits(graph: ir.Graph, logits: ir.Value, shape: list[str | int]) -> None:
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(shape)
    graph.outputs.insert(0, logits)


class _Nodes:
    """Nodes appended to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    def add(self, op: str, *operands: ir.Value, **attributes: Any) -> ir.Value:
        """The only output of a new node."""
        node = ir.node(op, list(operands), attributes=attributes)
        self._graph.append(node)
        return node.outputs[0]

    def constant(self, name: str, tensor: Tensor) -> ir.Value:
        """A weight."""
        return constant(self._graph, name, tensor.detach().float().contiguous().numpy())

    def linear(self, value: ir.Value, layer: Any, name: str) -> ir.Value:
        """value · Wᵀ + b."""
        product = self.add("MatMul", value, self.constant(f"{name}.weight", layer.weight.t()))
        if layer.bias is None:
            return product
        return self.add("Add", product, self.constant(f"{name}.bias", layer.bias))

    def activated(self, value: ir.Value, activation: str) -> ir.Value:
        """The activation, of the operators that every version of ONNX has."""
        if activation == "silu":
            return self.add("Mul", value, self.add("Sigmoid", value))
        if activation != "gelu":
            return self.add(activation.capitalize(), value)
        half, one, root = (
            self.constant(f"head.gelu.{name}", torch.tensor(number))
            for name, number in (("half", 0.5), ("one", 1.0), ("root", 0.5**0.5))
        )
        phi = self.add("Add", self.add("Erf", self.add("Mul", value, root)), one)
        return self.add("Mul", self.add("Mul", value, half), phi)

    def normed(self, value: ir.Value, layer: Any) -> ir.Value:
        """LayerNorm over the last dimension."""
        weight = self.constant("head.norm.weight", layer.weight)
        bias = torch.zeros_like(layer.weight) if layer.bias is None else layer.bias
        shift = self.constant("head.norm.bias", bias)
        return self.add(
            "LayerNormalization", value, weight, shift, axis=-1, epsilon=float(layer.eps)
        )

    def read(self, reads: str) -> ir.Value:
        """(B, S, hidden) → (B, hidden): the first token's state, or the mean over real tokens."""
        states = _output(self._graph, STATES)
        if reads == "cls":
            first = constant(self._graph, "head.first", np.array(0, np.int64))
            return self.add("Gather", states, first, axis=1)
        given = next(value for value in self._graph.inputs if value.name == "attention_mask")
        mask = self.add("Cast", given, to=int(ir.DataType.FLOAT))
        last = constant(self._graph, "head.last", np.array([2], np.int64))
        second = constant(self._graph, "head.second", np.array([1], np.int64))
        weighed = self.add("Mul", states, self.add("Unsqueeze", mask, last))
        total = self.add("ReduceSum", weighed, second, keepdims=0)
        return self.add("Div", total, self.add("ReduceSum", mask, second, keepdims=1))
