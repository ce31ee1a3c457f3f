"""Adapters trained for the base that ships: torch learns on exactly the weights that the bundle
holds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_helpers import Shipped, rounded, stored_weights, train_and_ship
from training_helpers import intent_recipe, sft_recipe

from edgetune.adapters.folder import read_metadata
from edgetune.adapters.runs import load_adapted_model
from edgetune.core.errors import ProofError
from edgetune.export.bundle import export_bundle
from edgetune.export.inputs.sources import read_source
from edgetune.export.proof.prove import prove_bundle, reprove
from edgetune.export.proof.torch_model import precision_trained_for, reference_base, warning
from edgetune.models.fake_quantise import stored_bits
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.blocks import ROUNDING
from edgetune.quantisation.precision import Precision, shipped_precision
from edgetune.runtime.adapters.packing import pack_adapter
from edgetune.runtime.adapters.trained_for import other_weights
from edgetune.runtime.bundle.manifest import PrecisionInfo, read_manifest


@pytest.fixture(scope="module")
def decoder(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    folder = tmp_path_factory.mktemp("decoder")
    return train_and_ship(
        sft_recipe(tiny_decoder, folder, parameters={"base_precision": "int4"}), folder
    )


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    folder = tmp_path_factory.mktemp("encoder")
    return train_and_ship(
        intent_recipe(tiny_encoder, folder, parameters={"base_precision": "int4"}), folder
    )


@pytest.fixture(params=["decoder", "encoder"])
def shipped(request: pytest.FixtureRequest) -> Shipped:
    found: Shipped = request.getfixturevalue(request.param)
    return found


def test_training_sees_bit_for_bit_what_the_file_holds(shipped: Shipped) -> None:
    base = rounded(shipped.base)
    model, stored = load_body(base), stored_weights(shipped.bundle, shipped.manifest)
    assert stored.keys() == {
        name for name, bits in stored_bits(model, base.precision).items() if bits
    }  # type: ignore[arg-type]
    assert all(
        torch.equal(model.get_submodule(name).weight, weight) for name, weight in stored.items()
    )
    plain = dict(load_body(resolve_base(str(shipped.base))).state_dict())
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])
    }
    assert changed == {f"{name}.weight" for name in stored}


def test_the_proof_is_far_tighter_than_against_the_base_as_it_is(shipped: Shipped) -> None:
    own = shipped.manifest.proof["adapters"]["a"]
    assert own["passed"] and own["mean_kl"] * 20 < against_the_plain_base(shipped)


def against_the_plain_base(shipped: Shipped) -> float:
    """KL of the bundle from torch with the adapter on the base as it is."""
    source = read_source("a", shipped.run)
    source = replace(source, metadata={**source.metadata, "base_precision": None})
    rows = shipped.manifest.proof["probe"]
    return prove_bundle(
        shipped.bundle, shipped.manifest, resolve_base(str(shipped.base)), [source], rows, threads=1
    )["onnxruntime"]["a"].mean_kl


def test_the_proof_is_the_same_when_it_is_repeated(shipped: Shipped) -> None:
    again = reprove(shipped.bundle, read_manifest(shipped.bundle), threads=1)["onnxruntime"]["a"]
    assert again.passed and again.mean_kl == pytest.approx(
        shipped.manifest.proof["adapters"]["a"]["mean_kl"], rel=1e-3
    )


def test_the_run_says_what_it_was_trained_for(decoder: Shipped) -> None:
    expected = {
        "weights": "int4",
        "block_size": 32,
        "symmetric": True,
        "overrides": {"lm_head": "int8"},
        "rounding": ROUNDING,
    }
    assert json.loads((decoder.run / "summary.json").read_text())["base_precision"] == expected
    assert (
        json.loads((decoder.run / "adapter/edgetune_adapter.json").read_text())["base_precision"]
        == expected
    )
    assert 'base_precision = "int4"' in (decoder.run / "recipe.toml").read_text()
    assert not [line for line in decoder.said if line.startswith("adapter a:")]


def test_what_a_run_is_measured_on_has_these_weights_too(shipped: Shipped) -> None:
    model, _, _ = load_adapted_model(shipped.run)
    inner = model.get_base_model()
    held = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in getattr(inner, "body", inner).state_dict().items()
    }
    expected = load_body(rounded(shipped.base)).state_dict()
    assert expected.keys() <= held.keys() and all(
        torch.equal(held[name], tensor) for name, tensor in expected.items()
    )


def test_other_weights_than_those_it_learned_on_are_told_in_a_line(
    encoder: Shipped, tmp_path: Path
) -> None:
    said: list[str] = []
    manifest = export_bundle(
        [("a", encoder.run)],
        tmp_path / "b",
        precision=Precision("int8"),
        threads=1,
        say=said.append,
    )
    assert_told(said)
    assert manifest.proof["adapters"]["a"]["passed"]


def test_merged_into_weights_on_the_grid_it_is_told_and_may_not_survive(
    decoder: Shipped, tmp_path: Path
) -> None:
    said: list[str] = []
    with pytest.raises(ProofError, match=r"rounding leaves \d+% of ΔW.*--mode separate"):
        export_bundle(
            [("a", decoder.run)],
            tmp_path / "b",
            mode="merged",
            precision=Precision("int4"),
            threads=1,
            say=said.append,
        )
    assert_told(said)
    assert not (tmp_path / "b").exists()


def test_a_bundle_of_version_0_1_with_zeros_of_its_own_has_other_weights() -> None:
    trained = shipped_precision("int4", "decoder").to_dict()
    stored = PrecisionInfo("int4", 32, {"lm_head": "int8"}, symmetric=False)
    assert "this one is int4 (blocks of 32, zeros of their own, lm_head int8)" in other_weights(
        trained, stored
    )
    assert not other_weights(trained, replace(stored, symmetric=True))


def assert_told(said: list[str]) -> None:
    (line,) = [line for line in said if line.startswith("adapter a:")]
    assert "it was trained for the int4" in line and "--precision int4" in line and "ship" in line


def test_merged_into_fp32_nothing_is_rounded_again(decoder: Shipped) -> None:
    metadata = read_metadata(decoder.run / "adapter")
    merged = replace(decoder.manifest, mode="merged")
    assert "rounded once more, to int4" in warning("a", metadata, merged)
    assert (
        warning("a", metadata, replace(merged, precision=replace(merged.precision, weights="fp32")))
        == ""
    )
    assert reference_base(rounded(decoder.base), metadata, merged) == rounded(decoder.base)


def test_another_rounding_than_todays_is_told(decoder: Shipped) -> None:
    metadata = read_metadata(decoder.run / "adapter")
    older = {**metadata, "base_precision": {**metadata["base_precision"], "rounding": 0}}
    assert (
        "another version of edgetune" in warning("a", older, decoder.manifest)
        and warning("a", metadata, decoder.manifest) == ""
    )


def test_a_device_that_loads_it_into_another_bundle_is_told(decoder: Shipped) -> None:
    assert pack_adapter(decoder.run / "adapter", decoder.manifest).notes == ()
    other = replace(
        decoder.manifest,
        precision=replace(decoder.manifest.precision, weights="int8", overrides={}),
    )
    (note,) = pack_adapter(decoder.run / "adapter", other).notes
    assert note.startswith(
        "it was trained for the int4 (blocks of 32, lm_head int8) base, but this one is int8"
        " (blocks of 32);"
    )


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [(["int4", "int4"], "int4"), (["int4", None], None), (["int4", "int8"], None), ([], None)],
)
def test_an_export_follows_what_all_adapters_were_trained_for(
    tmp_path: Path, recorded: list[str | None], expected: str | None
) -> None:
    for at, weights in enumerate(recorded):
        (tmp_path / str(at) / "adapter").mkdir(parents=True)
        text = json.dumps({"base_precision": weights and {"weights": weights}})
        (tmp_path / str(at) / "adapter" / "edgetune_adapter.json").write_text(text)
    assert precision_trained_for([tmp_path / str(at) for at in range(len(recorded))]) == expected


def test_a_folder_that_says_nothing_leaves_the_default(tmp_path: Path) -> None:
    (tmp_path / "edgetune_adapter.json").write_text("not json")
    assert (
        precision_trained_for([tmp_path]) is None
        and precision_trained_for([tmp_path / "none"]) is None
    )
