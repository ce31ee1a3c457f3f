"""Files written whole or not at all, and their digests. A leaf: any room may import it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError, OutputError

CHUNK = 1 << 20
MAX_JSON_BYTES = 4 << 20
MAX_JSON_DEPTH = 64
PARTIAL, REPLACED = ".partial-", ".replaced-"  # then 8 hex digits, "-" and the final name
TEMPORARY = re.compile(rf"{re.escape(PARTIAL)}[0-9a-f]{{8}}-")


def cache_folder() -> Path:
    """`$EDGETUNE_CACHE`, else `$XDG_CACHE_HOME/edgetune`, else `~/.cache/edgetune`."""
    if chosen := os.environ.get("EDGETUNE_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edgetune"


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


def is_regular(path: Path) -> bool:
    """Whether there is a regular file (links are followed). False for a folder, a pipe or a device,
    which could block whoever opens them, and for a name that no file can have.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_json(
    path: Path,
    *,
    error: type[EdgetuneError],
    max_bytes: int = MAX_JSON_BYTES,
    fix: str = "",
) -> Any:
    """The value in a JSON file that may come from anywhere; `error` for one that is no regular
    file, larger than `max_bytes`, not valid, or beyond the limits of `parse_json`.
    """
    return read_hashed_json(path, error=error, max_bytes=max_bytes, fix=fix)[0]


def read_hashed_json(
    path: Path,
    *,
    error: type[EdgetuneError],
    max_bytes: int = MAX_JSON_BYTES,
    fix: str = "",
) -> tuple[Any, str]:
    """As `read_json`, with the sha256 (hex) of the very bytes that the value was made of."""
    where = str(path)
    if not is_regular(path):
        raise error("not a regular file", where=where, fix=fix)
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror}", where=where, fix=fix) from problem
    if len(raw) > max_bytes:
        raise error("too large", where=where, expected=f"at most {max_bytes} bytes", fix=fix)
    try:
        return parse_json(raw), hashlib.sha256(raw).hexdigest()
    except ValueError as problem:
        raise error(f"not valid JSON: {problem}", where=where, fix=fix) from problem


def parse_json(raw: bytes) -> Any:
    """JSON of at most `MAX_JSON_DEPTH` levels, whole numbers of 64 bits, and text that UTF-8 can
    spell; ValueError for any other.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_int=_whole)
    except RecursionError as error:
        raise ValueError(f"deeper than {MAX_JSON_DEPTH} levels") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"deeper than {MAX_JSON_DEPTH} levels")
        "".join(one for one in level if isinstance(one, str)).encode()  # no half surrogate pair
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one if isinstance(one, list) else [*one.keys(), *one.values()])
        ]
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"a whole number of more than 64 bits: {digits:.20}…")
    return int(digits)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON (indented, trailing newline) whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
