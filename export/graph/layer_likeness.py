"""When two layers of a model are alike: in their modules, and in the nodes they are traced to."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import nn

PLAIN = (bool, int, float, str, type(None))
SMALL = 64  # numbers of a constant that is compared by its values


def attributes(node: ir.Node, path: str) -> list[tuple[str, Any]]:
    """A node's attributes, a module's path without the layer's own."""
    return sorted(
        (name, content(renamed(attribute, path, "").value))
        for name, attribute in node.attributes.items()
    )


def content(value: Any) -> Any:
    return (
        (str(value.dtype), str(value.shape), value.numpy().tobytes())
        if isinstance(value, ir.TensorProtocol)
        else str(value)
    )


def renamed(attribute: ir.Attr, old: str, new: str) -> ir.Attr:
    """A module's path of one layer as that of another."""
    if attribute.type != ir.AttributeType.STRING or not attribute.as_string().startswith(f"{old}."):
        return attribute
    return ir.AttrString(attribute.name, f"{new}{attribute.as_string().removeprefix(old)}")


def signature(layer: nn.Module) -> Any:
    """What a layer is, without its weights' values and its number; what is neither plain nor shared
    by layers makes it unique.
    """
    parts = []
    for path, module in layer.named_modules():
        sizes = [
            (name, None if x is None else (tuple(x.shape), x.dtype))
            for name, x in [*module._parameters.items(), *module._buffers.items()]
        ]
        plain = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and name not in ("layer_idx", "forward")
        }
        parts.append((path, type(module), tuple(sizes), _identity(plain)))
    return tuple(parts)


def _identity(value: Any) -> Any:
    """Plain values and containers of them by their contents, all else by identity."""
    if isinstance(value, PLAIN):
        return type(value).__name__, value
    if isinstance(value, dict):
        return tuple((name, _identity(one)) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_identity(one) for one in value)
    return id(value)
