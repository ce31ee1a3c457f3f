"""Layers that are alike are traced twice and copied: the graph is the one of the model traced
whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from family_helpers import DECODERS, ENCODERS, make_family

from edgetune.export.graph import trace
from edgetune.export.graph.fuse import simplify
from edgetune.export.graph.trace import trace_decoder, trace_encoder
from edgetune.models.base import Base
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")  # whatever a family calls it
KINDS = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "no_rope_layers": [1, 1, 0] * 2,
}
COPIES = {
    "bert",
    "camembert",
    "deberta-v2",
    "electra",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "modernbert",
    "mistral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "roberta",
    "smollm3",
    "xlm-roberta",
}  # their layers are another family's, or have what distilbert, gemma3 and llama have; gpt2's own
# kind of attributes is a test of its own


def deep(name: str, request: Any, folder: Path, *, layers: int = 4, **more: Any) -> Base:
    """A family with so many layers, or with six of two kinds in turns where it knows kinds."""
    like = request.getfixturevalue("tiny_decoder" if name in DECODERS else "tiny_encoder")
    table: dict[str, dict[str, Any]] = DECODERS if name in DECODERS else ENCODERS
    kinds = {key: value for key, value in KINDS.items() if key in table[name]}
    depth = {key: 6 if kinds else layers for key in DEPTHS if key in table[name]}
    changed = kinds | depth | more
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table, name, table[name] | changed)
        return resolve_base(str(make_family(name, like, folder / "base")))


def graph_of(base: Base) -> list[str]:
    """Every node of the simplified graph, values by number, weights by their numbers."""
    model = load_body(base)
    graph = (
        trace_decoder(model, max_length=32)
        if base.kind == "decoder"
        else trace_encoder(model, pooling="mean", max_length=32)
    )
    simplify(graph)
    return lines(graph.graph)


def lines(graph: ir.Graph) -> list[str]:
    numbers: dict[Any, str] = {None: "-"} | {
        value: str(value.name) for value in [*graph.inputs, *graph.outputs]
    }

    def named(value: Any) -> str:
        if value is not None and value.is_initializer():
            return (
                f"{value.const_value.numpy().astype(np.float64).ravel()[:8].tolist()} {value.shape}"
                f" {value.dtype}"
            )
        return numbers.setdefault(value, f"#{len(numbers)}")

    return [
        f"{node.op_type} {[named(x) for x in node.inputs]}"
        f" {sorted((k, str(a.value)) for k, a in node.attributes.items())} →"
        f" {[(named(x), str(x.shape), x.dtype) for x in node.outputs]}"
        for node in graph
    ]


def whole(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graph traced layer by layer."""
    with monkeypatch.context() as patch:
        patch.setattr(trace, "Repeats", lambda model: None)
        return graph_of(base)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in COPIES else [])
        for name in [*DECODERS, *ENCODERS]
    ],
)
def test_copied_layers_give_the_graph_of_a_whole_trace(
    name: str, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = deep(name, request, tmp_path)
    assert graph_of(base) == whole(base, monkeypatch)


def test_most_layers_are_not_traced(
    request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    base, calls, forward = deep("llama", request, tmp_path, layers=6), [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (calls.append(1), forward(self, x))[1])
    graph_of(base)
    assert len(calls) == 2


def test_layers_that_look_at_their_own_number_are_traced_one_by_one(
    request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "forward",
        lambda self, hidden, *args, **options: (
            forward(self, hidden, *args, **options) * (1 + self.self_attn.layer_idx)
        ),
    )
    base = deep("llama", request, tmp_path, layers=3)
    found = graph_of(base)
    assert found == whole(base, monkeypatch)
    assert sum(line.startswith("GroupQueryAttention") for line in found) == 3


def test_layers_with_attributes_of_their_own_are_not_alike(
    request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = deep("gpt2", request, tmp_path, layers=3, scale_attn_by_inverse_layer_idx=True)
    found = graph_of(base)
    assert found == whole(base, monkeypatch)
    assert (
        len({line.split("'scale'")[1] for line in found if line.startswith("GroupQueryAttention")})
        == 3
    )
