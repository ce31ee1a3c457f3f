"""One writer a folder: a lock that lives as long as the process that holds it, and tidying up after
one that was killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgetune.core.errors import OutputError
from edgetune.core.files import clear_interrupted, output_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POLL_S = 0.2
LOCK = ".lock-"  # then the folder's name


@contextlib.contextmanager
def exclusive(
    folder: Path,
    *,
    wait_for: Callable[[], None] | None = None,
    fix: str = "Wait until it is done, or choose another --out.",
) -> Iterator[None]:
    """Hold `folder` for this block, and clear what a killed process left beside it first.

    The lock is a file beside the folder that the operating system holds for this process (flock, or
    msvcrt's on Windows): it ends with the process, so a dead one's blocks nobody. File systems that
    know no locks go unguarded. OutputError where another run or export holds it; with `wait_for`,
    which is called once then, its end is waited for.
    """
    folder = folder.resolve()  # two links to one folder are one folder
    path = folder.with_name(f"{LOCK}{folder.name}")
    with output_errors(folder, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
        if descriptor is None and wait_for is not None:
            wait_for()
            while (descriptor := _acquire(path)) is None:
                time.sleep(POLL_S)
    try:
        if descriptor is None:
            raise OutputError(
                "another process is writing this folder",
                where=str(folder),
                fix=fix,
            )
        with output_errors(folder):
            clear_interrupted(folder)
        yield
    finally:
        if descriptor is not None:
            _release(path, descriptor)


def _acquire(path: Path) -> int | None:
    """The locked file, open; None where another holds it. One that its holder removed in between is
    locked anew.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor):
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the file is ours now; yes also where the file system cannot say."""
    if fcntl is None:
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _release(path: Path, descriptor: int) -> None:
    """Let go; while the file is still ours it is removed, which Windows allows only afterwards."""
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(descriptor)
    if fcntl is None:
        with contextlib.suppress(OSError):
            path.unlink()
