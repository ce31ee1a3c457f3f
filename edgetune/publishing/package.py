"""A bundle, a run or an adapter becomes an artifact of CNCF's ModelPack: one blob a file, a
configuration for who lists models, and a manifest that names them all.

The same files give the same manifest, byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import AdapterError, BundleError, InputError, listed
from edgetune.core.files import is_regular, read_json
from edgetune.core.layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    MANIFEST,
    SUMMARY,
)
from edgetune.runtime.bundle.digests import verify_files
from edgetune.runtime.bundle.manifest import Manifest, read_manifest
from edgetune.runtime.sources.artifact import (
    ARTIFACT_KIND,
    BASE,
    FILE_PATH,
    MODEL_ARTIFACT,
    MODEL_CONFIG_TYPE,
    OCI_MANIFEST,
    TITLE,
    Artifact,
    ArtifactFile,
    artifact_from_oci,
    digest_of_bytes,
)
from edgetune.runtime.sources.folder import adapter_base, recorded_files, travelling_files

WEIGHTS = "application/vnd.cncf.model.weight.v1.raw"
SETTINGS = "application/vnd.cncf.model.weight.config.v1.raw"
DOCUMENT = "application/vnd.cncf.model.doc.v1.raw"
MEDIA_TYPES = {
    **dict.fromkeys((".onnx", ".data", ".safetensors", ".onnx_adapter"), WEIGHTS),
    **dict.fromkeys((".html", ".md", ".txt"), DOCUMENT),
}
NAMES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""ModelPack's names of number formats; it has none for 4 bits."""


@dataclass(frozen=True)
class Package:
    """What is ready to go: the files' folder, and the two JSON documents of the artifact."""

    folder: Path
    artifact: Artifact
    config: bytes
    manifest: bytes
    metadata: Mapping[str, Any]
    """a bundle's `edgetune.json`, an adapter's `edgetune_adapter.json` (empty where it has none)"""
    summary: Mapping[str, Any]
    """of the run that an adapter came from, where it lies beside it"""


def package(source: Path) -> Package:
    """Read a bundle, a run or an adapter. An error of ours says what is damaged: nothing of it goes
    anywhere then.
    """
    if is_regular(source / MANIFEST):
        return _bundle(source)
    folder = source / ADAPTER if (source / ADAPTER).is_dir() else source
    if not is_regular(folder / ADAPTER_CONFIG) or not is_regular(folder / ADAPTER_WEIGHTS):
        raise InputError(
            "neither a bundle nor an adapter",
            where=str(source),
            expected=f"a folder with {MANIFEST}, or {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}",
            fix="A run that trained all weights is exported first: edgetune export.",
        )
    return _adapter(folder)


def _bundle(folder: Path) -> Package:
    manifest = read_manifest(folder)
    if differing := verify_files(folder, manifest):
        raise BundleError(
            f"not as exported: {listed(differing, 'files differ')}",
            where=str(folder),
            fix="Export it again.",
        )
    size = round(manifest.base.parameters / 1e6, 1)
    stored = manifest.precision.weights
    technical = {
        "architecture": "transformer",
        "format": "onnx",
        "paramSize": f"{size:g}M",
        **({"precision": NAMES[stored]} if stored in NAMES else {"quantization": stored}),
    }
    about = {"family": manifest.base.model_type, "name": manifest.base.name}
    return _packed(folder, "bundle", manifest.base.digest, about, technical, manifest=manifest)


def _adapter(folder: Path) -> Package:
    metadata: dict[str, Any] = {}
    if is_regular(folder / ADAPTER_METADATA):
        metadata = read_json(folder / ADAPTER_METADATA, error=AdapterError)
    base = metadata.get("base") if isinstance(metadata, dict) else None
    name = str(base.get("name")) if isinstance(base, dict) else "unknown base"
    about = {"name": folder.resolve().name, "description": f"LoRA adapter for {name}"}
    technical = {"architecture": "transformer", "format": "safetensors"}
    return _packed(folder, "adapter", adapter_base(folder), about, technical, metadata=metadata)


def _packed(
    folder: Path,
    kind: str,
    base: str | None,
    about: Mapping[str, str],
    technical: Mapping[str, Any],
    *,
    manifest: Manifest | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Package:
    files = travelling_files(folder)
    _check_recorded(folder, files)
    digests = [f"sha256:{file.sha256}" for file in files]
    config = _dump(
        {
            "descriptor": about,
            "config": technical,
            "modelfs": {"type": "layers", "diffIds": digests},
        }
    )
    document = _dump(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": MODEL_ARTIFACT,
            "config": {
                "mediaType": MODEL_CONFIG_TYPE,
                "digest": digest_of_bytes(config),
                "size": len(config),
            },
            "layers": [_layer(file) for file in files],
            "annotations": {ARTIFACT_KIND: kind, **({} if base is None else {BASE: base})},
        }
    )
    artifact = artifact_from_oci(document, url=str(folder))  # what a device will read
    known = manifest.to_dict() if manifest is not None else metadata or {}
    summary = folder.parent / SUMMARY
    of_run = folder.name == ADAPTER and is_regular(summary)
    said = read_json(summary, error=AdapterError) if of_run else {}
    return Package(folder, artifact, config, document, known, said)


def _check_recorded(folder: Path, files: list[ArtifactFile]) -> None:
    """AdapterError where an adapter is not as it was trained."""
    there, recorded = {file.path: file.sha256 for file in files}, recorded_files(folder)
    if differing := [path for path, sha256 in recorded.items() if there.get(path) != sha256]:
        raise AdapterError(
            f"{differing[0]} is not as it was trained",
            where=str(folder),
            fix="Copy the adapter again, or train it again.",
        )


def _layer(file: ArtifactFile) -> dict[str, Any]:
    return {
        "mediaType": MEDIA_TYPES.get(Path(file.path).suffix, SETTINGS),
        "digest": f"sha256:{file.sha256}",
        "size": file.size,
        "annotations": {FILE_PATH: file.path, TITLE: file.path},
    }


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
