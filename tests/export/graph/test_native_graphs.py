"""A graph with anything in it that a native plan cannot say has no plan: one change at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from family_helpers import make_family

from edgetune.export.bundle import build_base
from edgetune.export.graph.native_nodes import NotExpressibleError
from edgetune.export.graph.native_plan import native_plan
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.bundle.native_plan import NativePlan
from edgetune.runtime.bundle.native_reader import read_native_plan


@dataclass
class Built:
    """A bundle's graph, read anew for each change."""

    folder: Path
    manifest: Manifest

    def graph(self) -> ir.Graph:
        return ir.load(self.folder / "engine.onnx").graph

    def plan(self, graph: ir.Graph, **changes: Any) -> NativePlan:
        size = (self.folder / "model.onnx.data").stat().st_size
        info = replace(self.manifest.graph, **changes)
        return native_plan(graph, info, self.manifest.sites, data_bytes=size)


def build(name: str, like: Path, folder: Path) -> Built:
    base = resolve_base(str(make_family(name, like, folder / name)))
    bundle = folder / f"{name}-bundle"
    bundle.mkdir()
    return Built(bundle, build_base(base, bundle, precision=Precision("int4")))


@pytest.fixture(scope="module")
def built(tiny_decoder: Path, tmp_path_factory: Any) -> dict[str, Built]:
    folder = tmp_path_factory.mktemp("graphs")
    return {name: build(name, tiny_decoder, folder) for name in ("gemma3_text", "llama", "phi3")}


def nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == op]


def new_constant(graph: ir.Graph, array: np.ndarray) -> ir.Value:
    name = f"made.{len(graph.initializers)}"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def say_otherwise(op: str, name: str, attribute: Any) -> Callable[[ir.Graph], None]:
    """The first node of a kind gets an attribute of another value."""

    def change(graph: ir.Graph) -> None:
        make = ir.AttrInt64 if isinstance(attribute, int) else ir.AttrFloat32
        nodes(graph, op)[0].attributes[name] = make(name, attribute)

    return change


def read_otherwise(op: str, place: int, array: Any) -> Callable[[ir.Graph], None]:
    """The first node of a kind reads another constant."""

    def change(graph: ir.Graph) -> None:
        nodes(graph, op)[0].replace_input_with(place, new_constant(graph, np.array(array)))

    return change


def insert_before(op: str, place: int, made: str) -> Callable[[ir.Graph], None]:
    """The first node of a kind reads its input through one more node."""

    def change(graph: ir.Graph) -> None:
        node = nodes(graph, op)[0]
        between = ir.node(made, [node.inputs[place]])
        graph.insert_before(node, between)
        node.replace_input_with(place, between.outputs[0])

    return change


def gate_is_second(graph: ir.Graph) -> None:
    act, mul = nodes(graph, "QuickGelu")[0], nodes(graph, "Mul")[0]
    gate, up = act.inputs[0], mul.inputs[1]
    act.replace_input_with(0, up)
    mul.replace_input_with(1, gate)


def past_of_another_layer(graph: ir.Graph) -> None:
    first, second = nodes(graph, "GroupQueryAttention")
    for place in (3, 4):
        a, b = first.inputs[place], second.inputs[place]
        first.replace_input_with(place, b)
        second.replace_input_with(place, a)


def stream_left_out(graph: ir.Graph) -> None:
    norms = nodes(graph, "SkipSimplifiedLayerNormalization")
    norms[1].replace_input_with(0, norms[0].inputs[0])


def norm_of_another_value(graph: ir.Graph) -> None:
    products = nodes(graph, "MatMulNBits")
    products[2].replace_input_with(0, products[0].inputs[0])


def adapter_of_another_input(graph: ir.Graph) -> None:
    downs = [node for node in nodes(graph, "MatMul") if (node.name or "").endswith("o_proj.down")]
    downs[0].replace_input_with(0, downs[1].inputs[0])


def adapter_left_out(graph: ir.Graph) -> None:
    add = next(node for node in nodes(graph, "Add") if (node.name or "").endswith(".adapted"))
    base = add.inputs[0]
    ir.convenience.replace_all_uses_with(add.outputs[0], base)
    for node in (add, add.inputs[1].producer(), add.inputs[1].producer().inputs[0].producer()):  # type: ignore[union-attr]
        graph.remove(node, safe=True)  # type: ignore[arg-type]


