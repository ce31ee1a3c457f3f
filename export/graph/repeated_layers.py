"""Layers that are alike are traced twice and copied, so that a model of thirty takes little longer
than one of three.

While tracing, the first two layers of a kind run as they are, between two marks; each further one
is a single node that says which layer it is like. Then the second one's nodes are put in its place,
with its own weights. Of one kind are layers whose modules and whose arguments are equal; and the
two that were traced must have become the same nodes, or nothing is copied and the model is traced
whole (`UnlikeError`), so that a layer which looks at its own number is never taken for another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch.onnx.ops as onnx_ops
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from edgetune.export.graph.attention import now
from edgetune.export.graph.layer_likeness import (
    SMALL,
    _identity,
    attributes,
    content,
    renamed,
    signature,
)
from edgetune.export.graph.reshapes import replace
from edgetune.export.graph.symbolic_layers import DOMAIN

BEGIN, END, COPY = "LayerBegin", "LayerEnd", "LayerLike"
TRACED = 2  # layers of each kind
ROOT = "model."  # of the traced wrapper, before a layer's path in the model


class UnlikeError(Exception):
    """Two layers that were taken to be alike are not: the model has to be traced whole."""


@dataclass
class _Kind:
    """Layers that are alike."""

    traced: list[int] = field(default_factory=list)
    copies: int = 0
    caches: bool = False
    """whether it reads and writes keys and values"""
    beside: tuple[None, ...] | None = None
    """what it returns beside its states: nothing, or attention weights that nobody asked for"""


@dataclass
class _Segment:
    """The nodes of a layer that was traced, between its marks."""

    begin: ir.Node
    nodes: list[ir.Node]
    end: ir.Node


class Repeats:
    """The layers of one model while it is traced, and their copies afterwards."""

    def __init__(self, model: nn.Module) -> None:
        found = {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, GradientCheckpointingLayer)
        }
        self.paths, self.layers = list(found), list(found.values())
        self._kinds: dict[Any, _Kind] = {}
        self._seen: list[Any] = []  # arguments are told apart by identity, so they have to live
        self._refused: str | None = None
        self._tensors: dict[str, Tensor] = {}
        self._weights: dict[str, ir.Value] = {}

    @contextlib.contextmanager
    def abridged(self) -> Iterator[None]:
        """Swap the layers' forwards for the length of a with statement."""
        signatures = [signature(layer) for layer in self.layers]
        for path, layer in zip(self.paths, self.layers, strict=True):
            named = [
                *layer.named_parameters(remove_duplicate=False),
                *layer.named_buffers(remove_duplicate=False),
            ]
            self._tensors |= {f"{ROOT}{path}.{name}": tensor.detach() for name, tensor in named}
        for index, layer in enumerate(self.layers):
            layer.forward = self._instead_of(layer.forward, index, signatures[index])
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _instead_of(self, forward: Any, index: int, signature: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            if index == 0:
                self._kinds, self._seen, self._refused = {}, [], None
            if self._refused is not None or not args:
                self._refused = self.paths[index]
                return forward(*args, **options)
            self._seen.append((args, options))
            kind = self._kinds.setdefault(
                (signature, _identity(args[1:]), _identity(options)), _Kind()
            )
            if len(kind.traced) < TRACED:
                return self._whole(kind, index, forward, args, options)
            copied = self._copy(kind, index, args[0])
            return copied if kind.beside is None else (copied, *kind.beside)

        return run

    def _whole(self, kind: _Kind, index: int, forward: Any, args: Any, options: Any) -> Any:
        before = len(_present())
        past = list(now.past[before]) if before < len(getattr(now, "past", ())) else []
        result = forward(_mark(BEGIN, [args[0], *past], layer=index), *args[1:], **options)
        made = _present()[before:]
        states, *beside = result if isinstance(result, tuple) else (result,)
        if (
            not isinstance(states, Tensor)
            or any(value is not None for value in beside)
            or len(made) > 1
        ):
            self._refused = self.paths[index]
            return result
        kind.traced.append(index)
        kind.caches, kind.beside = bool(made), tuple(beside) if isinstance(result, tuple) else None
        marked = _mark(END, [states, *(made[0] if made else ())], layer=index)
        return marked if kind.beside is None else (marked, *kind.beside)

    def _copy(self, kind: _Kind, index: int, hidden: Tensor) -> Tensor:
        kind.copies += 1
        attributes: dict[str, Any] = {"layer": index, "like": kind.traced[-1]}
        if not kind.caches:
            return _mark(COPY, [hidden], **attributes)
        past = now.past[len(now.present)]
        values = [hidden, *past]
        out, *present = onnx_ops.symbolic_multi_out(
            f"{DOMAIN}::{COPY}",
            values,
            attrs=attributes,
            dtypes=[x.dtype for x in values],
            shapes=[x.shape for x in values],
            version=1,
        )
        now.present.append((present[0], present[1]))
        return out

    def check(self, model: ir.Model) -> None:
        """Of the graph as it was traced: UnlikeError where layers are not what they seemed."""
        if self._refused is not None:
            raise UnlikeError(self._refused)
        segments = _segments(model.graph)
        for kind in self._kinds.values():
            first, second = kind.traced[0], kind.traced[-1]
            if kind.copies and self._shape(segments[first], self.paths[first]) != self._shape(
                segments[second], self.paths[second]
            ):
                raise UnlikeError(self.paths[second])

    def write_out(self, model: ir.Model) -> None:
        """Put every copy's own nodes in its place, and take the marks away."""
        graph = model.graph
        segments = _segments(graph)
        for kind in self._kinds.values():
            if kind.copies and _escapes(segments[kind.traced[-1]]):
                raise UnlikeError(self.paths[kind.traced[-1]])
        for node in [node for node in graph if _is(node, COPY)]:
            self._write_copy(graph, node, segments)
        for node in [node for node in graph if _is(node, BEGIN) or _is(node, END)]:
            assert node.inputs[0] is not None
            replace(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)

    def _shape(self, segment: _Segment, path: str) -> Any:
        """What a layer computes, without its own names."""
        numbers: dict[ir.Value | None, Any] = {
            value: ("past", i) for i, value in enumerate(segment.begin.inputs) if i
        }
        numbers[segment.begin.outputs[0]] = "hidden"
        lines = []
        for node in segment.nodes:
            lines.append(
                (
                    node.domain,
                    node.op_type,
                    [numbers.get(value) or self._name(value, path) for value in node.inputs],
                    attributes(node, path),
                )
            )
            for value in node.outputs:
                numbers[value] = str(len(numbers))
        return (
            lines,
            [numbers.get(value, "outside") for value in segment.end.inputs],
            _escapes(segment),
        )

    def _name(self, value: ir.Value | None, path: str) -> Any:
        """A value from outside a layer: its own weight by the rest of the name, a small constant by
        its numbers.
        """
        if value is None or value.name is None:
            return value
        if value.name.startswith(f"{ROOT}{path}."):
            return value.name.removeprefix(f"{ROOT}{path}"), str(value.shape)
        if value.const_value is not None and value.const_value.size <= SMALL:
            return content(value.const_value)
        return value.name

    def _write_copy(self, graph: ir.Graph, copy: ir.Node, segments: dict[int, _Segment]) -> None:
        layer, like = copy.attributes["layer"].as_int(), copy.attributes["like"].as_int()
        segment, path, pattern = segments[like], self.paths[layer], self.paths[like]
        known: dict[ir.Value | None, ir.Value | None] = dict(
            zip(segment.begin.inputs, copy.inputs, strict=True)
        )
        known[segment.begin.outputs[0]] = copy.inputs[0]

        def here(value: ir.Value | None) -> ir.Value | None:
            if (
                value in known
                or value is None
                or not (value.name or "").startswith(f"{ROOT}{pattern}.")
            ):
                return known.get(value, value)
            return self._weight(
                f"{ROOT}{path}{str(value.name).removeprefix(f'{ROOT}{pattern}')}", value
            )

        for node in segment.nodes:
            attributes = {
                name: renamed(attribute, pattern, path)
                for name, attribute in node.attributes.items()
            }
            name = f"{node.name}.{layer}" if node.name else None
            made = ir.node(
                node.op_type,
                [here(value) for value in node.inputs],
                attributes=attributes,
                domain=node.domain,
                num_outputs=len(node.outputs),
                name=name,
            )
            graph.insert_before(copy, made)
            for old, new in zip(node.outputs, made.outputs, strict=True):
                new.name, new.shape, new.type = f"{old.name}.{layer}", old.shape, old.type
                known[old] = new
        for old, inner in zip(copy.outputs, segment.end.inputs, strict=True):
            result = here(inner)
            assert result is not None
            replace(old, result)
        graph.remove(copy, safe=True)

    def _weight(self, name: str, like: ir.Value) -> ir.Value:
        """A copied layer's own; the tracer dropped it, because nothing read it."""
        if name not in self._weights:
            tensor = TorchTensor(self._tensors[name], name=name)
            self._weights[name] = ir.Value(
                name=name, const_value=tensor, shape=tensor.shape, type=like.type
            )
        return self._weights[name]

    @contextlib.contextmanager
    def held_apart(self, graph: ir.Graph) -> Iterator[None]:
        """The layers' weights as inputs of the graph: no pass may merge or drop them before all
        their readers are there.
        """
        held = {
            name: graph.initializers.pop(name)
            for name in list(graph.initializers)
            if name in self._tensors
        }
        graph.inputs.extend(held.values())
        self._weights = dict(held)
        try:
            yield
        finally:
            for value in held.values():
                graph.inputs.remove(value)
            for value in self._weights.values():
                if value.uses():
                    graph.register_initializer(value)


def tidy(model: ir.Model, weights: Sequence[str]) -> None:
    """What the exporter leaves of a whole model: initialisers in the order of its `weights`, equal
    small constants and equal nodes only once, unique names."""
    places, initializers = (
        {name: place for place, name in enumerate(weights)},
        model.graph.initializers,
    )
    for value in sorted(
        [initializers.pop(name) for name in list(initializers)],
        key=lambda value: places.get(str(value.name), len(places)),
    ):
        model.graph.register_initializer(value)
    for one in (
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    ):
        one(model)


def _segments(graph: ir.Graph) -> dict[int, _Segment]:
    """Layer → its nodes, in order."""
    found: dict[int, _Segment] = {}
    begin: ir.Node | None = None
    nodes: list[ir.Node] = []
    for node in graph:
        if _is(node, BEGIN):
            begin, nodes = node, []
        elif _is(node, END):
            assert begin is not None
            found[node.attributes["layer"].as_int()] = _Segment(begin, nodes, node)
            nodes = []
        else:
            nodes.append(node)
    return found


def _is(node: ir.Node, kind: str) -> bool:
    return node.domain == DOMAIN and node.op_type == kind


def _mark(kind: str, values: list[Tensor], **attributes: Any) -> Tensor:
    """A node through which the first value goes; the others are noted as its inputs."""
    first = values[0]
    return onnx_ops.symbolic(
        f"{DOMAIN}::{kind}",
        values,
        attrs=attributes,
        dtype=first.dtype,
        shape=first.shape,
        version=1,
    )


def _present() -> list[Any]:
    return getattr(now, "present", [])


def _escapes(segment: _Segment) -> bool:
    """Whether anything but what the end mark names is read outside."""
    inside = {id(node) for node in [*segment.nodes, segment.end]}
    inner = {value for node in segment.nodes for value in node.outputs} - set(segment.end.inputs)
    return any(
        value.is_graph_output() or any(id(user) not in inside for user, _ in value.uses())
        for value in inner
    )
