"""A folder signed, and a folder against its signature: every file that is there, and none else."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from edgetune.core.errors import SignatureError, listed
from edgetune.core.files import sha256_file, write_json
from edgetune.runtime.signature.envelope import SIGNATURE, Signed, seal, unseal
from edgetune.runtime.signature.keys import PrivateKey, PublicKey

MAX_FILES = 20_000
"""Of a signed folder: as many as a signature file of 4 MB lists."""
TRIES = 3
"""How often a folder is opened whose files others take links to meanwhile."""
T = TypeVar("T")


def sign_folder(folder: str | Path, key: PrivateKey, *, version: int | None = None) -> Signed:
    """Write the signature over every file of a folder into it, whole or not at all. SignatureError
    for a link, or anything else that is no file.
    """
    folder = Path(folder)
    files = {path: sha256_file(folder / path) for path in _files_of(folder)}
    if not files:
        raise SignatureError("there is nothing to sign", where=str(folder))
    signed = Signed(folder.resolve().name, files, version)
    write_json(folder / SIGNATURE, seal(signed, key))
    return signed


def check_signature(folder: str | Path, key: PublicKey) -> Signed:
    """What the publisher signed, when it is what the folder holds. SignatureError lists what was
    changed, added and is missing; links are refused.
    """
    folder = Path(folder)
    if not (folder / SIGNATURE).exists():
        raise SignatureError(
            "there is no signature",
            where=str(folder),
            expected=SIGNATURE,
            fix="Its publisher makes one: edgetune sign FOLDER --key KEY.pem.",
        )
    signed = unseal(folder / SIGNATURE, key)
    there = set(_files_of(folder))
    differing = [
        *(f"{path}: missing" for path in signed.files if path not in there),
        *(f"{path}: not signed" for path in sorted(there - set(signed.files))),
        *(
            f"{path}: changed since it was signed"
            for path, digest in signed.files.items()
            if path in there and sha256_file(folder / path) != digest
        ),
    ]
    if differing:
        raise SignatureError(
            f"the folder is not what was signed: {listed(differing, 'files differ')}",
            where=str(folder),
            fix="Get it again from its publisher.",
        )
    return signed


class _TouchedError(SignatureError):
    """Nothing but change times differ: a pull that shares the files has linked or unlinked one, or
    its content was changed and put back.
    """


def open_as_signed(folder: Path, key: PublicKey, read: Callable[[Mapping[str, str]], T]) -> T:
    """What `read` makes of a folder that `check_signature` accepts, given its files' sha256.
    SignatureError also where a file of it was written, replaced or added before `read` ended: what
    it read is what was checked. Where change times alone differ, all of that is done again.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(_TouchedError):
            return _open_once(folder, key, read)
    return _open_once(folder, key, read)


def _open_once(folder: Path, key: PublicKey, read: Callable[[Mapping[str, str]], T]) -> T:
    before = _marks(folder)
    signed = check_signature(folder, key)
    try:
        return read(signed.files)
    finally:  # also where something cannot be read, which explains it
        after = _marks(folder)
        if changed := {path for path, _ in before.items() ^ after.items()}:
            touched = all(before.get(path, ())[:-1] == after.get(path, ())[:-1] for path in changed)
            raise (_TouchedError if touched else SignatureError)(
                "the folder was changed while it was opened:"
                f" {listed([f'{path}: changed' for path in sorted(changed)], 'files differ')}",
                where=str(folder),
                fix="Open it when nobody writes there.",
            )


def demand_signed(
    read: Mapping[str, str],
    signed: Mapping[str, str | None],
    names: Iterable[str],
    *,
    where: Path,
) -> None:
    """SignatureError where the bytes that were read (name → sha256) are not those that were signed:
    somebody changed the folder after `check_signature`.
    """
    if changed := [name for name in names if read.get(name) != signed.get(name)]:
        raise SignatureError(
            f"{changed[0]}: changed while it was read",
            where=str(where),
            fix="Get it again from its publisher.",
        )


def digests_of(folder: str | Path) -> dict[str, str]:
    """sha256 (hex) of every file in a folder but its signature, by path. SignatureError for
    links.
    """
    try:
        return {path: sha256_file(Path(folder) / path) for path in _files_of(Path(folder))}
    except OSError as error:
        raise SignatureError(
            f"cannot be read: {error.strerror}", where=str(error.filename)
        ) from error


def _marks(folder: Path) -> dict[str, tuple[int, ...]]:
    """What the file system says of every file, which no write or replacement leaves as it was."""
    marks: dict[str, tuple[int, ...]] = {}
    for path in [*_files_of(folder), SIGNATURE]:
        with contextlib.suppress(FileNotFoundError):
            one = (folder / path).lstat()
            times = one.st_mtime_ns, one.st_ctime_ns
            marks[path] = (one.st_dev, one.st_ino, one.st_size, *times)
    return marks


def _files_of(folder: Path) -> list[str]:
    """The files of a folder and of those inside it, as POSIX paths, but for its signature."""
    if not folder.is_dir():
        raise SignatureError("there is no such folder", where=str(folder))
    found: list[str] = []

    def unread(error: OSError) -> None:
        raise SignatureError(f"cannot be read: {error.strerror}", where=str(error.filename))

    for place, folders, names in os.walk(folder, onerror=unread):
        for name in [*folders, *names]:
            path = Path(place, name)
            mode = path.lstat().st_mode
            shown = path.relative_to(folder).as_posix()
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                what = "a link" if stat.S_ISLNK(mode) else "no file"
                raise SignatureError(
                    f"{shown}: {what}", where=str(folder), expected="files and folders only"
                )
            if stat.S_ISREG(mode) and shown != SIGNATURE:
                found.append(shown)
        if len(found) > MAX_FILES:
            raise SignatureError(
                "too many files", where=str(folder), expected=f"{MAX_FILES} at most"
            )
    return sorted(found)
