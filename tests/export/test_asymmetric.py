"""`edgetune export --asymmetric`: blocks with zeros of their own, which the manifest says and
everybody who reads it knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner
from export_helpers import export, make_adapter

from edgetune.cli.export import command
from edgetune.core.errors import ExportError
from edgetune.export.proof.prove import reprove
from edgetune.models.fake_quantise import round_weights
from edgetune.models.load import load_body
from edgetune.models.resolve import resolve_base
from edgetune.quantisation.precision import PrecisionInfo as Chosen
from edgetune.quantisation.precision import shipped_precision
from edgetune.runtime import Runtime
from edgetune.runtime.adapters.trained_for import is_held, other_weights
from edgetune.runtime.bundle.diff import diff
from edgetune.runtime.bundle.manifest import PrecisionInfo, manifest_from_dict, read_manifest

IDS = [5, 9, 30, 31]


@pytest.fixture(scope="module")
def adapter(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_decoder, tmp_path_factory.mktemp("adapters") / "a")


@pytest.fixture(scope="module")
def bundle(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, in int4 with an output projection in int8."""
    out = tmp_path_factory.mktemp("bundle") / "b"
    done = run(
        "--adapter",
        f"a={adapter}",
        "--out",
        out,
        "--precision",
        "int4",
        "--asymmetric",
        "--general-items",
        0,
        "--threads",
        1,
    )
    assert done.exit_code == 0, done.output
    return out


def run(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_every_scaled_weight_has_zeros_and_the_manifest_says_so(bundle: Path) -> None:
    names = {
        tensor.name
        for tensor in onnx.load(
            str(bundle / "engine.onnx"), load_external_data=False
        ).graph.initializer
    }
    scaled = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    assert (
        scaled == {name.removesuffix(".zeros") for name in names if name.endswith(".zeros")}
        and len(scaled) > 8
    )
    assert json.loads((bundle / "edgetune.json").read_text())["precision"]["symmetric"] is False
    assert not read_manifest(bundle).precision.symmetric


def test_the_engine_has_the_weights_of_the_same_quantiser_and_its_proof_repeats(
    bundle: Path, tiny_decoder: Path
) -> None:
    model = load_body(resolve_base(str(tiny_decoder)))
    round_weights(model, Chosen("int4", symmetric=False, overrides={"lm_head": "int8"}))
    with Runtime.open(bundle, threads=1) as runtime, torch.no_grad():
        (logits,) = runtime.decoder.logits([IDS], [None])
        expected = model(input_ids=torch.tensor([IDS])).logits[0]
    assert (
        torch.nn.functional.cosine_similarity(torch.from_numpy(logits), expected, dim=-1).min()
        > 0.995
    )
    assert reprove(bundle, read_manifest(bundle), threads=1)["a"].passed


def test_a_symmetric_bundle_says_nothing_so_that_older_readers_open_it(
    adapter: Path, bundle: Path, tmp_path: Path
) -> None:
    manifest = export(tmp_path / "b", adapter, precision="int4")
    document = json.loads((tmp_path / "b" / "edgetune.json").read_text())
    assert (
        "symmetric" not in document["precision"]
        and manifest_from_dict(document).precision == manifest.precision
    )
    changes = {
        (change.part, change.name): (change.a, change.b)
        for change in diff(tmp_path / "b", bundle).changes
    }
    assert changes["precision", "symmetric"] == (True, False)


def test_a_merge_is_proven_on_such_blocks(tiny_encoder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_encoder, tmp_path / "a")
    manifest = export(tmp_path / "b", adapter, precision="int8", mode="merged", symmetric=False)
    assert (
        manifest.proof["adapters"]["a"]["passed"]
        and reprove(tmp_path / "b", manifest, threads=1)["a"].passed
    )


def test_an_adapter_that_learned_on_symmetric_blocks_is_told(bundle: Path) -> None:
    trained, stored = (
        shipped_precision("int4", "decoder").to_dict(),
        read_manifest(bundle).precision,
    )
    line = other_weights(trained, stored)
    assert (
        "this one is int4 (blocks of 32, zeros of their own, lm_head int8)" in line
        and "--precision int4 without --asymmetric" in line
    )
    assert is_held({**trained, "symmetric": False}, stored) and not other_weights(
        {**trained, "symmetric": False}, stored
    )
    symmetric = PrecisionInfo("int4", 32, {"lm_head": "int8"})
    assert "export with --precision int4 --asymmetric" in other_weights(
        {**trained, "symmetric": False}, symmetric
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "fp32"), "here none are scaled"),
        (("--precision", "fp16"), "here none are scaled"),
        (("--precision", "auto"), "tries weights with the zero in the middle"),
        (("--precision", "int8", "--activations", "int8"), "weights around zero"),
        (("--format", "gguf-adapter"), "--asymmetric"),
    ],
)
def test_where_no_weight_would_have_one_it_is_refused(
    options: tuple[str, ...], message: str, adapter: Path, tmp_path: Path
) -> None:
    failed = run(
        "--adapter", f"a={adapter}", "--out", tmp_path / "b", "--asymmetric", *options
    ).exception
    assert isinstance(failed, ExportError) and message in str(failed)
    assert not (tmp_path / "b").exists()


def test_one_scaled_layer_is_enough(adapter: Path, tmp_path: Path) -> None:
    manifest = export(tmp_path / "b", adapter, symmetric=False, overrides={"down_proj": "int8"})
    assert not manifest.precision.symmetric and manifest.proof["adapters"]["a"]["passed"]
