"""DeBERTa's relative positions: looked up in a table, an adapter's part added, for every kind that
is not refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from export_helpers import export, make_adapter, op_counts
from family_helpers import make_family, some
from head_helpers import room_recipe
from training_helpers import intent_recipe, silent
from transformers import DebertaV2Config

from edgetune.adapters.folder import load_adapter
from edgetune.cli.verify import command as verify
from edgetune.core.errors import ExportError
from edgetune.export.graph.families import encoder_family
from edgetune.export.graph.fuse import simplify
from edgetune.export.graph.lower import lower
from edgetune.export.graph.trace import trace_encoder
from edgetune.models.base import open_folder
from edgetune.models.fake_quantise import round_weights
from edgetune.models.heads import SequenceClassifier
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.engine.encoder import EncoderEngine
from edgetune.training import run_recipe
from edgetune.training.fast.fused_layers import fused_ops

NAME = "deberta-v2"
LENGTHS = (1, 7, 64, 20)  # tokens; the longest is all that the model takes
LAYERS = 2


@pytest.fixture(scope="module")
def base(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(NAME, tiny_encoder, tmp_path_factory.mktemp("deberta") / "base")


def texts(vocabulary: int) -> list[list[int]]:
    numbers = np.random.default_rng(0)
    return [numbers.integers(5, vocabulary, length).tolist() for length in LENGTHS]


def torch_logits(base: Path, adapter: Path, rows: list[list[int]]) -> list[np.ndarray]:
    opened = resolve_base(str(base))
    model = load_adapter(
        SequenceClassifier(load_body(opened), labels=3, pooling=opened.pooling or "mean"), adapter
    ).eval()
    with torch.no_grad():
        return [
            model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64))[0].numpy()
            for row in rows
        ]


def answers_as_torch(base: Path, folder: Path, *adapters: Path) -> None:
    """Rows of all lengths in a padded batch, each with every one of the adapters in turn."""
    manifest = export(folder / "bundle", *adapters)
    engine = EncoderEngine(folder / "bundle", manifest, threads=1)
    tensors = [pack_adapter(adapter, manifest).tensors for adapter in adapters]
    rows, count = texts(manifest.graph.vocab_size), len(adapters)
    expected = [torch_logits(base, adapter, rows) for adapter in adapters]
    for turn in range(count):
        logits, _ = engine.run(rows, [tensors[(i + turn) % count] for i in range(len(rows))])
        for i, got in enumerate(logits):
            assert np.abs(got - expected[(i + turn) % count][i]).max() < 1e-3, (turn, len(rows[i]))


def test_rows_of_a_batch_with_different_adapters_answer_as_torch(
    base: Path, tmp_path: Path
) -> None:
    """Of different ranks, on all layers, on queries or keys alone, and where positions are not
    concerned.
    """
    targets: dict[str, Any] = {
        "all": {"rank": 4},
        "queries": {"rank": 2, "target_modules": ("query_proj",)},
        "keys": {"rank": 7, "target_modules": ("key_proj",)},
    }
    targets["others"] = {"target_modules": ("value_proj", "dense")}
    answers_as_torch(
        base,
        tmp_path,
        *(
            make_adapter(base, tmp_path / name, seed=seed, **one)
            for seed, (name, one) in enumerate(targets.items())
        ),
    )


KINDS: dict[str, dict[str, Any]] = {
    "a row each distance": {"position_buckets": -1},
    "fewer rows than distances": {"position_buckets": -1, "max_relative_positions": 10},
    "the embedding without norm": {"norm_rel_ebd": "none"},
    "learned positions, types of tokens, a narrower embedding": {
        "position_biased_input": True,
        "type_vocab_size": 2,
        "embedding_size": 32,
    },
}


@pytest.mark.parametrize(
    "kind",
    some(
        KINDS,
        fast={
            "fewer rows than distances",
            "learned positions, types of tokens, a narrower embedding",
        },
    ),
)
def test_other_kinds_answer_as_torch(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    base = make_family(NAME, tiny_encoder, tmp_path / "base", **KINDS[kind])
    answers_as_torch(base, tmp_path, make_adapter(base, tmp_path / "a"))


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"relative_attention": False}, "relative_attention: .*expected true.*got false"),
        ({"pos_att_type": ["c2p"]}, "pos_att_type: .*expected c2p and p2c.*got c2p"),
        ({"pos_att_type": None}, "pos_att_type: .*got none"),
        ({"share_att_key": False}, "share_att_key: .*got false"),
        ({"conv_kernel_size": 3}, "conv_kernel_size: .*got 3"),
    ],
)
def test_a_kind_that_the_graph_does_not_have_is_refused(
    changed: dict[str, Any], where: str
) -> None:
    known = {
        "relative_attention": True,
        "pos_att_type": "p2c|c2p",
        "share_att_key": True,
        "position_buckets": 256,
    }
    assert encoder_family(DebertaV2Config(**known)).title.startswith("DeBERTa")
    with pytest.raises(ExportError, match=where):
        encoder_family(DebertaV2Config(**known | changed))


@pytest.fixture(scope="module")
def traced(base: Path) -> ir.Model:
    graph = trace_encoder(load_body(resolve_base(str(base))), pooling="mean", max_length=64)
    simplify(graph)
    return graph


@pytest.mark.parametrize(("adapter_inputs", "products"), [(True, 2), (False, 0)])
def test_the_base_looks_its_positions_up_and_only_an_adapter_multiplies(
    adapter_inputs: bool, products: int, traced: ir.Model
) -> None:
    graph = traced.clone()
    sites = lower(graph, Precision(), adapter_inputs=adapter_inputs)
    kinds = [node.op_type for node in graph.graph if ".LinearRows" in (node.name or "")]
    assert kinds.count("Gather") == 2 * LAYERS and kinds.count("MatMul") == products * LAYERS
    assert len(sites) == (
        4 * LAYERS if adapter_inputs else 0
    )  # queries, keys and values are one product


@pytest.mark.parametrize("precision", some(["int8", "int4", "fp16"], fast={"int8"}))
def test_it_is_proven_at_every_precision(precision: str, base: Path, tmp_path: Path) -> None:
    manifest = export(tmp_path / "bundle", make_adapter(base, tmp_path / "a"), precision=precision)
    assert manifest.proof["adapters"]["a"]["passed"]
    assert op_counts(tmp_path / "bundle")["GatherBlockQuantized"] == (
        0 if precision == "fp16" else 1 + 2 * LAYERS
    )


def test_the_table_is_of_the_weights_that_the_bundle_holds(base: Path, traced: ir.Model) -> None:
    """Training on a rounded base rounds what positions are projected with too."""
    model, precision, graph = load_body(resolve_base(str(base))), Precision("int4"), traced.clone()
    lower(graph, precision, adapter_inputs=False)
    name = "encoder.layer.1.attention.self.key_proj"
    packed, scales = (
        torch.from_numpy(graph.graph.initializers[f"{name}.LinearRows.{part}"].const_value.numpy())
        for part in ("weight", "scales")
    )
    table = ((packed.view(*scales.shape, -1).float() - 128) * scales[..., None]).flatten(1)
    positions, layer = model.encoder.get_rel_embedding(), model.get_submodule(name)
    exact = layer(positions)
    round_weights(model, precision)
    rounded = layer(positions)
    assert (
        (table - rounded).abs().max()
        <= 0.51 * scales.abs().max()
        < 0.1 * (table - exact).abs().max()
    )


def test_training_projects_only_the_rows_that_a_batch_can_reach(base: Path) -> None:
    model = load_body(open_folder(base, name="tiny"))
    seen: list[int] = []
    model.encoder.layer[0].attention.self.query_proj.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[1])
    )
    ids = torch.arange(5, 8)[None]
    expected = model(input_ids=ids).last_hidden_state
    with fused_ops(model):
        found = model(input_ids=ids).last_hidden_state
    assert seen == [3, 16, 3, 6]  # 8 rows on either side, or 3 of 3 tokens
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert model.encoder.layer[0].attention.self.pos_ebd_size == 8


def test_a_classifier_and_a_tagger_learn_are_exported_and_proven_again(
    base: Path, tmp_path: Path
) -> None:
    runs = {
        "intents": intent_recipe(base, tmp_path, epochs=8, max_length=32),
        "rooms": room_recipe(base, tmp_path, epochs=20, max_length=32),
    }
    for name, recipe in runs.items():
        summary = run_recipe(recipe, out=tmp_path / name, progress=silent())
        assert summary.metrics["accuracy" if name == "intents" else "token_accuracy"] > 0.9
    export(tmp_path / "bundle", *(tmp_path / name for name in runs))
    done = CliRunner().invoke(
        verify, [str(tmp_path / "bundle"), "--parity", "--threads", "1"], standalone_mode=False
    )
    assert (
        done.return_value == 0
        and "proof intents: passed" in done.output
        and "proof rooms: passed" in done.output
    )
    with Runtime.open(tmp_path / "bundle", threads=1) as runtime:
        assert (
            runtime.classify(["turn on the lights in the hall"], adapter="intents")[0].label
            == "lights"
        )
        assert list(runtime.tag([["the", "kitchen", "!"]], adapter="rooms")[0].tags) == [
            "O",
            "B-room",
            "O",
        ]


def test_the_digest_follows_how_positions_are_scored(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    config = json.loads((base / "config.json").read_text())

    def digest(**changed: Any) -> str:
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config | changed))
        return open_folder(tmp_path / "copy", name="tiny").digest

    assert digest() == digest(pos_att_type="c2p|p2c") != digest(position_buckets=16)
