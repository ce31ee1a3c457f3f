"""The lowered graph of a decoder → its native plan, or one line about why it has none.

The graph is read backwards, from the logits to the token embedding, layer by layer; every node has
to be one that the plan expresses, and in the end no node may be left over. So whatever stands in
the proven graph and not in the plan leads to no plan, never to a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edgetune.core.errors import BundleError
from edgetune.export.graph.native_attention import POSITIONS, Attentions
from edgetune.export.graph.native_nodes import (
    ANY,
    NORM,
    SKIP_NORM,
    Nodes,
    NotExpressibleError,
    is_input,
)
from edgetune.runtime.bundle.manifest import STATES, GraphInfo, Site
from edgetune.runtime.bundle.native_plan import (
    PLAN_VERSION,
    Layer,
    NativePlan,
    Norm,
    Product,
)
from edgetune.runtime.bundle.native_reader import native_plan_from_dict

CACHE = "float32"


def native_plan(
    graph: ir.Graph, info: GraphInfo, sites: Sequence[Site], *, data_bytes: int
) -> NativePlan:
    """The plan of a decoder's graph whose weights lie in a data file of `data_bytes`;
    NotExpressibleError says why it has none.
    """
    if info.cache_dtype != CACHE or info.layers is None or info.head_dim is None:
        raise NotExpressibleError("its graph is not in float32")
    plan = _Decoder(graph, info, tuple(sites)).plan()
    try:
        return native_plan_from_dict(
            plan.to_dict(), info, tuple(sites), data_bytes=data_bytes, where="the plan"
        )
    except BundleError as error:
        raise NotExpressibleError(str(error.what)) from error


class _Decoder:
    """One walk from the logits back to the tokens."""

    def __init__(self, graph: ir.Graph, info: GraphInfo, sites: tuple[Site, ...]) -> None:
        self.graph, self.info, self.nodes = graph, info, Nodes(graph, sites)
        self.attentions = Attentions(graph, info, self.nodes)

    def plan(self) -> NativePlan:
        info = self.info
        assert info.layers is not None and info.kv_heads is not None and info.head_dim is not None
        self._check_ends(info.layers)
        value: ir.Value | None = next(v for v in self.graph.outputs if v.name == "logits")
        softcap, value = self._logits_softcap(value)
        head, states = self.nodes.product(value)
        norm, residual, branch = self._final_norm(self._all_rows(states))
        layers: list[Layer] = []
        heads = set[int]()
        for at in reversed(range(info.layers)):
            layer, count, residual = self._layer(at, residual, branch)
            layers.insert(0, layer)
            heads.add(count)
            if at:
                residual, branch = self._summands(residual)
        embedding = self.nodes.embedding(residual, info.hidden_size)
        self._check_all_taken()
        if len(heads) != 1:
            raise NotExpressibleError("its layers have different numbers of heads")
        return NativePlan(
            version=PLAN_VERSION,
            hidden=info.hidden_size,
            vocab=info.vocab_size,
            heads=heads.pop(),
            kv_heads=info.kv_heads,
            head_dim=info.head_dim,
            embedding=embedding,
            layers=tuple(layers),
            norm=norm,
            head=head,
            logits_softcap=softcap,
            rotaries=tuple(self.attentions.rotaries),
        )

    def _check_ends(self, layers: int) -> None:
        """The graph takes and gives what a plain decoder does."""
        pairs = [f"{at}.{part}" for at in range(layers) for part in ("key", "value")]
        outputs = {value.name for value in self.graph.outputs} - {STATES}
        if other := outputs - {"logits", *(f"present.{pair}" for pair in pairs)}:
            raise NotExpressibleError(f"its graph has the output {min(map(str, other))}")
        own = {*self.nodes.sites, *(site.B for site in self.nodes.sites.values())}
        own |= {
            "input_ids",
            "logits_index",
            *POSITIONS,
            *(f"past_key_values.{pair}" for pair in pairs),
        }
        if other := {value.name for value in self.graph.inputs} - own:
            raise NotExpressibleError(f"its graph has the input {min(map(str, other))}")

    def _check_all_taken(self) -> None:
        for node in self.graph:
            if node not in self.nodes.taken:
                raise NotExpressibleError(
                    f"its graph has {node.op_type} ({node.name}), which is part of no layer"
                )

    def _logits_softcap(self, value: ir.Value | None) -> tuple[float, ir.Value | None]:
        """c · tanh(x / c) → c, x; another value → 0, the value."""
        nodes = self.nodes
        if not nodes.is_made_by(value, "Mul"):
            return 0.0, value
        outer = nodes.maker(value, "Mul")
        inner = nodes.maker(nodes.maker(outer.inputs[0], "Tanh").inputs[0], "Div")
        cap = nodes.number(outer.inputs[1], outer)
        nodes.demand(cap == nodes.number(inner.inputs[1], inner) and cap > 0, outer)
        return cap, inner.inputs[0]

    def _all_rows(self, states: ir.Value | None) -> ir.Value | None:
        """The states of all tokens, of which the head reads those that `logits_index` names."""
        nodes = self.nodes
        rows = nodes.maker(states, "GatherND")
        nodes.demand(nodes.attributes(rows, batch_dims=ANY)["batch_dims"] == 1, rows)
        index = nodes.maker(rows.inputs[1], "Unsqueeze")
        nodes.demand(is_input(index.inputs[0], "logits_index"), index)
        nodes.demand(nodes.numbers(index.inputs[1], index).tolist() in ([-1], [2]), index)
        given = [value for value in self.graph.outputs if value.name == STATES]
        nodes.demand(all(value is states for value in given), rows)
        return rows.inputs[0]

    def _final_norm(self, value: ir.Value | None) -> tuple[Norm, ir.Value | None, ir.Value | None]:
        """The norm before the head, and the two values whose sum it reads."""
        nodes, hidden = self.nodes, self.info.hidden_size
        if nodes.is_made_by(value, SKIP_NORM):
            node = nodes.maker(value, SKIP_NORM)
            nodes.demand(len(node.inputs) == 3 and value is node.outputs[0], node)
            return nodes.norm(node, node.inputs[2], hidden), node.inputs[0], node.inputs[1]
        node = nodes.maker(value, NORM)
        nodes.demand(len(node.inputs) == 2, node)
        return nodes.norm(node, node.inputs[1], hidden), *self._summands(node.inputs[0])

    def _summands(self, total: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
        """The stream so far and the branch that a layer adds to it."""
        nodes = self.nodes
        node = nodes.maker(total, SKIP_NORM, "Add")
        if node.op_type == SKIP_NORM:
            nodes.demand(len(node.outputs) == 4 and total is node.outputs[3], node)
        return node.inputs[0], node.inputs[1]

    def _norm_of(self, value: ir.Value | None, stream: ir.Value | None) -> Norm:
        """The norm that makes a value out of the stream."""
        nodes = self.nodes
        node = nodes.maker(value, SKIP_NORM, NORM)
        if node.op_type == NORM:
            nodes.demand(len(node.inputs) == 2 and node.inputs[0] is stream, node)
            return nodes.norm(node, node.inputs[1], self.info.hidden_size)
        whole = len(node.inputs) == 3 and len(node.outputs) == 4 and value is node.outputs[0]
        nodes.demand(whole and node.outputs[3] is stream, node)
        return nodes.norm(node, node.inputs[2], self.info.hidden_size)

    def _layer(
        self, at: int, stream: ir.Value | None, branch: ir.Value | None
    ) -> tuple[Layer, int, ir.Value | None]:
        """The layer that adds `branch` to `stream` at its end; its heads, and the stream before
        it.
        """
        nodes, hidden = self.nodes, self.info.hidden_size
        after_mlp, value = nodes.plain_norm(branch, hidden)
        down, value = nodes.product(value)
        activation, gate_up, value = self._gated(value)
        mlp_norm = self._norm_of(value, stream)
        stream, branch = self._summands(stream)
        after_attention, value = nodes.plain_norm(branch, hidden)
        attention_out, value = nodes.product(value)
        attention, value = self.attentions.read(at, value)
        layer = Layer(
            attention_norm=self._norm_of(value, stream),
            qkv=attention.qkv,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            rotary=attention.rotary,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
            attention_out=attention_out,
            after_attention=after_attention,
            mlp_norm=mlp_norm,
            gate_up=gate_up,
            activation=activation,
            down=down,
            after_mlp=after_mlp,
        )
        return layer, attention.heads, stream

    def _gated(self, value: ir.Value | None) -> tuple[str, Product, ir.Value | None]:
        """activation(gate) · up, both of one product → the activation, the product, what it
        reads.
        """
        nodes = self.nodes
        node = nodes.maker(value, "Mul")
        a, b = node.inputs
        acted, up = (b, a) if nodes.is_made_by(a, "Split") else (a, b)
        act, split = nodes.maker(acted, "QuickGelu", "Gelu"), nodes.maker(up, "Split")
        if act.op_type == "QuickGelu":
            nodes.demand(nodes.attributes(act, alpha=ANY)["alpha"] == 1.0, act)
            activation = "silu"
        else:
            kind = nodes.attributes(act, approximate=None)["approximate"] or "none"
            nodes.demand(kind in ("none", "tanh") and act.domain == "", act)
            activation = {"none": "gelu", "tanh": "gelu_tanh"}[kind]
        gate_up, source = nodes.product(split.inputs[0])
        parts = nodes.split_sizes(split, gate_up.outputs)
        halves = len(parts) == 2 and parts[0] == parts[1]
        nodes.demand(halves and [*split.outputs] == [act.inputs[0], up], split)
        return activation, gate_up, source
