"""What travels: a bundle or an adapter as files with sizes and digests, in the manifest of an OCI
artifact as CNCF's ModelPack has it. A folder or a web server has the same manifest as a file.

What is read here comes from anywhere: paths stay inside the folder, and sizes have limits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from edgetune.core.errors import BundleError, SourceError
from edgetune.core.files import MAX_JSON_BYTES, parse_json
from edgetune.core.layout import (
    ADAPTER_CONFIG,
    ADAPTER_METADATA,
    ADAPTER_WEIGHTS,
    MANIFEST,
    TOKENIZER_FILES,
)
from edgetune.runtime.bundle.manifest import manifest_from_dict

ArtifactKind = Literal["bundle", "adapter"]
INDEX = "artifact.json"
"""The OCI manifest as a file, where the place is a folder."""
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MODEL_ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
"""The path of a layer, where a packager follows ORAS and not ModelPack."""
ARTIFACT_KIND, BASE = "edgetune.kind", "edgetune.base.digest"
"""Annotations of the manifest: bundle or adapter, and the digest of the base model, as the bundle's
own manifest and an adapter's metadata have it.
"""
MAX_FILES, MAX_BYTES, MAX_PATH = 4096, 1 << 38, 512
"""Of an artifact: files, bytes altogether, and characters of a path."""
OURS = {
    name.casefold(): name
    for name in (ADAPTER_CONFIG, ADAPTER_METADATA, ADAPTER_WEIGHTS, MANIFEST, *TOKENIZER_FILES)
}
"""Files that have a meaning, by the name under which some file systems would find them too."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
PUSH_IT = "Publish it with `edgetune push`."


@dataclass(frozen=True)
class ArtifactFile:
    """One file: its path in the folder (POSIX), its size in bytes and its sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A bundle or an adapter as a source has it now.

    `digest`: `sha256:…` of the manifest, which names every file's sha256; it changes when anything
    does. `base`: `sha256:…` of the base model, None where the publisher did not say.
    """

    url: str
    kind: ArtifactKind
    digest: str
    files: tuple[ArtifactFile, ...]
    base: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def artifact_from_oci(raw: bytes, *, url: str) -> Artifact:
    """Read the manifest of an OCI artifact. SourceError says what is wrong with it."""
    manifest = _json(raw, url)
    if "manifests" in manifest:
        raise _wrong(url, "it lists several images; edgetune artifacts are single manifests")
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not layers or len(layers) > MAX_FILES:
        raise _wrong(url, f"`layers` is a list of 1 to {MAX_FILES} files")
    files = tuple(_file_of(layer, url) for layer in layers)
    annotations = _texts(manifest.get("annotations"))
    check_files(files, url)
    kind = _kind(annotations.get(ARTIFACT_KIND), {file.path for file in files}, url)
    base = annotations.get(BASE)
    if base is not None and not DIGEST.fullmatch(base):
        raise _wrong(url, f"{BASE} is no digest: {base:.80}")
    return Artifact(url, kind, digest_of_bytes(raw), files, base, annotations)


def artifact_from_bundle(raw: bytes, *, url: str, more: Iterable[ArtifactFile] = ()) -> Artifact:
    """Read a bundle's own `edgetune.json`, where a folder has it and no manifest of an artifact.
    `more`: files that it does not list.
    """
    try:
        bundle = manifest_from_dict(_json(raw, url), where=url)
    except BundleError as error:
        raise SourceError(str(error)) from error
    listed = [ArtifactFile(path, info.bytes, info.sha256) for path, info in bundle.files.items()]
    own = ArtifactFile(MANIFEST, len(raw), hashlib.sha256(raw).hexdigest())
    files = (own, *listed, *more)
    check_files(files, url)
    return Artifact(url, "bundle", digest_of_bytes(raw), files, bundle.base.digest)


def check_files(files: Iterable[ArtifactFile], url: str) -> None:
    """SourceError where a path leaves the folder or two files would be one, or a size is none."""
    files, seen = list(files), set()
    folders = {str(up).casefold() for file in files for up in PurePosixPath(file.path).parents}
    for file in files:
        if not is_inside(file.path):
            raise _wrong(url, f"a path leaves the folder or is none: {file.path[:80]!r}")
        if (ours := _imitated(file.path)) is not None:
            raise _wrong(url, f"{file.path[:80]!r} is {ours} in another writing, or holds files")
        key = file.path.casefold()  # as file systems of some devices have it
        if key in seen or key in folders:
            raise _wrong(url, f"two files are called {file.path[:80]!r}")
        seen.add(key)
        if not (0 <= file.size <= MAX_BYTES) or not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise _wrong(url, f"{file.path}: no size and sha256")
    if len(files) > MAX_FILES or sum(file.size for file in files) > MAX_BYTES:
        raise _wrong(url, f"more than {MAX_FILES} files or {MAX_BYTES} bytes")


def _imitated(path: str) -> str | None:
    """The file with a meaning that a path spells otherwise, or makes a folder of."""
    *above, last = path.split("/")
    folded = {part.casefold() for part in above}
    for key, name in OURS.items():
        if key in folded or (last.casefold() == key and last != name):
            return name
    return None


def is_inside(path: str) -> bool:
    """Whether a path from elsewhere names a file below the folder it is put into: relative, no dots
    in front of a part, nothing that another file system reads otherwise.
    """
    parts = path.split("/")
    return (
        len(path) <= MAX_PATH
        and path.isprintable()
        and not set(path) & set('\\:*?"<>|')
        and all(part and len(part) <= 200 and not part.startswith(".") for part in parts)
        and not any(part.endswith((" ", ".")) for part in parts)
    )


def digest_of_bytes(raw: bytes) -> str:
    """`sha256:…` as registries have it."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _json(raw: bytes, url: str) -> dict[str, Any]:
    if len(raw) > MAX_JSON_BYTES:
        raise _wrong(url, f"it is larger than {MAX_JSON_BYTES} bytes")
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise _wrong(url, f"it is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise _wrong(url, "it is no JSON object")
    return value


def _file_of(layer: Any, url: str) -> ArtifactFile:
    if not isinstance(layer, dict):
        raise _wrong(url, "a layer is no object")
    annotations = _texts(layer.get("annotations"))
    path = annotations.get(FILE_PATH, annotations.get(TITLE, ""))
    media, digest, size = layer.get("mediaType"), layer.get("digest"), layer.get("size")
    if isinstance(media, str) and re.search(r"\.tar\b", media):
        raise _wrong(url, f"{path or 'a layer'} is an archive; edgetune reads one file a layer")
    if not path or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise _wrong(url, f"a layer has no {FILE_PATH} or no sha256")
    if type(size) is not int:
        raise _wrong(url, f"{path:.80}: no size")
    return ArtifactFile(path, size, digest.removeprefix("sha256:"))


def _kind(said: str | None, paths: set[str], url: str) -> ArtifactKind:
    found: ArtifactKind | None = None
    if MANIFEST in paths:
        found = "bundle"
    elif {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= paths:
        found = "adapter"
    if found is None or said not in (None, found):
        raise _wrong(url, f"it holds neither a bundle ({MANIFEST}) nor an adapter")
    return found


def _texts(value: Any) -> dict[str, str]:
    """The texts of a JSON object; nothing of anything else."""
    pairs = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in pairs if isinstance(text, str)}


def _wrong(url: str, what: str) -> SourceError:
    return SourceError(f"not an artifact of edgetune: {what}", where=url, fix=PUSH_IT)
