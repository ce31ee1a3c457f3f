"""What adapters add where DeBERTa looks up a linear layer's products with a constant's rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgetune.export.graph.fuse import constant, new_node
from edgetune.export.graph.reshapes import replace
from edgetune.runtime.bundle.manifest import Site


def add_to_rows(
    graph: ir.Graph, nodes: Sequence[ir.Node], rows: Sequence[ir.Value], sites: Sequence[Site]
) -> None:
    """Put `rows`, what each `edgetune::LinearRows` looks up, in the nodes' places, with the adapter
    of its site where it has one.
    """
    places = {part.module: (site, at) for site in sites for at, part in enumerate(site.parts)}
    added: dict[str, list[ir.Value]] = {}
    read: dict[tuple[ir.Value | None, ir.Value | None], ir.Value] = {}
    for node, looked_up in zip(nodes, rows, strict=True):
        result, module = looked_up, node.attributes["module"].as_string()
        if module in places:
            site, at = places[module]
            source = node.inputs[1], node.inputs[0]
            if source not in read:
                read[source] = new_node(graph, node, "Gather", list(source))[0]
            if site.name not in added:
                added[site.name] = _added(graph, node, read[source], site)
            result = new_node(
                graph,
                node,
                "Add",
                [looked_up, added[site.name][at]],
                name=f"{module}.{node.op_type}.adapted",
            )[0]
        replace(node.outputs[0], result)


def _added(graph: ir.Graph, node: ir.Node, source: ir.Value, site: Site) -> list[ir.Value]:
    """(source A) B, cut into the columns of the site's parts."""
    inputs = {value.name: value for value in graph.inputs}
    down = new_node(
        graph, node, "MatMul", [source, inputs[site.A]], name=f"{site.name}.{node.op_type}.down"
    )[0]
    up = new_node(
        graph, node, "MatMul", [down, inputs[site.B]], name=f"{site.name}.{node.op_type}.up"
    )[0]
    if len(site.parts) == 1:
        return [up]
    sizes = constant(
        graph,
        f"{site.name}.split",
        np.array([part.stop - part.start for part in site.parts], np.int64),
    )
    return new_node(
        graph, node, "Split", [up, sizes], outputs=len(site.parts), attributes={"axis": -1}
    )
