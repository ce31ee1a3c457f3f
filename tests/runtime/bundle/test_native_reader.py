"""`native.json` reads back as it was written; a damaged one is one BundleError in one line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_bundle, decoder_manifest

from edgetune.core.errors import BundleError
from edgetune.runtime.bundle.digests import verify_files
from edgetune.runtime.bundle.manifest import Manifest, manifest_from_dict, read_manifest
from edgetune.runtime.bundle.native_plan import NativePlan
from edgetune.runtime.bundle.native_reader import native_plan_from_dict, read_native_plan

Document = dict[str, Any]


@pytest.fixture(scope="module")
def manifest(tiny_decoder: Path) -> Manifest:
    return read_manifest(decoder_bundle(tiny_decoder))


@pytest.fixture
def document(tiny_decoder: Path) -> Document:
    value: Document = json.loads((decoder_bundle(tiny_decoder) / "native.json").read_text())
    return value


def read(document: Any, manifest: Manifest, tiny_decoder: Path) -> NativePlan:
    size = (decoder_bundle(tiny_decoder) / "model.onnx.data").stat().st_size
    return native_plan_from_dict(
        document, manifest.graph, manifest.sites, data_bytes=size, where="native.json"
    )


def test_a_plan_survives_json(document: Document, manifest: Manifest, tiny_decoder: Path) -> None:
    plan = read_native_plan(decoder_bundle(tiny_decoder), manifest)
    assert json.loads(json.dumps(plan.to_dict())) == document


def put(path: str, value: Any) -> Callable[[Document], None]:
    """Another value at a dotted path; ... takes the key away."""

    def change(document: Document) -> None:
        *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = document
        for part in way:
            place = place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return change


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "a version": ("version", 2, "another version (expected 1, got 2)"),
    "no version": ("version", ..., "another version (expected 1, got null)"),
    "no layers": ("layers", ..., '"layers" is missing'),
    "an empty list of layers": ("layers", [], "number of layers (expected 2, got 0)"),
    "a key too many": ("layers.0.surprise", 1, 'unknown key "layers.0.surprise"'),
    "a key too few": ("layers.1.down.weight", ..., '"layers.1.down.weight" is missing'),
    "text for a number": ("hidden", "64", "hidden has a wrong value"),
    "a huge number": ("hidden", 2**62, "hidden is out of range"),
    "a number beyond 64 bits": ("vocab", 2**70, "vocab has a wrong value"),
    "no heads": ("kv_heads", 0, "kv_heads is out of range"),
    "heads of the manifest": ("kv_heads", 4, "kv_heads (expected 2, got 4)"),
    "heads that do not divide": ("heads", 3, "heads (expected a multiple of kv_heads)"),
    "more heads": ("heads", 8, "layers.0.qkv.outputs (expected 192, got 128)"),
    "a width of its own": ("layers.0.down.inputs", 96, "layers.0.gate_up.outputs"),
    "an offset beyond the file": ("head.weight.offset", 1 << 40, "head.weight (expected an end at"),
    "an offset below 0": ("head.weight.offset", -64, "offset is out of range"),
    "an offset between numbers": ("head.weight.offset", 2, "a multiple of 64"),
    "bytes of another shape": ("head.weight.bytes", 64, "head.weight.bytes (expected"),
    "other bytes inline": ("norm.weight.inline", "AAAA", "norm.weight.inline (expected 256, got 3"),
    "no base64 inline": ("norm.weight.inline", "&", "norm.weight.inline (expected base64"),
    "inline and elsewhere": ("norm.weight.offset", 64, "0 where the bytes are inline"),
    "bits that nobody has": ("head.bits", 5, "head.bits (expected 0, 4 or 8)"),
    "no scales": ("head.bits", 8, "head.block_size"),
    "a block of nothing": ("embedding.block_size", -1, "block_size 0 in float32"),
    "means in float": ("head.means", True, "head.means (expected false in float32)"),
    "a table that is not there": ("layers.0.rotary", 1, "layers.0.rotary"),
    "a table from the end": ("layers.0.rotary", -1, "layers.0.rotary"),
    "too few positions": ("rotaries.0.positions", 8, "rotaries.0.positions (expected at least"),
    "half a pair": ("rotaries.0.width", 15, "rotaries.0.width"),
    "an activation": ("layers.0.activation", "relu", "layers.0.activation has a wrong value"),
    "no scale": ("layers.0.scale", 0, "layers.0.scale is out of range"),
    "a scale beyond float32": ("layers.0.scale", 1e308, "layers.0.scale is out of range"),
    "a number beyond float32": ("embedding.multiplier", -1e39, "multiplier is out of range"),
    "a window below 0": ("layers.0.window", -1, "layers.0.window is out of range"),
    "a bias of rms": (
        "norm.bias",
        {"offset": 0, "bytes": 256},
        "norm.bias (expected null for rms)",
    ),
    "a site that is not there": ("head.site", "lm_head", "the site lm_head"),
    "a site too few": ("layers.0.qkv.site", None, "the site model.layers.0.self_attn.q_proj"),
    "another product's site": (
        "layers.0.qkv.site",
        "model.layers.1.self_attn.q_proj+k_proj+v_proj",
        "one product a site",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_one_line(
    damage: str, document: Document, manifest: Manifest, tiny_decoder: Path
) -> None:
    path, value, message = DAMAGES[damage]
    put(path, value)(document)
    with pytest.raises(BundleError) as raised:
        read(document, manifest, tiny_decoder)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def blocks_of(place: Document, rows: int, blocks: int, **changes: Any) -> Document:
    """A product of 4 bits in blocks of 32, all in the first bytes of the file."""
    weight, scales = (
        {"offset": 0, "bytes": size} for size in (rows * blocks * 16, rows * blocks * 4)
    )
    return place | {"bits": 4, "block_size": 32, "weight": weight, "scales": scales} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"zeros": {"offset": 0, "bytes": 352}}, ""),
        ({"zeros": {"offset": 0, "bytes": 704}}, "head.zeros.bytes (expected 352, got 704)"),
        ({"scales": None}, "head.scales (expected a place)"),
        ({"block_size": 33}, "head.block_size"),
        ({"block_size": 2**62}, "head.block_size"),
        ({"block_size": 64}, "head.scales.bytes (expected 1408, got 2816)"),
        ({"means": True}, "head.weight.bytes"),
        ({"block_size": 128, "means": True}, "whole blocks where there are means"),
    ],
)
def test_blocks_fit_the_bytes(
    changes: Document, message: str, document: Document, manifest: Manifest, tiny_decoder: Path
) -> None:
    document["head"] = blocks_of(document["head"], 352, 2, **changes)
    if not message:
        assert read(document, manifest, tiny_decoder).head.bits == 4
        return
    with pytest.raises(BundleError) as raised:
        read(document, manifest, tiny_decoder)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def leaves(value: Any, path: str = "") -> Iterator[str]:
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    yield from [path] if path else []
    for key, child in children:
        yield from leaves(child, f"{path}.{key}" if path else str(key))


def test_anything_anywhere_is_a_plan_or_a_bundle_error(
    document: Document, manifest: Manifest, tiny_decoder: Path
) -> None:
    chance, refused = random.Random(0), 0
    values = [
        None,
        -1,
        0,
        1,
        3,
        64,
        2**31,
        2**62,
        2**80,
        1e308,
        "",
        "AA==",
        True,
        [],
        {},
        [{}],
        ...,
    ]
    paths = list(leaves(document))
    for _ in range(600):
        damaged = json.loads(json.dumps(document))
        put(chance.choice(paths), chance.choice(values))(damaged)
        try:
            read(damaged, manifest, tiny_decoder)
        except BundleError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 400


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"version": 1}', "[" * 100_000, "NaN"])
def test_a_file_that_is_no_plan_is_one_line(
    text: str, manifest: Manifest, tiny_decoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "native.json").write_text(text)
    (tmp_path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(BundleError, match=r"native\.json: ") as raised:
        read_native_plan(tmp_path, manifest)
    assert "\n" not in str(raised.value)


def test_a_data_file_that_is_cut_off_or_gone_is_found(
    manifest: Manifest, tiny_decoder: Path, tmp_path: Path
) -> None:
    shutil.copy(decoder_bundle(tiny_decoder) / "native.json", tmp_path)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: cannot be read"):
        read_native_plan(tmp_path, manifest)
    (tmp_path / "model.onnx.data").write_bytes(bytes(4096))
    with pytest.raises(BundleError, match="an end at 4096 or before"):
        read_native_plan(tmp_path, manifest)


def test_a_bundle_of_before_has_none_and_reads_as_it_did(
    manifest: Manifest, tiny_decoder: Path
) -> None:
    old = decoder_manifest().to_dict()
    assert "native" not in old["graph"] and manifest_from_dict(old).graph.native is None
    without = replace(manifest, graph=replace(manifest.graph, native=None))
    with pytest.raises(BundleError, match="has no native plan"):
        read_native_plan(decoder_bundle(tiny_decoder), without)


def test_a_changed_plan_is_not_as_exported(
    manifest: Manifest, tiny_decoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(decoder_bundle(tiny_decoder), folder)
    text = (folder / "native.json").read_text()
    (folder / "native.json").write_text(text.replace('"silu"', '"gelu"'))
    assert [line.partition(":")[0] for line in verify_files(folder, manifest)] == ["native.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"native": "../native.json"}, "a path leaves the bundle"),
        ({"native": "other.json"}, "sha256 and size of other.json"),
    ],
)
def test_the_manifest_names_a_plan_inside_the_bundle_with_its_digest(
    change: Document, message: str, manifest: Manifest, tmp_path: Path
) -> None:
    document = manifest.to_dict()
    document["graph"] |= change
    (tmp_path / "edgetune.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=message):
        read_manifest(tmp_path)
