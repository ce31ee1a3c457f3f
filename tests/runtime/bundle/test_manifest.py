"""`edgetune.json` reads back as it was written; a bundle that is damaged or of another schema is
named precisely.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_manifest, encoder_manifest

from edgetune.core.errors import BundleError
from edgetune.core.files import sha256_file
from edgetune.runtime.bundle.digests import verify_files
from edgetune.runtime.bundle.manifest import (
    AdapterEntry,
    FileInfo,
    Manifest,
    manifest_from_dict,
    read_manifest,
)


@pytest.mark.parametrize("manifest", [decoder_manifest(), encoder_manifest()])
def test_a_manifest_survives_json(manifest: Manifest) -> None:
    assert manifest_from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


def test_sites_use_the_words_in_and_out() -> None:
    site = decoder_manifest().to_dict()["sites"][0]
    assert (site["in"], site["out"]) == (64, 128)
    assert site["parts"][1] == {
        "module": "model.layers.0.self_attn.k_proj",
        "start": 64,
        "stop": 96,
    }


def test_blocks_with_zeros_of_their_own_are_read_as_version_0_1_wrote_them() -> None:
    document = decoder_manifest().to_dict()
    document["precision"] |= {"weights": "int8", "block_size": 32, "symmetric": False}
    manifest = manifest_from_dict(document)
    assert not manifest.precision.symmetric and manifest.to_dict() == document


def changed(**changes: Any) -> dict[str, Any]:
    return {**decoder_manifest().to_dict(), **changes}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(schema=3), "another schema version (expected 1 or 2, got 3)"),
        (changed(surprise=1), 'unknown key "surprise"'),
        (
            changed(task="poetry"),
            (
                'task has a wrong value (expected one of "text-generation",'
                ' "sequence-classification", "token-classification", got "poetry")'
            ),
        ),
        (
            changed(sites=[{"name": "x"}]),
            (
                'the keys "sites.0.A", "sites.0.B", "sites.0.in", "sites.0.out", "sites.0.parts"'
                " are missing. The bundle was written by another version of edgetune"
            ),
        ),
        (
            changed(base={**decoder_manifest().to_dict()["base"], "digest": 3}),
            "base.digest has a wrong value (expected a string, got 3)",
        ),
        (changed(base="x"), 'base has a wrong value (expected an object, got "x")'),
        (changed(proof=3), "proof has a wrong value (expected an object of values, got 3)"),
        (changed(files={"../out": {"sha256": "0", "bytes": 1}}), "a path leaves the bundle"),
        ([], "a manifest is a JSON object"),
    ],
)
def test_a_wrong_manifest_names_the_field(document: Any, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        manifest_from_dict(document)
    assert message in str(caught.value)


def test_a_folder_without_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no edgetune\.json in this folder"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_no_json_says_so(tmp_path: Path) -> None:
    (tmp_path / "edgetune.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_verify_lists_every_file_that_differs(tmp_path: Path) -> None:
    for name in ("good", "flipped", "short"):
        (tmp_path / name).write_bytes(b"12345678")
    files = {
        name: FileInfo(sha256_file(tmp_path / "good"), 8)
        for name in ("good", "flipped", "short", "gone")
    }
    (tmp_path / "flipped").write_bytes(b"12345679")
    (tmp_path / "short").write_bytes(b"1234")
    lines = verify_files(tmp_path, decoder_manifest(files=files))
    assert [line.split(":")[0] for line in lines] == ["flipped", "short", "gone"]
    assert lines[1] == "short: expected 8 bytes, got 4"


def exported(folder: Path, document: Any) -> Path:
    (folder / "edgetune.json").write_text(
        document if isinstance(document, str) else json.dumps(document)
    )
    return folder


@pytest.mark.parametrize("left_out", [None, "engine.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_manifest_that_does_not_list_what_answers_are_made_from_is_refused(
    left_out: str | None, tmp_path: Path
) -> None:
    document = decoder_manifest().to_dict()
    needed = (
        "engine.onnx",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "chat_template.jinja",
    )
    listed = {} if left_out is None else {name: {"sha256": "0", "bytes": 1} for name in needed}
    document["files"] = {name: info for name, info in listed.items() if name != left_out}
    with pytest.raises(BundleError, match="does not list every file") as refused:
        read_manifest(exported(tmp_path, document))
    assert (left_out or "engine.onnx") in str(refused.value)


def test_a_file_of_an_adapter_that_is_not_listed_differs(tmp_path: Path) -> None:
    entry = AdapterEntry("a", "adapters/a", "sft", None, None, None, 4, None)
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    (tmp_path / "adapters" / "a" / "edgetune_adapter.json").write_text("{}")
    lines = verify_files(tmp_path, replace(decoder_manifest(files={}), adapters=(entry,)))
    assert lines == ["adapters/a/edgetune_adapter.json: not in the manifest"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"schema": ' + "1" * 5000 + "}",
        '{"schema": 1, "proof": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"schema": "\\ud800"}',
        " " * (5 << 20) + "{}",
    ],
    ids=["deep", "digits", "deep inside", "half a surrogate pair", "large"],
)
def test_json_beyond_the_limits_is_refused_in_a_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as refused:
        read_manifest(exported(tmp_path, text))
    assert len(str(refused.value)) < 1000


def test_a_manifest_that_is_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "edgetune.json")
    with pytest.raises(BundleError, match="not a regular file"):
        read_manifest(tmp_path)
