"""Where new versions come from."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgetune.core.files import is_regular
from edgetune.runtime.signature.envelope import SIGNATURE
from edgetune.runtime.signature.folder import digests_of


@dataclass
class FolderVersions:
    """An adapter's folder on this machine, whatever it holds now."""

    folder: Path

    def resolve(self) -> str:
        """A digest of every file."""
        digest = hashlib.sha256(repr(sorted(digests_of(self.folder).items())).encode())
        if is_regular(self.folder / SIGNATURE):
            digest.update((self.folder / SIGNATURE).read_bytes())
        return f"sha256:{digest.hexdigest()}"

    def fetch(self, folder: Path) -> None:
        """Copy it."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.folder, folder, symlinks=True)
