"""`--activations int8`: an encoder's products of 8-bit integers, with one scale for an input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from export_helpers import make_adapter

from edgetune.cli.export import command
from edgetune.core.errors import ExportError
from edgetune.devices.host import saturates_int8
from edgetune.export.bundle import export_bundle
from edgetune.models.fake_quantise import linear_layers
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import Precision
from edgetune.runtime import Runtime
from edgetune.runtime.bundle.manifest import read_manifest

DYNAMIC = Precision("int8", activations="int8")


@pytest.fixture(scope="module")
def bundle(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic")
    adapters = [
        (name, make_adapter(tiny_encoder, folder / name, seed=seed, strength=0.5))
        for seed, name in enumerate("ab")
    ]
    export_bundle(adapters, folder / "bundle", precision=DYNAMIC, threads=1)
    return folder / "bundle"


def test_every_linear_layer_is_one_product_of_integers(bundle: Path) -> None:
    model = onnx.load(bundle / "engine.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert (
        kinds.count("DynamicQuantizeMatMul") == 8 and "MatMulNBits" not in kinds
    )  # of 2 layers: qkv packed, and three more
    weights = {value.name: value for value in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "DynamicQuantizeMatMul")
    assert weights[node.input[1]].data_type == onnx.TensorProto.INT8 and list(
        weights[node.input[2]].dims
    ) == [192]


def test_the_integers_times_their_scales_are_the_weights(bundle: Path, tiny_encoder: Path) -> None:
    model = onnx.load(bundle / "engine.onnx")
    weights = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    layers = linear_layers(load_body(resolve_base(str(tiny_encoder))))
    path = "encoder.layer.1.output.dense"
    (node,) = [node for node in model.graph.node if node.name == path]
    steps, scales = weights[node.input[1]].astype(np.float32), weights[node.input[2]]
    expected = layers[path].weight.detach().numpy().T
    assert np.abs(steps * scales - expected).max() <= np.abs(scales).max() * 0.51
    assert np.abs(weights[node.input[4]] - layers[path].bias.detach().numpy()).max() == 0


def test_it_is_proven_and_answers_nearly_as_fp32(
    bundle: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.precision.activations, manifest.precision.block_size) == ("int8", None)
    assert all(proof["passed"] for proof in manifest.proof["adapters"].values())
    assert "activations in int8" in (bundle / "report.html").read_text()
    adapter = make_adapter(tiny_encoder, tmp_path / "a", seed=0, strength=0.5)
    export_bundle([("a", adapter)], tmp_path / "fp32", threads=1)
    texts = ["turn on the lights", "my card has not arrived"]
    with (
        Runtime.open(bundle, threads=1) as dynamic,
        Runtime.open(tmp_path / "fp32", threads=1) as exact,
    ):
        for name in ("a", None):
            one, other = (np.asarray(runtime.embed(texts, name)) for runtime in (dynamic, exact))
            assert ((one * other).sum(1) > (0.95 if saturates_int8() else 0.99)).all() and np.abs(
                one - other
            ).max() > 1e-6


def test_a_layer_that_is_kept_stays_float(tiny_encoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_encoder, tmp_path / "a", strength=0.5)
    export_bundle(
        [("a", adapter)],
        tmp_path / "bundle",
        precision=Precision("int8", activations="int8", overrides={"output.dense": "fp32"}),
        threads=1,
    )
    kinds = {
        node.name: node.op_type
        for node in onnx.load(
            tmp_path / "bundle" / "engine.onnx", load_external_data=False
        ).graph.node
    }
    assert (
        kinds["encoder.layer.0.output.dense"] == "MatMul"
        and kinds["encoder.layer.0.intermediate.dense"] == "DynamicQuantizeMatMul"
    )


@pytest.mark.parametrize(
    ("precision", "mode", "expected"),
    [
        ("int4", "separate", "--precision int8"),
        ("int8", "merged", "--mode separate"),
        ("fp32", "separate", "--precision int8"),
    ],
)
def test_what_cannot_have_them_is_refused(
    precision: str, mode: str, expected: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_encoder, tmp_path / "a", strength=0.5)
    with pytest.raises(ExportError, match=expected):
        export_bundle(
            [("a", adapter)],
            tmp_path / "bundle",
            mode=mode,
            precision=Precision(precision, activations="int8"),
        )


def test_a_decoder_and_the_search_have_none(tiny_decoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_decoder, tmp_path / "a", strength=0.5)
    with pytest.raises(ExportError, match=r"expected base encoder, got decoder"):
        export_bundle([("a", adapter)], tmp_path / "bundle", precision=DYNAMIC)
    arguments = [
        "--adapter",
        f"a={adapter}",
        "--out",
        str(tmp_path / "b"),
        "--precision",
        "auto",
        "--activations",
        "int8",
    ]
    assert "tries no 8-bit activations" in str(CliRunner().invoke(command, arguments).exception)
