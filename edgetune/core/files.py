"""Files written whole or not at all, and their digests. A leaf: any room may import it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.core.errors import OutputError

CHUNK = 1 << 20
PARTIAL, REPLACED = ".partial-", ".replaced-"  # then 8 hex digits, "-" and the final name
TEMPORARY = re.compile(rf"{re.escape(PARTIAL)}[0-9a-f]{{8}}-")


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed onto `path`, else removed."""
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}")
    with output_errors(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes `path`'s place, else it is
    removed.
    """
    path = path.resolve()  # a link stays, what it leads to is replaced
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}")
    with output_errors(path, partial):
        partial.mkdir(parents=True)
        try:
            yield partial
            old = path.with_name(partial.name.replace(PARTIAL, REPLACED, 1))
            if path.exists():
                path.replace(old)
            try:
                partial.replace(path)
            except BaseException:
                if old.exists():
                    old.replace(path)
                raise
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` for work on the way to it, removed afterwards; after a kill by
    `clear_interrupted(path)`.
    """
    path = path.resolve()
    scratch = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}")
    with output_errors(path, scratch):
        scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def clear_interrupted(path: Path) -> None:
    """Tidy up beside `path` after a process that was killed inside `whole_folder`.

    Killed between the two renames it left the older folder under a temporary name: that one is put
    back. Everything else under a temporary name is removed.
    """
    path = path.resolve()
    if not path.parent.is_dir():
        return
    hidden = re.compile(
        rf"({re.escape(PARTIAL)}|{re.escape(REPLACED)})[0-9a-f]{{8}}-{re.escape(path.name)}"
    )
    left = sorted(
        (p for p in path.parent.iterdir() if hidden.fullmatch(p.name)),
        key=lambda p: p.stat().st_mtime,
    )
    replaced = [folder for folder in left if folder.name.startswith(REPLACED)]
    if replaced and not path.exists():
        left.remove(replaced[-1])
        replaced[-1].replace(path)
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def output_errors(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one clear line. `partial` is what is made on the
    way to `path`.
    """
    reasons = {
        errno.EACCES: "it is not writable",
        errno.EROFS: "it is on a read-only file system",
        errno.EPERM: "writing there is not permitted",
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
        errno.EISDIR: "it is a folder",
        errno.ENAMETOOLONG: "its name is too long",
        errno.EBUSY: (
            "it is in use, or a mount point, which cannot be replaced; name a folder inside it"
        ),
        errno.EXDEV: "it is a mount point, which cannot be replaced; name a folder inside it",
    }
    try:
        yield
    except OSError as error:
        reason = reasons.get(error.errno or 0)
        if (
            error.errno == errno.ENOENT
            and partial is not None
            and Path(error.filename or "") in (partial, *partial.parents)
        ):
            reason = "nothing can be made there"  # as in /proc
        if reason is None:
            raise
        shown = TEMPORARY.sub(
            "", str(path)
        )  # a file of a folder that is being made, by its final name
        raise OutputError(
            f"cannot write {shown}: {reason}",
            fix="Nothing was left behind; choose another place, or free this one.",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON (indented, trailing newline) whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
