"""Where new versions come from: a registry's tag, a web server or a folder, asked repeatedly."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edgetune.core.errors import AdapterError
from edgetune.runtime.sources.artifact import Artifact
from edgetune.runtime.sources.pull import pull, resolve


class ArtifactVersions:
    """One adapter as a source has it now. Files that came are kept in `store`, so that a fetch goes
    on where it broke and what two versions share comes once.
    """

    def __init__(self, url: str, store: Path, *, base: str) -> None:
        """`base`: digest of the model here; what is for another one is not fetched."""
        self._url, self._store, self._base = url, store, base
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
        self._forget_unused()
        pull(found, folder, store=self._store)

    def _forget_unused(self) -> None:
        """Remove files of versions that are gone; those of the others are links to them."""
        for path in self._store.glob("sha256/*"):
            with contextlib.suppress(OSError):
                if path.stat().st_nlink == 1:
                    path.unlink()
