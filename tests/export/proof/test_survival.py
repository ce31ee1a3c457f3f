"""A quantised merge reports how much of ΔW rounding left, and fails where it took it away."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_helpers import export, make_adapter
from family_helpers import make_family

from edgetune.adapters.folder import load_adapter
from edgetune.core.errors import ProofError
from edgetune.export.proof.proof import with_survival
from edgetune.export.proof.survival import survival, survival_summary
from edgetune.models.fake_quantise import round_weights
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.blocks import quantise
from edgetune.quantisation.precision import Precision

INT4 = Precision("int4", overrides={"lm_head": "int8"})


@pytest.fixture(scope="module")
def on_the_grid(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder with its linear layers already rounded to 4 bits, as a base out of a 4-bit
    file has them.
    """
    folder = tmp_path_factory.mktemp("grid") / "base"
    shutil.copytree(tiny_decoder, folder)
    model = load_body(resolve_base(str(tiny_decoder)))
    round_weights(model, INT4)
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path) -> torch.nn.Module:
    return load_adapter(load_body(resolve_base(str(base))), adapter)


@pytest.mark.parametrize("symmetric", [True, False], ids=["today", "of version 0.1"])
def test_each_layers_figures_are_those_of_the_definition(
    tiny_decoder: Path, tmp_path: Path, symmetric: bool
) -> None:
    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return quantise(weight, bits=4, symmetric=symmetric).dequantise()

    model = adapted(tiny_decoder, make_adapter(tiny_decoder, tmp_path / "a", strength=0.05))
    found = survival(model, replace(INT4, symmetric=symmetric))["model.layers.1.mlp.up_proj"]
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    weight, change = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach()
    shipped = rounded(weight + change) - rounded(weight)
    assert found.strength == pytest.approx(
        float((shipped * change).sum() / change.square().sum()), rel=1e-4
    )
    assert found.direction == pytest.approx(
        float(torch.cosine_similarity(shipped.flatten(), change.flatten(), dim=0)), rel=1e-4
    )


def test_a_larger_change_and_more_bits_keep_the_direction(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    small, large = (
        adapted(tiny_decoder, make_adapter(tiny_decoder, tmp_path / str(s), strength=s))
        for s in (0.01, 0.3)
    )
    at_4, at_8 = (
        survival_summary(survival(small, Precision(name)))["direction"] for name in ("int4", "int8")
    )
    assert at_4 < survival_summary(survival(large, INT4))["direction"] and at_4 < at_8
    assert survival_summary(survival(small, Precision("int8")))["strength"] == pytest.approx(
        1.0, abs=0.1
    )
    assert survival(small, Precision("fp32")) == {}


def test_a_base_on_the_grid_takes_a_small_change_away(on_the_grid: Path, tmp_path: Path) -> None:
    adapter = make_adapter(on_the_grid, tmp_path / "a", strength=0.005)
    assert survival_summary(survival(adapted(on_the_grid, adapter), INT4))["strength"] < 0.3
    assert (
        survival_summary(survival(adapted(on_the_grid, adapter), Precision("int8")))["strength"]
        > 0.7
    )


def test_an_export_that_lost_the_adapter_fails_with_the_remedies(
    on_the_grid: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(on_the_grid, tmp_path / "a", strength=0.005)
    with pytest.raises(
        ProofError,
        match=(
            r"rounding leaves \d+% of ΔW, bound 50%, least in model\.layers.*--precision"
            r" int8.*--mode separate"
        ),
    ):
        export(tmp_path / "bundle", adapter, precision="int4", mode="merged")
    assert not (tmp_path / "bundle").exists()


def test_transposed_weights_and_whole_models_are_measured_too(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    base = make_family("gpt2", tiny_decoder, tmp_path / "base")
    model = adapted(base, make_adapter(base, tmp_path / "a", strength=0.2))
    layers = survival(model, Precision("int8"))
    plain, merged = (
        load_body(resolve_base(str(base))),
        adapted(base, tmp_path / "a").merge_and_unload(),
    )
    whole = survival(plain, Precision("int8"), trained=merged)
    assert layers.keys() == whole.keys() and len(layers) == 8
    for name, layer in layers.items():
        assert layer.strength == pytest.approx(
            whole[name].strength, abs=1e-3
        ) and layer.strength == pytest.approx(1.0, abs=0.05)


def test_the_line_and_the_verdict_name_the_weakest_layer(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    from edgetune.export.proof.proof import Proof

    proof = Proof(1, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, ())
    survived = survival_summary(
        survival(adapted(tiny_decoder, make_adapter(tiny_decoder, tmp_path / "a")), INT4)
    )
    assert (
        with_survival(proof, survived, least=0.5).passed
        and survived["weakest"] in with_survival(proof, survived, least=0.5).line()
    )
    assert not with_survival(proof, {**survived, "strength": 0.2}, least=0.5).passed


def test_a_packed_product_survives_as_it_is_stored(tiny_decoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a", strength=0.3)
    manifest = export(
        tmp_path / "bundle",
        adapter,
        precision="int4",
        mode="merged",
        overrides={"lm_head": "int8", "q_proj": "int8"},
    )
    assert manifest.precision.overrides == {
        "lm_head": "int8",
        "q_proj": "int8",
        "k_proj": "int8",
        "v_proj": "int8",
    }
    layers = manifest.proof["adapters"]["a"]["survived"]["layers"]
    at_8 = survival(adapted(tiny_decoder, adapter), Precision("int8"))
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        assert layers[path]["direction"] == pytest.approx(at_8[path].direction, abs=1e-6)


def test_an_adapted_model_is_rounded_as_its_base_is(tiny_encoder: Path, tmp_path: Path) -> None:
    from edgetune.export.inputs.sources import read_source
    from edgetune.export.proof.torch_model import torch_model

    base, plain = resolve_base(str(tiny_encoder)), load_body(resolve_base(str(tiny_encoder)))
    model = torch_model(base, read_source("a", make_adapter(tiny_encoder, tmp_path / "a")))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    round_weights(plain, Precision("int8"))
    round_weights(model, Precision("int8"))
    rounded = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        path = name.removeprefix("base_model.model.bert.").replace(".base_layer", "")
        expected = rounded[path] if path in rounded else before[name]
        assert torch.equal(weight, expected), name
    assert not torch.equal(
        rounded["embeddings.word_embeddings.weight"],
        before["base_model.model.bert.embeddings.word_embeddings.weight"],
    )
