"""Where new versions come from: a registry's tag, a web server or a folder, asked repeatedly."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edgetune.core.errors import AdapterError
from edgetune.runtime.adapters.packing import most_bytes
from edgetune.runtime.bundle.manifest import Manifest
from edgetune.runtime.sources.artifact import Artifact
from edgetune.runtime.sources.pull import pull, resolve


class ArtifactVersions:
    """One adapter as a source has it now. Files that came are kept in `store`, so that a fetch goes
    on where it broke and what two versions share comes once.
    """

    def __init__(self, url: str, store: Path, *, manifest: Manifest) -> None:
        """`manifest`: of the bundle here. What is for another base, or larger than any adapter of
        this one, is not fetched.
        """
        self._url, self._store, self._base = url, store, manifest.base.digest
        self._most = most_bytes(manifest)
        self._found: Artifact | None = None

    def resolve(self) -> str:
        """The digest of what is there now. SourceError where nothing is, or nobody answers."""
        self._found = resolve(self._url)
        return self._found.digest

    def fetch(self, folder: Path) -> None:
        """Make `folder` what `resolve` found; SourceError or OutputError where it cannot be had,
        AdapterError where it is no adapter for this base.
        """
        found = self._found or resolve(self._url)
        if found.kind != "adapter" or found.base not in (None, self._base):
            raise AdapterError(
                "it is no adapter for the base model that is here",
                where=self._url,
                expected=f"an adapter for {self._base[:23]}…",
                got=f"{found.kind} for {(found.base or 'none')[:23]}…",
            )
        if found.size > self._most:
            raise AdapterError(
                "it is larger than any adapter for this base",
                where=self._url,
                expected=f"at most {self._most:,} bytes",
                got=f"{found.size:,}",
            )
        self._forget_unused({file.sha256 for file in found.files})
        pull(found, folder, store=self._store)

    def _forget_unused(self, wanted: set[str]) -> None:
        """Remove files of versions that are gone, and halves of what is not wanted any more; those
        of the others are links to them.
        """
        halves = self._store.glob("partial/*")
        for path in (*self._store.glob("sha256/*"), *halves):
            with contextlib.suppress(OSError):
                if path.stat().st_nlink == 1 and path.name not in wanted:
                    path.unlink()
