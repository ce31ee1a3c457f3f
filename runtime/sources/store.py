"""Files by their sha256, each once: what is here is never fetched again, and folders share it.

sha256/<hex>       whole files, read-only, hard links of which lie in the folders
partial/<hex>      what has come of one so far; the next try goes on from there
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from edgetune.core.errors import OutputError, SourceError
from edgetune.core.exclusive import exclusive
from edgetune.core.files import cache_folder, is_regular, output_errors, sha256_file
from edgetune.runtime.sources.artifact import ArtifactFile
from edgetune.runtime.sources.transport import BROKEN, StatusError, Transport, unreachable

BLOCK = 1 << 16
"""Bytes of a read: what a broken line may cost, at most."""
Opened = Callable[[ArtifactFile, int], Any]
"""Opens a file from an offset on: `ArtifactSource.open`."""


def default_store() -> Path:
    """`$EDGETUNE_STORE`, else `store` in edgetune's cache."""
    if chosen := os.environ.get("EDGETUNE_STORE"):
        return Path(chosen).expanduser()
    return cache_folder() / "store"


class Store:
    """The store in a folder, which is made when something comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, sha256: str) -> Path:
        """Where a whole file lies, once it is there."""
        return self.folder / "sha256" / sha256

    def has(self, file: ArtifactFile) -> bool:
        """Whether it is here, read again; one that was damaged since is removed."""
        path = self.path(file.sha256)
        if not is_regular(path):
            return False
        if path.stat().st_size == file.size and sha256_file(path) == file.sha256:
            return True
        path.unlink()
        return False

    def missing_bytes(self, file: ArtifactFile) -> int:
        """How many bytes of it are still to come."""
        with contextlib.suppress(OSError):
            return max(0, file.size - self._partial(file).stat().st_size)
        return file.size

    def fetch(
        self,
        file: ArtifactFile,
        opened: Opened,
        transport: Transport,
        *,
        where: str,
        arrived: Callable[[int], None],
    ) -> None:
        """Have it here, whole, from what came before on. `arrived` is told of each block's bytes.
        SourceError where the source sends other bytes, or stays away.
        """
        partial = self._partial(file)
        with exclusive(partial, wait_for=lambda: None), output_errors(partial):
            if self.has(file):  # another process fetched it meanwhile
                return
            partial.parent.mkdir(parents=True, exist_ok=True)
            resumed = is_regular(partial) and partial.stat().st_size > 0
            self._receive(file, opened, transport, where, arrived)
            if sha256_file(partial) != file.sha256 and resumed:
                partial.unlink()  # what came before was damaged
                self._receive(file, opened, transport, where, arrived)
            if (got := sha256_file(partial)) != file.sha256:
                partial.unlink()
                raise SourceError(
                    f"{file.path}: the source sent other bytes than its manifest names",
                    where=where,
                    expected=f"sha256 {file.sha256[:16]}…",
                    got=f"{got[:16]}…",
                    fix="Try again; when it stays so, the source is damaged or forged.",
                )
            self._keep(partial, self.path(file.sha256))

    def place(self, file: ArtifactFile, path: Path) -> None:
        """Put it into a folder: a hard link, or a copy where the file system has none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        source = self.path(file.sha256)
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            shutil.copyfile(source, path)
            sync(path)

    def prune(self, *, keep: Collection[str] = ()) -> int:
        """Remove files that no folder has a link to, and halves; bytes freed. Folders on another
        file system hold copies, and lose nothing. `keep`: the sha256 of files that stay.
        """
        freed = 0
        for name in ("sha256", "partial"):
            for path in (self.folder / name).glob("[0-9a-f]*"):
                with exclusive(self.folder / "partial" / path.name, wait_for=lambda: None):
                    unused = is_regular(path) and path.stat().st_nlink == 1
                    if unused and path.name not in keep:
                        freed += path.stat().st_size
                        path.unlink()
        return freed

    def _partial(self, file: ArtifactFile) -> Path:
        return self.folder / "partial" / file.sha256

    def _receive(
        self,
        file: ArtifactFile,
        opened: Opened,
        transport: Transport,
        where: str,
        arrived: Callable[[int], None],
    ) -> None:
        """Fill the half to its size; a try that brought bytes gives the next ones new patience."""
        partial, attempt, refused = self._partial(file), 0, 0
        partial.touch()
        while (before := partial.stat().st_size) != file.size or not file.size:
            if before > file.size:
                partial.write_bytes(b"")
                before = 0
            if not file.size:
                return
            try:
                self._append(file, opened, before, where, arrived)
            except StatusError as error:
                refused += 1
                if not before or refused >= transport.attempts:
                    raise SourceError(f"{file.path}: HTTP {error.status}", where=where) from error
                partial.write_bytes(b"")  # 416: the source does not have as much as came before
            except BROKEN as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                attempt = 1 if partial.stat().st_size > before else attempt + 1
                if attempt >= transport.attempts:
                    raise unreachable(where, error) from error
                transport.pause(attempt)

    def _append(
        self,
        file: ArtifactFile,
        opened: Opened,
        offset: int,
        where: str,
        arrived: Callable[[int], None],
    ) -> None:
        with opened(file, offset) as response:
            offset = offset if response.status == 206 else 0
            with self._partial(file).open("r+b") as partial:
                partial.truncate(offset)
                partial.seek(offset)
                while block := response.read1(BLOCK):
                    offset += len(block)
                    if offset > file.size:
                        partial.truncate(0)
                        raise SourceError(
                            f"{file.path}: the source sends more than its manifest says",
                            where=where,
                            expected=f"{file.size} bytes",
                        )
                    partial.write(block)
                    arrived(len(block))
        if offset < file.size:
            raise http.client.IncompleteRead(b"", file.size - offset)

    def _keep(self, partial: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(partial)
        partial.chmod(0o444)  # folders share it: nobody changes it by accident
        partial.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk before what follows: a power cut keeps the order."""
    with contextlib.suppress(OSError):  # folders cannot be opened on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_room(folder: Path, needed: int) -> None:
    """OutputError where the disk has not this many bytes left."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            "the disk has not enough room",
            where=str(folder),
            expected=f"{needed} bytes",
            got=f"{free} bytes free",
            fix="Free some, or choose another --store.",
        )
