"""The native plan of every family that has one, run by numpy: it answers as torch and as ONNX
Runtime.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import export, make_adapter
from family_helpers import WINDOW, make_family, some
from native_helpers import (
    COPIES,
    IDS,
    PRECISIONS,
    TAKEN,
    Array,
    Family,
    PlanRun,
    exact_logits,
    make,
)
from runtime_helpers import peft_adapter
from training_helpers import q4_1

from edgetune.export.bundle import build_base, export_bundle
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.bundle.native_plan import NativePlan


@pytest.fixture(scope="module", params=some(TAKEN, fast=set(TAKEN) - COPIES))
def family(request: Any, tiny_decoder: Path, tmp_path_factory: Any) -> Family:
    return make(request.param, tiny_decoder, tmp_path_factory.mktemp("family"))


def close(got: Array, expected: Array, tolerance: float = 1e-4) -> None:
    """Within a share of the largest logit."""
    assert got.shape == expected.shape
    worst = np.abs(got - expected).max()
    assert worst <= tolerance * max(1.0, np.abs(expected).max()), worst


def test_in_float_it_answers_as_torch_with_and_without_adapter(family: Family) -> None:
    bundle, manifest = family.build(PRECISIONS["fp32"], "fp32")
    run = PlanRun.open(bundle, manifest)
    adapted = run.with_adapter(pack_adapter(family.adapter, manifest).tensors).logits(IDS)
    close(run.logits(IDS), family.torch_logits(adapter=False))
    close(adapted, family.torch_logits(adapter=True))
    assert np.abs(adapted - run.logits(IDS)).max() > 0.1


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_in_blocks_it_answers_as_the_graph(family: Family, precision: str) -> None:
    bundle, manifest = family.build(PRECISIONS[precision], precision)
    run = PlanRun.open(bundle, manifest)
    tensors = pack_adapter(family.adapter, manifest).tensors
    close(run.logits(IDS), exact_logits(bundle, manifest, IDS, {}))
    close(run.with_adapter(tensors).logits(IDS), exact_logits(bundle, manifest, IDS, tensors))


KINDS: dict[str, tuple[Precision, Callable[[NativePlan], bool]]] = {
    "blocks of 16": (
        Precision("int4", block_size=16),
        lambda plan: {product.block_size for _, product in plan.products()} == {16},
    ),
    "blocks of 128": (
        Precision("int8", block_size=128),
        lambda plan: plan.head.block_size == 128 and plan.embedding.bits == 0,
    ),
    "zeros": (
        Precision("int4", quantiser="hqq"),
        lambda plan: all(product.zeros is not None for _, product in plan.products()),
    ),
    "an embedding of 4 bits": (
        Precision("int8", overrides={"embed_tokens": "int4"}),
        lambda plan: (plan.embedding.bits, plan.head.bits) == (4, 8),
    ),
    "layers kept": (
        Precision("int4", overrides={"1.mlp.down_proj": "fp32", "o_proj": "int8"}),
        lambda plan: (
            [[layer.qkv.bits, layer.attention_out.bits, layer.down.bits] for layer in plan.layers]
            == [[4, 8, 4], [4, 8, 0]]
        ),
    ),
}


@pytest.fixture(scope="module")
def llama(tiny_decoder: Path, tmp_path_factory: Any) -> Family:
    return make("llama", tiny_decoder, tmp_path_factory.mktemp("llama"))


def same_as_the_graph(family: Family, precision: Precision, name: str) -> NativePlan:
    """The plan, once it has answered as the graph with and without adapter."""
    bundle, manifest = family.build(precision, name)
    run, tensors = PlanRun.open(bundle, manifest), pack_adapter(family.adapter, manifest).tensors
    for given in ({}, tensors):
        close(run.with_adapter(given).logits(IDS), exact_logits(bundle, manifest, IDS, given))
    return run.plan


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_storing_weights(llama: Family, kind: str) -> None:
    precision, shows = KINDS[kind]
    assert shows(same_as_the_graph(llama, precision, kind))


def test_a_base_on_a_grid_with_offsets_has_columns_for_the_means(
    llama: Family, tmp_path: Path
) -> None:
    shutil.copytree(llama.base, tmp_path / "base")
    model: Any = load_body(resolve_base(str(llama.base)))
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(q4_1(*module.weight.shape))
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", strength=0.2)
    family = Family(tmp_path / "base", adapter, tmp_path)
    plan = same_as_the_graph(family, Precision("int4"), "bundle")
    assert all(product.means and product.zeros for _, product in plan.products())


def test_a_rotation_of_a_part_of_each_head_inside_attention(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    family = make("phi3", tiny_decoder, tmp_path, num_attention_heads=2, num_key_value_heads=1)
    bundle, manifest = family.build(Precision("fp32"), "bundle")
    run = PlanRun.open(bundle, manifest)
    assert (run.plan.rotaries[0].width, run.plan.head_dim) == (16, 32)
    close(run.logits(IDS), family.torch_logits(adapter=False))


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_biases_everywhere_and_other_activations(
    activation: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    changes = {"hidden_act": activation, "attention_bias": True, "mlp_bias": True}
    family = make("llama", tiny_decoder, tmp_path, **changes)
    bundle, manifest = family.build(Precision("fp32"), "fp32")
    run, tensors = PlanRun.open(bundle, manifest), pack_adapter(family.adapter, manifest).tensors
    close(run.with_adapter(tensors).logits(IDS), family.torch_logits(adapter=True))
    plan = same_as_the_graph(family, PRECISIONS["int4"], "int4")
    for layer in (*run.plan.layers, *plan.layers):
        products = (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        assert all(product.bias is not None for product in products)
        assert layer.activation == {"gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation)


def test_what_is_particular_about_a_family_stands_in_its_plan(family: Family) -> None:
    bundle, manifest = family.build(PRECISIONS["fp32"], "fp32")
    plan = PlanRun.open(bundle, manifest).plan
    first, last = plan.layers
    found = {
        "windows": first.window == WINDOW,
        "windows of some layers": first.window != last.window,
        "softcaps": first.softcap > 0 and plan.logits_softcap > 0,
        "scaled embedding": plan.embedding.multiplier == 8.0,
        "norms after": bool(first.after_attention and first.after_mlp),
        "q and k norms": bool(first.q_norm and first.k_norm),
        "biases": first.qkv.bias is not None,
        "tanh": first.activation == "gelu_tanh",
        "two tables": len(plan.rotaries) == 2,
        "layers not turned": last.rotary is None,
        "part of a head": plan.rotaries[0].width < plan.head_dim,
    }
    expected = TAKEN[manifest.base.model_type]
    assert {name for name, true in found.items() if true} == expected


def test_merged_weights_have_a_plan_without_sites(llama: Family, tmp_path: Path) -> None:
    manifest = export(tmp_path / "bundle", llama.adapter, mode="merged")
    run = PlanRun.open(tmp_path / "bundle", manifest)
    assert {product.site for _, product in run.plan.products()} == {None}
    close(run.logits(IDS), llama.torch_logits(adapter=True))
    reread = read_manifest(tmp_path / "bundle")
    assert reread.graph.native == "native.json" and "native.json" in reread.files


def test_an_adapter_on_the_output_projection_has_a_site_there(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    peft_adapter(tiny_decoder, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    bundle = tmp_path / "bundle"
    manifest = export_bundle(
        [("a", tmp_path / "a")], bundle, base_name=str(tiny_decoder), threads=1
    )
    run, tensors = PlanRun.open(bundle, manifest), pack_adapter(tmp_path / "a", manifest).tensors
    assert run.plan.head.site == "lm_head"
    expected = exact_logits(bundle, manifest, IDS, tensors)
    close(run.with_adapter(tensors).logits(IDS), expected)


def test_a_tied_embedding_and_output_projection_are_one_place(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    manifest = build_base(resolve_base(str(tiny_decoder)), tmp_path, precision=Precision("int8"))
    plan = PlanRun.open(tmp_path, manifest).plan
    assert (plan.embedding.weight, plan.embedding.scales) == (plan.head.weight, plan.head.scales)


@pytest.mark.parametrize(
    ("name", "precision", "reason"),
    [
        ("gpt2", "fp32", "LayerNormalization"),
        pytest.param("gpt_neox", "int8", "LayerNormalization", marks=pytest.mark.slow),
        pytest.param("opt", "int4", "LayerNormalization", marks=pytest.mark.slow),
        ("llama", "fp16", "not in float32"),
    ],
)
def test_another_graph_has_no_plan_and_a_line_says_why(
    name: str, precision: str, reason: str, tiny_decoder: Path, tmp_path: Path
) -> None:
    base, said = make_family(name, tiny_decoder, tmp_path / name), list[str]()
    (tmp_path / "out").mkdir()
    manifest = build_base(
        resolve_base(str(base)),
        tmp_path / "out",
        precision=Precision(precision),
        say=said.append,
    )
    assert manifest.graph.native is None and not (tmp_path / "out" / "native.json").exists()
    assert "native" not in manifest.to_dict()["graph"]
    line = next(line for line in said if line.startswith("native engine: not for this bundle: "))
    assert reason in line and "\n" not in line
