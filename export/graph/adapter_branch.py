"""One engine graph for two situations over the same weights: adapters active, and none.

A site's nodes cost time although no adapter is there. So the decoder of an encoder-decoder is one
`If`: its branches are the graph with adapter inputs and the same graph without them (decoders by
themselves run natively, where an adapter that is not there costs nothing). ONNX Runtime keeps what
it rearranges of a weight once for both branches, as long as they are not nested deeper (there it
does not rearrange weights at all, and a step takes fifty times as long: that is why there are two
situations and not more).

What says that no adapter is active is the first site's A: of shape (0, in, 0), group 0. A caller
that feeds rank 0 with group 1, as any graph takes it, gets the branch with adapter inputs and the
same answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import helper

from edgetune.runtime.bundle.manifest import Site
from edgetune.runtime.engine.session import ADAPTER_BRANCH

ADAPTED, PLAIN = "adapted", "plain"


def by_situation(model: ir.Model, sites: Sequence[Site]) -> ir.Model:
    """The graph as both branches of an `If`; the model itself is left as it is."""
    proto = ir.to_proto(model)
    graph = proto.graph
    adapted = _branch(list(graph.node), graph, ADAPTED)
    plain = _branch(
        _without(list(graph.node), sites, outputs=[value.name for value in graph.output]),
        graph,
        PLAIN,
    )
    group, active = f"{ADAPTER_BRANCH}.group", f"{ADAPTER_BRANCH}.active"
    nodes = [
        helper.make_node("Shape", [sites[0].A], [group], name=group, start=0, end=1),
        helper.make_node("Cast", [group], [active], name=active, to=onnx.TensorProto.BOOL),
        helper.make_node(
            "If",
            [active],
            [value.name for value in graph.output],
            name=ADAPTER_BRANCH,
            then_branch=adapted,
            else_branch=plain,
        ),
    ]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return ir.from_proto(proto)


def adapted_graph(model: onnx.ModelProto) -> onnx.GraphProto:
    """The nodes that run when an adapter is active, whether or not the graph knows situations."""
    for node in model.graph.node:
        if node.op_type == "If" and node.name == ADAPTER_BRANCH:
            return next(
                attribute.g for attribute in node.attribute if attribute.name == "then_branch"
            )
    return model.graph


def _without(
    nodes: list[onnx.NodeProto], sites: Sequence[Site], *, outputs: Sequence[str]
) -> list[onnx.NodeProto]:
    """The nodes without those of the adapters: who reads an adapted result reads the base's."""
    own = {site.A for site in sites} | {site.B for site in sites}
    results: dict[
        str, str
    ] = {}  # of an adapter → what to read instead ("" for what nothing else may read)
    kept = []
    for node in nodes:
        name = node.output[0]
        if own & set(node.input) or any(results.get(value) == "" for value in node.input):
            rest = [value for value in node.input if value not in own and results.get(value) != ""]
            results[name] = rest[0] if node.op_type == "Add" else ""
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [results.get(value, value) for value in node.input]
        kept.append(copy)
    # an output that an adapter's sum gave, such as the logits of a site on the output projection
    return kept + [
        helper.make_node("Identity", [results[name]], [name], name=f"{name}.base")
        for name in outputs
        if name in results
    ]


def _branch(
    nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto, prefix: str
) -> onnx.GraphProto:
    """A graph without inputs, whose values have names of their own: the weights and inputs are the
    outer graph's.
    """
    made = {name for node in nodes for name in node.output if name}
    branch = onnx.GraphProto(name=prefix)
    for node in nodes:
        copy = branch.node.add()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            names[:] = [f"{prefix}.{name}" if name in made else name for name in names]
    for value in graph.output:
        copy = branch.output.add()
        copy.CopyFrom(value)
        copy.name = f"{prefix}.{value.name}"
    return branch
