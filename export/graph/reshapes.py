"""Passes that take away what a model's code does to the shapes of q, k and v before attention,
where it moves nothing.

Families split their projections in different ways (slices, chunks, a dimension of three, heads in
front); the engine's attention takes (batch, sequence, width) as the projection leaves it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

ATTENTION = {"GroupQueryAttention", "MultiHeadAttention"}
LAST_AXIS_NORMS = {"SimplifiedLayerNormalization", "LayerNormalization"}
POINTWISE = {
    *LAST_AXIS_NORMS,
    "Linear",
    "Add",
    "Mul",
    "Relu",
    "Gelu",
    "Sigmoid",
    "Tanh",
}  # each position by itself


def drop_reshapes(graph: ir.Graph) -> None:
    """A chain of reshapes that ends in the shape it began with, (B, S, H·D) → (B, S, H, D) → (B, S,
    H·D), is the identity.
    """
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        root = node.inputs[0]
        while (
            root is not None
            and (maker := root.producer()) is not None
            and maker.op_type == "Reshape"
        ):
            root = maker.inputs[0]
        if root is not None and same_shape(root, node.outputs[0]):
            replace(node.outputs[0], root)


def keep_rows_apart(graph: ir.Graph) -> None:
    """(B, S, H) → (B·S, H), layers that look at one position each, and back: without the two
    reshapes.

    Fewer nodes, and adapters of the rows of a batch stay apart (`edgetune::Linear` takes the batch
    from its input).
    """
    for flatten in list(graph):
        source = flatten.inputs[0] if flatten.op_type == "Reshape" else None
        if source is None or source.shape is None or (values := _flattened(flatten)) is None:
            continue
        leading = list(source.shape)[:-1]
        for value in values[1:]:
            assert value.shape is not None
            value.shape = ir.Shape([*leading, value.shape[-1]])
        replace(values[0], source)


def _flattened(flatten: ir.Node) -> list[ir.Value] | None:
    """What is computed from a flattened value, up to where it is unflattened; None where something
    else reads it.
    """
    source, result = flatten.inputs[0], flatten.outputs[0]
    if (
        source is None
        or source.shape is None
        or result.shape is None
        or len(source.shape) != 3
        or len(result.shape) != 2
    ):
        return None
    if source.shape[-1] != result.shape[-1]:
        return None
    values, seen = [result], {id(result)}
    for value in values:
        for user, _ in value.uses():
            if (
                user.op_type == "Reshape"
                and user.outputs[0].shape is not None
                and len(user.outputs[0].shape) == 3
            ):
                continue
            if user.op_type not in POINTWISE or user.outputs[0].shape is None:
                return None
            if id(user.outputs[0]) not in seen:
                seen.add(id(user.outputs[0]))
                values.append(user.outputs[0])
    makers = [maker for value in values[1:] if (maker := value.producer()) is not None]
    read = [
        x for maker in makers for x in maker.inputs if x is not None and x.producer() is not None
    ]
    return values if all(id(x) in seen for x in read) else None


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Of equal rank and equal dimensions, with at most one of them unknown: a reshape cannot have
    moved anything.
    """
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    pairs = [(str(x), str(y)) for x, y in zip(a.shape, b.shape, strict=True)]
    return all(x == y for x, y in pairs) and sum(x == "None" for x, _ in pairs) <= 1


def commute_transposes(graph: ir.Graph) -> None:
    """Heads brought to the front and back again around a norm or a split of the last dimension:
    leave them where they are.
    """
    for node in list(graph):
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if (
            before is None
            or before.op_type != "Transpose"
            or not (node.op_type in LAST_AXIS_NORMS or _splits_last(node))
        ):
            continue
        perm = before.attributes["perm"].as_ints()
        after = [user for value in node.outputs for user, _ in value.uses()]
        if (
            perm[-1] != len(perm) - 1
            or not after
            or any(value.is_graph_output() for value in node.outputs)
        ):
            continue
        if not all(
            user.op_type == "Transpose" and _is_inverse(user.attributes["perm"].as_ints(), perm)
            for user in after
        ):
            continue
        attributes = {**dict(node.attributes.items()), "axis": ir.AttrInt64("axis", -1)}
        moved = ir.node(
            node.op_type,
            [before.inputs[0], *node.inputs[1:]],
            attributes=attributes,
            domain=node.domain,
            num_outputs=len(node.outputs),
        )
        graph.insert_before(node, moved)
        for old, new in zip(node.outputs, moved.outputs, strict=True):
            for user, _ in list(old.uses()):
                replace(user.outputs[0], new)


def _is_inverse(perm: Any, of: Any) -> bool:
    return [of[i] for i in perm] == list(range(len(of)))


def _splits_last(node: ir.Node) -> bool:
    shape = node.inputs[0].shape if node.op_type == "Split" and node.inputs[0] is not None else None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return shape is not None and axis in (-1, len(shape) - 1)


def split_instead_of_unbind(graph: ir.Graph) -> None:
    """(B, S, 3·H·D) → (B, S, 3, H, D), its three parts taken out and flattened: a Split of the last
    dimension.
    """
    for view in list(graph):
        if view.op_type != "Reshape" or (parts := _unbound(view)) is None:
            continue
        source = view.inputs[0]
        assert source is not None
        split = ir.node(
            "Split",
            [source],
            attributes={"axis": -1, "num_outputs": len(parts)},
            num_outputs=len(parts),
        )
        graph.insert_before(view, split)
        for old, new in zip(parts, split.outputs, strict=True):
            new.dtype = source.dtype
            replace(old, new)


