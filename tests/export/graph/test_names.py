"""Names of a shipped graph, as Netron shows them: modules of the model, nothing that the exporter
made up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from export_helpers import make_adapter
from safetensors.torch import load_file, save_file

from edgetune.export.bundle import export_bundle
from edgetune.quantisation.precision import Precision

MADE_UP = re.compile(r"node_.*|val_\d+|.*_symbolic.*|getitem.*|\w+_\d+|")


def distinct_norms(base: Path, folder: Path) -> Path:
    """The base with norms that are not all ones: equal weights are stored once, under one name."""
    folder.mkdir()
    for file in base.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    for pooling in base.glob("1_Pooling"):
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_bytes((pooling / "config.json").read_bytes())
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    changed = {
        name: weight + 0.1 * torch.randn_like(weight) if "norm" in name.lower() else weight
        for name, weight in weights.items()
    }
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def graphs(base: Path, tmp_path: Path, precision: str) -> list[onnx.ModelProto]:
    own = distinct_norms(base, tmp_path / "base")
    adapter = make_adapter(own, tmp_path / "a", strength=0.5)
    export_bundle([("a", adapter)], tmp_path / "bundle", precision=Precision(precision), threads=1)
    return [
        onnx.load(tmp_path / "bundle" / name, load_external_data=False)
        for name in ("engine.onnx", "model.onnx")
    ]


@pytest.mark.parametrize("precision", ["fp32", "int8", "fp16"])
def test_every_node_of_a_decoder_is_called_by_its_module(
    precision: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    for model in graphs(tiny_decoder, tmp_path, precision):
        names = {node.name: node.op_type for node in nodes_of(model.graph)}
        values = {value for node in nodes_of(model.graph) for value in node.output} | {
            value.name for value in model.graph.initializer
        }
        assert [name for name in names if MADE_UP.fullmatch(name)] == []
        assert [name for name in values if MADE_UP.fullmatch(name) and name] == []
        assert names["model.layers.1.self_attn.GroupQueryAttention"] == "GroupQueryAttention"
        assert (
            names["model.layers.0.post_attention_layernorm"] == "SkipSimplifiedLayerNormalization"
        )
        assert {
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.down_proj",
            "model.embed_tokens",
            "lm_head",
        } <= set(names)
        assert {
            "model.layers.1.self_attn.o_proj.weight",
            "model.norm.weight",
            "model.layers.0.input_layernorm.weight",
        } <= {value.name for value in model.graph.initializer}


def test_so_is_every_node_of_an_encoder(tiny_encoder: Path, tmp_path: Path) -> None:
    for model in graphs(tiny_encoder, tmp_path, "int8"):
        names = {node.name: node.op_type for node in model.graph.node}
        assert (
            len(names) == len(model.graph.node)
            and [name for name in names if MADE_UP.fullmatch(name)] == []
        )
        assert names["encoder.layer.1.attention.self.MultiHeadAttention"] == "MultiHeadAttention"
        assert (
            names["encoder.layer.0.attention.output.LayerNorm"]
            == names["encoder.layer.1.output.LayerNorm"]
            == "SkipLayerNormalization"
        )


def test_the_graph_says_what_it_is(tiny_decoder: Path, tmp_path: Path) -> None:
    for model in graphs(tiny_decoder, tmp_path, "int8"):
        assert (model.producer_name, model.graph.name) == ("edgetune", "edgetune")
        assert "precision: int8" in model.doc_string and "mode: separate" in model.doc_string
        assert {entry.key for entry in model.metadata_props} >= {
            "base",
            "base_digest",
            "precision",
            "mode",
            "edgetune",
        }
