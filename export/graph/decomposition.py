"""torch's exporter traces a program twice, to take operators apart that ONNX has no form of.
Those of our models hold none but casts, and need no second trace, which is up to half of the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.export import ExportedProgram

ATEN = torch.ops.aten
CASTS = (ATEN.to.dtype, ATEN.to.dtype_layout)
CHECKS = (  # the exporter removes them itself
    ATEN.sym_constrain_range_for_size.default,
    ATEN._assert_async.default,
    ATEN._assert_async.msg,
    ATEN._assert_scalar.default,
    ATEN._assert_tensor_metadata.default,
)
Decompose = Callable[[ExportedProgram, Any], ExportedProgram]


@contextlib.contextmanager
def only_where_needed() -> Iterator[None]:
    """Inside, torch.onnx.export takes a program apart only where it must. With another version of
    torch, whose exporter has no such step, it does as it does.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes as passes
    except ImportError:
        yield
        return
    theirs: Decompose | None = getattr(passes, "decompose_with_registry", None)
    if theirs is None:
        yield
        return

    def decompose(program: ExportedProgram, registry: Any) -> ExportedProgram:
        if _is_plain(program, registry):
            _write_casts(program)
            return program
        return theirs(program, registry)

    with patch.object(passes, "decompose_with_registry", decompose):
        yield


def _is_plain(program: ExportedProgram, registry: Any) -> bool:
    """Whether every operator has a form in ONNX, or is a cast whose result is not the program's."""
    for node in program.graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in CHECKS:
            continue
        if node.target._schema.is_mutable:
            return False
        if node.target in CASTS:
            if any(user.op == "output" for user in node.users):
                return False
        elif not registry.is_registered(node.target):
            return False
    return True


def _write_casts(program: ExportedProgram) -> None:
    """Casts in the operator's one form that ONNX has; those to the type that is there go."""
    graph = program.graph
    for node in [*graph.nodes]:
        if node.target not in CASTS:
            continue
        source, dtype = node.args[0], node.meta["val"].dtype
        if source.meta["val"].dtype != dtype:
            with graph.inserting_before(node):
                cast = graph.call_function(ATEN._to_copy.default, (source,), {"dtype": dtype})
            cast.meta = {**node.meta}
            source = cast
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    program.graph_module.recompile()
