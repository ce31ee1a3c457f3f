"""Blobs and a manifest go to a registry; what is there already does not go again."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable
from pathlib import Path

from edgetune.core.errors import SourceError
from edgetune.publishing.package import Package
from edgetune.runtime.sources.artifact import OCI_MANIFEST, ArtifactFile, digest_of_bytes
from edgetune.runtime.sources.registry import Reference, Registry
from edgetune.runtime.sources.transport import PASSING, StatusError, Transport

CHUNK_BYTES = 16 << 20
"""Of a blob, sent at once: what comes back after a broken line, and less than proxies refuse."""
BYTES = {"Content-Type": "application/octet-stream"}


def push_to_registry(
    packed: Package, url: str, transport: Transport, *, sent: Callable[[int], None]
) -> str:
    """Send what the registry lacks, the manifest last, so that a tag never names half of it;
    returns the URL with the digest. `sent` is told of each piece's bytes.
    """
    reference = Reference.parse(url)
    if reference.digest is not None:
        raise SourceError(
            "a digest is what comes out of a push", where=url, expected="oci://HOST/REPOSITORY:TAG"
        )
    registry = Registry(reference, transport, "pull,push")
    try:
        for file in {file.sha256: file for file in packed.artifact.files}.values():
            if not _has(registry, file):
                _send_file(registry, packed.folder / file.path, file, sent)
        config = digest_of_bytes(packed.config)
        settings = ArtifactFile("config", len(packed.config), config.removeprefix("sha256:"))
        if not _has(registry, settings):
            location = _start(registry)
            _finish(registry, location, config, packed.config)
        with registry.request(
            "PUT",
            f"manifests/{reference.tag}",
            headers={"Content-Type": OCI_MANIFEST},
            body=packed.manifest,
        ):
            pass
    except StatusError as error:
        raise registry.refusal(error) from error
    return f"{reference.url}@{packed.artifact.digest}"


def _has(registry: Registry, file: ArtifactFile) -> bool:
    try:
        with registry.request("HEAD", f"blobs/sha256:{file.sha256}") as response:
            return int(response.headers.get("Content-Length") or -1) in (-1, file.size)
    except StatusError as error:
        if error.status != 404:
            raise
        return False


def _send_file(
    registry: Registry, path: Path, file: ArtifactFile, sent: Callable[[int], None]
) -> None:
    """A small one at once, others in pieces; after a broken line from where the registry says that
    it is.
    """
    digest = f"sha256:{file.sha256}"
    if file.size <= CHUNK_BYTES:
        _finish(registry, _start(registry), digest, path.read_bytes())
        sent(file.size)
        return
    location, offset, attempt = _start(registry), 0, 0
    with path.open("rb") as opened:
        while offset < file.size:
            opened.seek(offset)
            piece = opened.read(CHUNK_BYTES)
            headers = {**BYTES, "Content-Range": f"{offset}-{offset + len(piece) - 1}"}
            try:
                with registry.request(
                    "PATCH", location, headers=headers, body=piece, attempts=1
                ) as response:
                    location = _location(registry, response.headers.get("Location"), location)
                offset, attempt = offset + len(piece), 0
                sent(len(piece))
            except (StatusError, SourceError) as error:
                attempt += 1
                passing = isinstance(error, SourceError) or error.status in {*PASSING, 416}
                if not passing or attempt >= registry.transport.attempts:
                    raise
                registry.transport.pause(attempt)
                location, offset = _where(registry, location)
    _finish(registry, location, digest, b"")


def _start(registry: Registry) -> str:
    with registry.request("POST", "blobs/uploads/", body=b"") as response:
        return _location(registry, response.headers.get("Location"), "")


def _where(registry: Registry, location: str) -> tuple[str, int]:
    """Where an upload goes on: the address, and the bytes that arrived. A lost one starts anew."""
    try:
        with registry.request("GET", location) as response:
            location = _location(registry, response.headers.get("Location"), location)
            last = (response.headers.get("Range") or "0-0").rpartition("-")[2]
            return location, int(last) + 1 if last.isdecimal() and last != "0" else 0
    except StatusError as error:
        if error.status != 404:
            raise
        return _start(registry), 0


def _finish(registry: Registry, location: str, digest: str, body: bytes) -> None:
    joint = "&" if "?" in location else "?"
    url = f"{location}{joint}{urllib.parse.urlencode({'digest': digest})}"
    with registry.request("PUT", url, headers=BYTES, body=body):
        pass


def _location(registry: Registry, given: str | None, before: str) -> str:
    """Registries give whole addresses or paths."""
    if given is None and not before:
        raise SourceError("the registry said not where to send to", where=registry.reference.url)
    return urllib.parse.urljoin(f"{registry.root}/", given or before)
