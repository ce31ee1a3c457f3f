"""One grouped-query attention of the lowered graph for the native plan: how q, k and v come out of
one product, their norms and rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgetune.export.graph.native_nodes import ANY, Nodes, NotExpressibleError, is_input
from edgetune.runtime.bundle.manifest import GraphInfo
from edgetune.runtime.bundle.native_plan import Norm, Product, Rotary

POSITIONS = "seqlens_k", "total_sequence_length"  # inputs of the graph that attention reads


@dataclass(frozen=True)
class GroupedAttention:
    """What one attention does, and the product that gives its q, k and v."""

    heads: int
    qkv: Product
    q_norm: Norm | None
    k_norm: Norm | None
    rotary: int | None
    scale: float
    window: int
    softcap: float


class Attentions:
    """Reads attentions; keeps the rotary tables that they share."""

    def __init__(self, graph: ir.Graph, info: GraphInfo, nodes: Nodes) -> None:
        self.graph, self.info, self.nodes = graph, info, nodes
        self.tables: list[tuple[ir.Value, ir.Value]] = []
        self.rotaries: list[Rotary] = []

    def read(self, at: int, value: ir.Value | None) -> tuple[GroupedAttention, ir.Value | None]:
        """One grouped-query attention and what the product before it reads."""
        nodes, dim = self.nodes, self.info.head_dim or 0
        node = nodes.maker(value, "GroupQueryAttention")
        given = nodes.attributes(
            node,
            num_heads=ANY,
            kv_num_heads=self.info.kv_heads,
            do_rotary=None,
            rotary_interleaved=0,
            scale=ANY,
            local_window_size=None,
            softcap=None,
        )
        q, k, v, past_k, past_v, lengths, total, cos, sin = nodes.inputs(node, least=7, most=9)
        ends = [f"past_key_values.{at}.key", f"past_key_values.{at}.value", *POSITIONS]
        read = (past_k, past_v, lengths, total)
        nodes.demand(all(is_input(x, name) for x, name in zip(read, ends, strict=True)), node)
        made = [value, *(self._output(f"present.{at}.{part}") for part in ("key", "value"))]
        nodes.demand([*node.outputs] == made, node)
        heads, kv_heads = int(given["num_heads"]), self.info.kv_heads or 0
        rotary = self._rotary(cos, sin, node) if given["do_rotary"] else None
        nodes.demand(bool(given["do_rotary"]) or cos is sin is None, node)
        q_norm = k_norm = None
        if k is not None or v is not None:
            turned = [self._turned(x, n) for x, n in ((q, heads), (k, kv_heads))]
            nodes.demand(turned[0][0] == turned[1][0], node)
            if turned[0][0] is not None:
                nodes.demand(rotary is None, node)
                rotary = turned[0][0]
            q_norm, q = self._head_norm(turned[0][1], heads)
            k_norm, k = self._head_norm(turned[1][1], kv_heads)
            q = self._packed(node, (q, k, v), (heads * dim, kv_heads * dim, kv_heads * dim))
        qkv, source = nodes.product(q)
        attention = GroupedAttention(
            heads=heads,
            qkv=qkv,
            q_norm=q_norm,
            k_norm=k_norm,
            rotary=rotary,
            scale=float(given["scale"]),
            window=max(0, int(given["local_window_size"] or 0)),
            softcap=float(given["softcap"] or 0.0),
        )
        return attention, source

    def _output(self, name: str) -> ir.Value | None:
        return next((value for value in self.graph.outputs if value.name == name), None)

    def _rotary(self, cos: ir.Value | None, sin: ir.Value | None, node: ir.Node) -> int:
        """The index of a pair of tables among the plan's."""
        nodes = self.nodes
        if cos is None or sin is None or cos.const_value is None or sin.const_value is None:
            raise NotExpressibleError(
                f"its graph's {node.name} reads rotary tables that are no constants"
            )
        if (cos, sin) not in self.tables:
            positions, half = (int(size) for size in cos.const_value.shape.numpy())
            places = [nodes.place(x, node, shape=(positions, half)) for x in (cos, sin)]
            self.tables.append((cos, sin))
            self.rotaries.append(Rotary(places[0], places[1], positions, width=2 * half))
        return self.tables.index((cos, sin))

    def _turned(self, value: ir.Value | None, heads: int) -> tuple[int | None, ir.Value | None]:
        """The tables of a rotation outside of attention, and what it turns; None and the value
        where there is none.
        """
        nodes = self.nodes
        if not nodes.is_made_by(value, "RotaryEmbedding"):
            return None, value
        node = nodes.maker(value, "RotaryEmbedding")
        given = nodes.attributes(node, interleaved=0, num_heads=heads, rotary_embedding_dim=None)
        nodes.demand(len(node.inputs) == 4 and node.domain != "", node)
        source, positions, cos, sin = node.inputs
        self._check_positions(positions)
        rotary = self._rotary(cos, sin, node)
        width = given["rotary_embedding_dim"] or self.info.head_dim
        nodes.demand(width == self.rotaries[rotary].width, node)
        return rotary, source

    def _check_positions(self, value: ir.Value | None) -> None:
        """max(0, seqlens_k + 1 − S)[:, None] + arange(S)[None], S the length of `input_ids`: each
        token's own position.
        """
        nodes = self.nodes
        total = nodes.maker(value, "Add")
        first, steps = (nodes.maker(x, "Unsqueeze") for x in total.inputs)
        clip, places = nodes.maker(first.inputs[0], "Clip"), nodes.maker(steps.inputs[0], "Range")
        start = nodes.maker(clip.inputs[0], "Sub")
        count, length = nodes.maker(start.inputs[0], "Add"), start.inputs[1]
        last = nodes.maker(count.inputs[0], "Cast")
        shape = nodes.maker(nodes.maker(length, "Squeeze").inputs[0], "Shape")
        span = nodes.attributes(shape, start=ANY, end=ANY)
        nodes.demand(nodes.attributes(last, to=ANY)["to"] == ir.DataType.INT64, last)
        constants = {
            (first, 1): [1],
            (steps, 1): [0],
            (clip, 1): 0,
            (count, 1): 1,
            (places, 0): 0,
            (places, 2): 1,
        }
        fits = all(
            nodes.numbers(node.inputs[place], node).tolist() == number
            for (node, place), number in constants.items()
        )
        fits = fits and len(clip.inputs) == 2 and places.inputs[1] is length
        fits = fits and (span["start"], span["end"]) == (1, 2)
        ends = is_input(last.inputs[0], "seqlens_k") and is_input(shape.inputs[0], "input_ids")
        nodes.demand(fits and ends, total)

    def _head_norm(self, value: ir.Value | None, heads: int) -> tuple[Norm | None, ir.Value | None]:
        """(B, S, heads · dim) → (B, S, heads, dim), a norm over dim, and back."""
        nodes, dim = self.nodes, self.info.head_dim or 0
        if not nodes.is_made_by(value, "Reshape"):
            return None, value
        back = nodes.maker(value, "Reshape")
        norm, value = nodes.plain_norm(back.inputs[0], dim)
        there = nodes.maker(value, "Reshape")
        shapes = [nodes.numbers(node.inputs[1], node).tolist() for node in (there, back)]
        for node in (there, back):
            nodes.attributes(node, allowzero=0)
        nodes.demand(norm is not None, back)
        nodes.demand(shapes[0] in ([0, 0, heads, dim], [0, 0, -1, dim]), there)
        nodes.demand(shapes[1] in ([0, 0, heads * dim], [0, 0, -1]), back)
        return norm, there.inputs[0]

    def _packed(
        self,
        attention: ir.Node,
        parts: tuple[ir.Value | None, ...],
        widths: tuple[int, ...],
    ) -> ir.Value | None:
        """The value whose consecutive parts of these widths are q, k and v."""
        nodes = self.nodes
        if nodes.is_made_by(parts[0], "Split"):
            split = nodes.maker(parts[0], "Split")
            nodes.demand([*split.outputs] == [*parts], split)
            nodes.demand(nodes.split_sizes(split, sum(widths)) == [*widths], split)
            return split.inputs[0]
        slices = [nodes.maker(part, "Slice") for part in parts]
        start = 0
        for node, width in zip(slices, widths, strict=True):
            nodes.demand(len(node.inputs) in (4, 5), node)
            numbers = [nodes.numbers(x, node) for x in node.inputs[1:]]
            nodes.demand(all(array.size == 1 for array in numbers), node)
            first, end, axis, step = [*(int(array.reshape(-1)[0]) for array in numbers), 1][:4]
            whole = end == start + width or (node is slices[-1] and end >= np.iinfo(np.int32).max)
            nodes.demand((first, step) == (start, 1) and whole and axis in (-1, 2), node)
            start += width
        source = slices[0].inputs[0]
        nodes.demand(all(node.inputs[0] is source for node in slices), attention)
        return source
