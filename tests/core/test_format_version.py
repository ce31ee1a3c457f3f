"""What an older reader would answer otherwise asks for a version that it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from confidence_helpers import trained
from export_helpers import export, make_adapter

from edgetune.adapters.folder import read_metadata, write_metadata
from edgetune.core.errors import AdapterError, BundleError
from edgetune.core.format_version import format_version, unknown_version
from edgetune.core.layout import ADAPTER_METADATA, MANIFEST
from edgetune.runtime.adapters.lora import read_lora
from edgetune.runtime.bundle.manifest import read_manifest


@pytest.mark.parametrize(
    ("metadata", "version"),
    [
        ({}, 1),
        ({"prompt_format": None, "confidence": None}, 1),
        ({"prompt_format": {"tag_scheme": None}, "confidence": {"temperature": 2.0}}, 1),
        ({"confidence": {"threshold": None}}, 1),
        ({"confidence": {"threshold": 0.0}}, 2),
        ({"prompt_format": {"case_marks": True}}, 2),
        ({"prompt_format": {"tag_scheme": "IOB2"}}, 2),
    ],
)
def test_what_changes_answers_asks_for_the_second_version(
    metadata: dict[str, Any], version: int
) -> None:
    assert format_version(metadata) == version and unknown_version(version) is None


@pytest.mark.parametrize("found", [None, "1", True, 1.0, 0, 3])
def test_other_versions_are_said(found: Any) -> None:
    line = unknown_version(found)
    assert line is not None and f"expected 1 or 2, got {found!r}" in line
    assert ("newer" in line) is (found == 3)


def test_a_threshold_asks_for_it_in_the_run_and_in_both_bundles(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = trained(tiny_encoder)
    assert read_metadata(folder / "run" / "adapter")["schema"] == 2
    assert read_metadata(folder / "bundle" / "adapters" / "run")["schema"] == 2
    assert read_manifest(folder / "bundle").schema == 1  # its other adapters answer anywhere
    merged = export(tmp_path / "merged", folder / "run", mode="merged")
    assert merged.schema == read_manifest(tmp_path / "merged").schema == 2


def test_an_adapter_and_a_bundle_of_a_later_version_are_refused(
    tiny_decoder: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_decoder, tmp_path / "a")
    export(tmp_path / "bundle", folder)
    path = tmp_path / "bundle" / MANIFEST
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 3'))
    with pytest.raises(BundleError, match=r"expected 1 or 2, got 3.*upgrade edgetune"):
        read_manifest(tmp_path / "bundle")
    about = json.loads((folder / ADAPTER_METADATA).read_text())
    (folder / ADAPTER_METADATA).write_text(json.dumps(about | {"schema": 3}))
    with pytest.raises(AdapterError, match="expected 1 or 2, got 3; a newer edgetune reads it"):
        read_metadata(folder)
    assert any("got 3; a newer edgetune" in line for line in read_lora(folder).problems)
    write_metadata(folder, about | {"prompt_format": {"tag_scheme": "IOB9"}})
    with pytest.raises(AdapterError, match="tag_scheme: expected IOB2, got 'IOB9'"):
        read_lora(folder)
