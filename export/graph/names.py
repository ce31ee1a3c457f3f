"""Names for people: what Netron shows of a graph. Nodes are called by the module they came from,
values and constants by their node.

Linear layers and embeddings have their module paths already. A norm is called by its weight; any
other node by its operator, in the module whose node comes before it
(`model.layers.0.self_attn.GroupQueryAttention`).
"""

from __future__ import annotations

import re

import onnx_ir as ir

from edgetune.export.graph.symbolic_layers import TRACED

NORMS = (
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
MADE_UP = re.compile(r"node_.*|")  # a node's name by the exporter
VALUE = re.compile(r"_*[a-z][a-z_0-9]*|")  # a value's: of no module, without a dot
WEIGHT = re.compile(
    rf"(?:model\.)?(?P<module>.+)\.(?:{TRACED}|weight)"
)  # what is traced holds the model under the name model
PART = re.compile(r"\.(down|up|adapted|means|inputs)$")  # of a linear layer
BEGINNING, END = "inputs", "head"  # what comes before every module; pooling, and what reads it


def name_for_people(graph: ir.Graph) -> None:
    """Rename nodes, values and constants in place; the graph's inputs and outputs keep their names,
    and so does what has a path.
    """
    fixed = {value.name for value in [*graph.inputs, *graph.outputs]}
    taken = {str(name) for name in fixed | set(graph.initializers)} | {
        node.name for node in graph if node.name and "." in node.name
    }
    scope = BEGINNING
    for node in graph:
        norm = None
        if MADE_UP.fullmatch(node.name or ""):
            norm = _norm(node)
            node.name = _free(norm or f"{scope}.{node.op_type}", taken)
        scope = PART.sub("", node.name or "").rpartition(".")[0] or scope
        for at, value in enumerate(node.outputs):
            if value.name not in fixed and value.name and VALUE.fullmatch(value.name):
                value.name = _free(f"{node.name}.out{at or ''}", taken)
        for at, given in enumerate(node.inputs):
            if (
                given is not None
                and given.name not in fixed
                and given.name in graph.initializers
                and (norm or VALUE.fullmatch(given.name or ""))
            ):
                given.name = _free(f"{node.name}.{_role(node, at)}", taken)
        if any(value.name == "last_hidden_state" for value in node.outputs):
            scope = END


def _norm(node: ir.Node) -> str | None:
    """The module path of a norm, by its weight; None where another norm has the same one (the
    exporter keeps equal weights once).
    """
    if node.op_type not in NORMS:
        return None
    found = (
        (value, WEIGHT.fullmatch(value.name or "")) for value in node.inputs if value is not None
    )
    return next(
        (match["module"] for value, match in found if match and len(value.uses()) == 1), None
    )


def _role(node: ir.Node, at: int) -> str:
    if node.op_type not in NORMS:
        return f"in{at}"
    return ("weight", "bias", "addend")[at - (2 if node.op_type.startswith("Skip") else 1)]


def _free(name: str, taken: set[str]) -> str:
    """The name, or with the first number that makes it another one."""
    if name in taken:
        name = next(
            one for number in range(2, len(taken) + 3) if (one := f"{name}.{number}") not in taken
        )
    taken.add(name)
    return name