def one_more_output(graph: ir.Graph) -> None:
    node = ir.node("Identity", [graph.outputs[0]])
    node.outputs[0].name = "score"
    graph.append(node)
    graph.outputs.append(node.outputs[0])


def a_node_that_nobody_reads(graph: ir.Graph) -> None:
    graph.append(ir.node("Identity", [graph.outputs[0]]))


def states_are_others(graph: ir.Graph) -> None:
    place = [value.name for value in graph.outputs].index("last_hidden_state")
    states = graph.outputs[place]
    node = ir.node("Relu", [states])
    graph.append(node)
    states.name, node.outputs[0].name = "before", "last_hidden_state"
    graph.outputs[place] = node.outputs[0]


def q_and_k_change_places(graph: ir.Graph) -> None:
    first, second = nodes(graph, "Reshape")[:2]
    q, k = first.inputs[0], second.inputs[0]
    first.replace_input_with(0, k)
    second.replace_input_with(0, q)


CHANGES: dict[str, tuple[str, Callable[[ir.Graph], None]]] = {
    "another activation": ("llama", say_otherwise("QuickGelu", "alpha", 1.702)),
    "an activation that is the operator's default": (
        "llama",
        lambda graph: nodes(graph, "QuickGelu")[0].attributes.clear(),
    ),
    "the gate second": ("llama", gate_is_second),
    "halves of other sizes": ("llama", read_otherwise("Split", 1, [64, 128])),
    "interleaved rotation": (
        "llama",
        say_otherwise("GroupQueryAttention", "rotary_interleaved", 1),
    ),
    "an option of attention": ("llama", say_otherwise("GroupQueryAttention", "smooth_softmax", 1)),
    "tables that are not read": ("llama", say_otherwise("GroupQueryAttention", "do_rotary", 0)),
    "other heads": ("llama", say_otherwise("GroupQueryAttention", "num_heads", 8)),
    "the cache of another layer": ("llama", past_of_another_layer),
    "a layer that is skipped": ("llama", stream_left_out),
    "a product of another norm": ("llama", norm_of_another_value),
    "an adapter of another input": ("llama", adapter_of_another_input),
    "an adapter that is left out": ("llama", adapter_left_out),
    "a score": ("llama", one_more_output),
    "a node beside it": ("llama", a_node_that_nobody_reads),
    "other states": ("llama", states_are_others),
    "one more step before a product": ("llama", insert_before("MatMulNBits", 0, "Relu")),
    "one more step before the logits": ("llama", insert_before("GatherND", 0, "Relu")),
    "one more step before attention": ("llama", insert_before("GroupQueryAttention", 0, "Tanh")),
    "one more step in a norm": (
        "llama",
        insert_before("SkipSimplifiedLayerNormalization", 1, "Neg"),
    ),
    "an embedding of other rows": ("llama", insert_before("GatherBlockQuantized", 1, "Abs")),
    "a norm over another axis": ("llama", say_otherwise("SimplifiedLayerNormalization", "axis", 1)),
    "a weight in other numbers": (
        "llama",
        read_otherwise("SimplifiedLayerNormalization", 1, np.ones(64, np.float16)),
    ),
    "a scale for each dimension": (
        "gemma3_text",
        read_otherwise("Mul", 1, np.full(64, 8.0, np.float32)),
    ),
    "another order of q and k": ("gemma3_text", q_and_k_change_places),
    "a norm over all heads": ("gemma3_text", read_otherwise("Reshape", 1, [0, 0, 1, 128])),
    "positions that begin at 1": ("phi3", read_otherwise("Clip", 1, np.int64(1))),
    "rotation of other heads": ("phi3", say_otherwise("RotaryEmbedding", "num_heads", 2)),
    "slices that overlap": ("phi3", read_otherwise("Slice", 2, [80])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_that_is_changed_has_no_plan(change: str, built: dict[str, Built]) -> None:
    name, apply = CHANGES[change]
    graph = built[name].graph()
    assert built[name].plan(graph) == read_native_plan(built[name].folder, built[name].manifest)
    apply(graph)
    with pytest.raises(NotExpressibleError) as raised:
        built[name].plan(graph)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("changes", [{"layers": 3}, {"vocab_size": 353}, {"max_length": 129}])
def test_sizes_of_the_manifest_are_those_of_the_graph(
    changes: dict[str, int], built: dict[str, Built]
) -> None:
    with pytest.raises(NotExpressibleError):
        built["llama"].plan(built["llama"].graph(), **changes)