def _unbound(view: ir.Node) -> list[ir.Value] | None:
    """The flattened parts of the third last dimension, in order, where nothing else reads the
    view.
    """
    source, shape = view.inputs[0], view.outputs[0].shape
    if (
        source is None
        or source.shape is None
        or shape is None
        or len(shape) != len(source.shape) + 2
    ):
        return None
    found: dict[int, ir.Value] = {}
    for user, _ in view.outputs[0].uses():
        piece = _piece(user)
        flat = [
            reader
            for value in user.outputs
            for squeeze, _ in value.uses()
            for reader, _ in squeeze.outputs[0].uses()
        ]
        if (
            piece is None
            or piece[2] - len(shape) * (piece[2] > 0) != -3
            or piece[1] - piece[0] != 1
            or len(flat) != 1
        ):
            return None
        if (
            flat[0].op_type != "Reshape"
            or flat[0].outputs[0].shape is None
            or len(flat[0].outputs[0].shape) != len(source.shape)
        ):
            return None
        found[piece[0]] = flat[0].outputs[0]
    return (
        [found[i] for i in range(len(found))]
        if sorted(found) == list(range(len(found))) and len(found) == shape[-3]
        else None
    )


def _piece(node: ir.Node) -> tuple[int, int, int] | None:
    """(start, end, axis) of a Slice along one axis with step 1 and constant bounds."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    numbers = []
    for value in node.inputs[1:]:
        tensor = ir.convenience.get_const_tensor(value) if value is not None else None
        if tensor is None or tensor.size != 1:
            return None
        numbers.append(int(tensor.numpy().reshape(-1)[0]))
    start, end, axis, step = [*numbers, 1][:4]
    return (start, end, axis) if step == 1 else None


def attend_to_packed(graph: ir.Graph) -> None:
    """A grouped-query attention whose q, k and v are the consecutive parts of one value takes that
    value as it is.
    """
    for node in graph:
        if node.op_type == "GroupQueryAttention" and (packed := _packed_source(node)) is not None:
            for place, value in enumerate((packed, None, None)):
                node.replace_input_with(place, value)


def _packed_source(attention: ir.Node) -> ir.Value | None:
    parts = attention.inputs[:3]
    makers = [value.producer() if value is not None else None for value in parts]
    first = makers[0]
    if first is None or any(maker is None for maker in makers):
        return None
    if (
        all(maker is first for maker in makers)
        and _splits_last(first)
        and list(first.outputs) == list(parts)
    ):
        return first.inputs[0]
    source = first.inputs[0]
    if source is None or source.shape is None or not isinstance(source.shape[-1], int):
        return None
    rank, width, end = len(source.shape), source.shape[-1], 0
    for maker in makers:
        piece = _piece(maker) if maker is not None and maker.inputs[0] is source else None
        if piece is None or piece[2] not in (-1, rank - 1) or piece[0] != end:
            return None
        end = min(piece[1], width)
    return source if end == width else None


def fold_query_scale(graph: ir.Graph) -> None:
    """Queries multiplied by a number before attention: attention's own scale takes it."""
    for node in graph:
        query = node.inputs[0] if node.op_type in ATTENTION else None
        maker = query.producer() if query is not None else None
        if maker is None or maker.op_type != "Mul":
            continue
        for value, number in (
            (maker.inputs[0], maker.inputs[1]),
            (maker.inputs[1], maker.inputs[0]),
        ):
            tensor = ir.convenience.get_const_tensor(number) if number is not None else None
            if tensor is not None and tensor.size == 1 and value is not None:
                factor = float(tensor.numpy().reshape(-1)[0])
                node.attributes["scale"] = ir.AttrFloat32(
                    "scale", node.attributes["scale"].as_float() * factor
                )
                node.replace_input_with(0, value)
                break


def constant_reshapes(graph: ir.Graph) -> None:
    """Reshapes say what they keep (0) instead of computing it from the shapes of other values."""
    for node in list(graph):
        if (
            node.op_type != "Reshape"
            or node.inputs[1] is None
            or ir.convenience.get_const_tensor(node.inputs[1]) is not None
        ):
            continue
        target = _target(node.inputs[0], node.outputs[0])
        if target is None:
            continue
        name = f"{node.outputs[0].name}.shape"
        value = ir.Value(
            name=name,
            const_value=ir.tensor(np.array(target, np.int64), name=name),
            shape=ir.Shape([len(target)]),
        )
        value.type = ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _target(source: ir.Value | None, result: ir.Value) -> list[int] | None:
    """Known sizes as they are, 0 where a dimension stays in its place, one -1 for what is left;
    None for more than one.
    """
    if source is None or source.shape is None or result.shape is None:
        return None
    kept = [str(size) for size in source.shape]
    target = []
    for i, size in enumerate(result.shape):
        if isinstance(size, int):
            target.append(size)
        else:
            target.append(
                0 if i < len(kept) and str(size) != "None" and kept[i] == str(size) else -1
            )
    return target if target.count(-1) <= 1 else None


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` read `new`; graph outputs keep their name."""
    new.shape = new.shape or old.shape
    new.type = new.type or old.type
    name = old.name if old.is_graph_output() else None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if name is not None:
        old.name, new.name = f"{name}.traced", name
