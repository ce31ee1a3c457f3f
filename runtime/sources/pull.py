"""`resolve` says what a source has; `pull` makes it a folder here, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgetune.core.errors import EdgetuneError, OutputError, SourceError
from edgetune.core.exclusive import exclusive
from edgetune.core.files import whole_folder
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA, MANIFEST
from edgetune.runtime.bundle.manifest import read_manifest
from edgetune.runtime.sources.artifact import Artifact, ArtifactFile, ArtifactKind
from edgetune.runtime.sources.folder import FolderSource, adapter_base, recorded_files
from edgetune.runtime.sources.registry import OCI, Reference, Registry, RegistrySource
from edgetune.runtime.sources.store import Store, check_room, default_store, sync
from edgetune.runtime.sources.transport import Transport, shown_url
from edgetune.runtime.sources.web import HUB, hub_source, web_source

CHANGED = "It was changed on the way or published in part: publish it again."
PullProgress = Callable[[int, int], None]
"""Told of the bytes that came so far and of those that are to come altogether."""


class ArtifactSource(Protocol):
    """A place that one artifact comes from."""

    def artifact(self) -> Artifact:
        """What is there now. SourceError where there is nothing, or nothing of ours."""

    def open(self, file: ArtifactFile, offset: int) -> Any:
        """A response with a file's bytes from `offset` on (status 206) or from its start (200)."""


@dataclass(frozen=True)
class Pulled:
    """What a pull did: the artifact, its folder, and the bytes that had to come."""

    artifact: Artifact
    folder: Path
    fetched_bytes: int


def resolve(url: str | Path, *, plain_http: bool = False) -> Artifact:
    """What `oci://…`, `hf://…`, `http(s)://…` or a folder has now. SourceError in one line where
    nothing of ours is there, or nobody answers.
    """
    return source_of(url, Transport(plain_http=plain_http)).artifact()


def pull(
    source: str | Path | Artifact,
    folder: str | Path,
    *,
    store: str | Path | None = None,
    progress: PullProgress | None = None,
    plain_http: bool = False,
    kind: ArtifactKind | None = None,
    base: str | None = None,
    transport: Transport | None = None,
) -> Pulled:
    """Make what a source has a folder; one that was pulled before is replaced when all is here.

    Only files that `store` has not are fetched (`default_store()` where None), a broken one from
    where it broke; each is compared with its sha256. `source`: an Artifact is fetched as it was
    resolved, whatever its name stands for now. `kind`, `base`: refuse anything else, before a byte
    of it is fetched. SourceError or OutputError in one line; the folder is as before then.
    """
    url = source.url if isinstance(source, Artifact) else source
    transport = transport or Transport(plain_http=plain_http)
    place = source_of(url, transport)
    artifact = source if isinstance(source, Artifact) else place.artifact()
    _check_wanted(artifact, kind, base)
    folder, kept = Path(folder), Store(Path(store) if store is not None else default_store())
    _check_target(folder)
    fetched = _fetch(artifact, place, kept, transport, progress)
    with exclusive(folder), whole_folder(folder) as partial:
        for file in artifact.files:
            kept.place(file, partial / file.path)
        _check_made(partial, artifact)
        for made in sorted({path.parent for path in partial.rglob("*")}, reverse=True):
            sync(made)
    sync(folder.resolve().parent)
    return Pulled(artifact, folder, fetched)


def source_of(url: str | Path, transport: Transport) -> ArtifactSource:
    """What a URL or a path names. SourceError for another kind of URL."""
    url = str(url)
    if url.startswith(OCI):
        return RegistrySource(Registry(Reference.parse(url), transport))
    if url.startswith(HUB):
        return hub_source(url, transport)
    if url.startswith(("http://", "https://")):
        return web_source(url, transport)
    if re.match(r"\w+://", url) and not url.startswith("file://"):
        raise SourceError(
            "no source of this kind",
            where=shown_url(url),
            expected="oci://HOST/REPOSITORY:TAG, hf://OWNER/NAME, http(s)://… or a folder",
        )
    return FolderSource(Path(url.removeprefix("file://")))


def _fetch(
    artifact: Artifact,
    place: ArtifactSource,
    store: Store,
    transport: Transport,
    progress: PullProgress | None,
) -> int:
    """Have every file in the store; the bytes that came."""
    wanted = {file.sha256: file for file in artifact.files}
    missing = [file for file in wanted.values() if not store.has(file)]
    total, came = sum(map(store.missing_bytes, missing)), 0
    check_room(store.folder, total)

    def arrived(count: int) -> None:
        nonlocal came
        came += count
        if progress is not None:
            progress(came, max(total, came))

    for file in sorted(missing, key=lambda one: one.size):
        store.fetch(file, place.open, transport, where=shown_url(artifact.url), arrived=arrived)
    return came


def _check_wanted(artifact: Artifact, kind: ArtifactKind | None, base: str | None) -> None:
    where = shown_url(artifact.url)
    if kind is not None and artifact.kind != kind:
        raise SourceError("another kind of artifact", where=where, expected=kind, got=artifact.kind)
    if base is not None and artifact.base != base:
        raise SourceError(
            "it is for another base model",
            where=where,
            expected=f"{base[:23]}…",
            got=f"{(artifact.base or 'none')[:23]}",
            fix="Pull what was trained for the base that is here.",
        )


def _check_target(folder: Path) -> None:
    """OutputError for a folder with anything else in it: a pull replaces it."""
    ours = any((folder / name).exists() for name in (MANIFEST, ADAPTER_CONFIG))
    if folder.exists() and not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(
            "it holds something else, which a pull would replace",
            where=str(folder),
            expected="a new folder, or a bundle or an adapter",
        )


def _check_made(folder: Path, artifact: Artifact) -> None:
    """SourceError where the files are not what the artifact says that it is."""
    where = shown_url(artifact.url)
    there = {file.path: (file.size, file.sha256) for file in artifact.files}
    if artifact.kind == "adapter":
        try:
            base, recorded = adapter_base(folder), recorded_files(folder)
        except SourceError as error:
            raise SourceError(
                f"{ADAPTER_METADATA}: {error.what}", where=where, fix=CHANGED
            ) from error
        for path, sha256 in recorded.items():
            if path not in there or there[path][1] != sha256:
                raise SourceError(
                    f"the adapter's own metadata name another {path[:80]}", where=where, fix=CHANGED
                )
        if None not in (base, artifact.base) and base != artifact.base:
            raise SourceError(
                "the adapter was trained on another base than its manifest says",
                where=where,
                expected=str(artifact.base)[:23],
                got=str(base)[:23],
            )
        return
    try:
        manifest = read_manifest(folder)
    except EdgetuneError as error:
        raise SourceError(str(error), where=where) from error
    wanted = {path: (info.bytes, info.sha256) for path, info in manifest.files.items()}
    if differing := sorted(path for path in wanted if there.get(path) != wanted[path]):
        raise SourceError(
            f"the bundle's own manifest names another {differing[0]}",
            where=where,
            fix=CHANGED,
        )
    if artifact.base not in (None, manifest.base.digest):
        raise SourceError("the bundle has another base than its manifest says", where=where)
