"""A folder as a source: as `edgetune push` or `edgetune export` wrote it, or an adapter's own."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.errors import SourceError
from edgetune.core.files import MAX_JSON_BYTES, is_regular, read_json, sha256_file
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, ADAPTER_WEIGHTS, MANIFEST
from edgetune.runtime.sources.artifact import (
    DIGEST,
    INDEX,
    Artifact,
    ArtifactFile,
    artifact_from_bundle,
    artifact_from_oci,
    check_files,
    digest_of_bytes,
)

SIGNATURE_FILES = ("model.sig",)
"""Beside a bundle's files, which its manifest cannot list."""


@dataclass(frozen=True)
class FolderSource:
    """One artifact in a folder of this machine."""

    folder: Path

    def artifact(self) -> Artifact:
        """What is there now. An adapter's files are read for their digests, a bundle's are not."""
        url, folder = str(self.folder), self.folder
        if is_regular(folder / INDEX):
            return artifact_from_oci(_small(folder / INDEX), url=url)
        if is_regular(folder / MANIFEST):
            names = [name for name in SIGNATURE_FILES if is_regular(folder / name)]
            more = [file_of(folder, name) for name in names]
            return artifact_from_bundle(_small(folder / MANIFEST), url=url, more=more)
        if is_regular(folder / ADAPTER_CONFIG) and is_regular(folder / ADAPTER_WEIGHTS):
            files = tuple(travelling_files(folder))
            check_files(files, url)
            listed = json.dumps([[file.path, file.sha256] for file in files])
            digest, base = digest_of_bytes(listed.encode()), adapter_base(folder)
            return Artifact(url, "adapter", digest, files, base)
        raise SourceError(
            "neither a bundle nor an adapter is there",
            where=url,
            expected=f"{INDEX}, {MANIFEST} or {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}",
        )

    def open(self, file: ArtifactFile, offset: int) -> LocalResponse:
        """A file from `offset` on."""
        try:
            opened = (self.folder / file.path).open("rb")
            opened.seek(offset)
        except OSError as error:
            raise SourceError(f"{file.path}: {error.strerror}", where=str(self.folder)) from error
        return LocalResponse(opened)


class LocalResponse(io.BufferedReader):
    """An open file that answers as a server does which was asked for the rest of it."""

    status = 206

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file.detach())
        self.headers: dict[str, str] = {}


def travelling_files(folder: Path) -> list[ArtifactFile]:
    """Every file of a folder that travels, by path: all but hidden ones and `artifact.json`.
    SourceError for a link, a pipe or a device, which would travel as something else.
    """
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(where, name)
            relative = path.relative_to(folder).as_posix()
            if name.startswith(".") or relative == INDEX:
                continue
            if path.is_symlink() or not is_regular(path):
                raise SourceError(f"{relative} is no regular file", where=str(folder))
            found.append(file_of(folder, relative))
        if links := [name for name in folders if Path(where, name).is_symlink()]:
            raise SourceError(f"{links[0]} is a link", where=where, fix="Copy what it leads to.")
    return sorted(found, key=lambda file: file.path)


def file_of(folder: Path, path: str) -> ArtifactFile:
    """One file of a folder, read for its digest."""
    return ArtifactFile(path, (folder / path).stat().st_size, sha256_file(folder / path))


def adapter_base(folder: Path) -> str | None:
    """The digest of the base that an adapter's metadata names; None where it does not."""
    base = _metadata(folder).get("base")
    digest = base.get("digest") if isinstance(base, dict) else None
    return digest if isinstance(digest, str) and DIGEST.fullmatch(digest) else None


def recorded_files(folder: Path) -> dict[str, str]:
    """What an adapter's metadata have of its files: name → sha256 as it was trained."""
    files = _metadata(folder).get("files")
    pairs = files.items() if isinstance(files, dict) else ()
    return {str(name): str(sha256) for name, sha256 in pairs}


def _metadata(folder: Path) -> dict[str, Any]:
    """Nothing where the folder has none; SourceError for damaged ones."""
    path = folder / ADAPTER_METADATA
    metadata = read_json(path, error=SourceError) if path.exists() else {}
    if not isinstance(metadata, dict):
        raise SourceError("it is no JSON object", where=str(path))
    return metadata


def _small(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_JSON_BYTES + 1)
