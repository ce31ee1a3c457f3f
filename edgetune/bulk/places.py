"""Where rows lie and where their answers go: folders here, or a store that fsspec reaches (s3://
and the like, with the package that it asks for).
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgetune.core.errors import DataError, EdgetuneError, OutputError
from edgetune.core.files import PARTIAL, whole_file
from edgetune.data.sources import FORMATS, check_file, files_of
from edgetune.recipe.paths import file_format


def is_remote(place: str) -> bool:
    """A URL, not a path."""
    return "://" in place


def inputs_of(place: str) -> list[str]:
    """The data files of a file, a folder or a pattern, sorted. DataError where there is none."""
    if not is_remote(place):
        here = files_of(Path(place))
        for one in here:
            check_file(one)
        return [str(one) for one in here]
    with _reaching(place, DataError):
        store, path = _store(place)
        names = store.glob(path) if any(c in path for c in "*?[") else [path]
        if store.isdir(path):
            names = [str(one) for one in store.ls(path, detail=False)]
        files = sorted(str(one) for one in names if file_format(Path(str(one))))
        files = [one for one in files if store.isfile(one)]
    if not files:
        raise DataError("there is no data file", where=place, expected=FORMATS)
    return [store.unstrip_protocol(one) for one in files]


@contextlib.contextmanager
def local_copy(place: str) -> Iterator[Path]:
    """The file itself, or a copy of it that lasts as long as the context."""
    if not is_remote(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory() as folder:
        with _reaching(place, DataError):
            store, path = _store(place)
            copy = Path(folder) / Path(path).name
            store.get_file(path, str(copy))
        yield copy


class Folder:
    """A folder of answers: every file in it is whole."""

    def __init__(self, place: str) -> None:
        self.place = place

    def names(self) -> set[str]:
        """The files that are there; none where the folder is not."""
        if not is_remote(self.place):
            folder = Path(self.place)
            if folder.exists() and not folder.is_dir():
                raise OutputError("is a file", where=self.place, expected="a folder for the parts")
            return {one.name for one in folder.iterdir()} if folder.is_dir() else set()
        with _reaching(self.place, OutputError):
            store, path = _store(self.place)
            store.invalidate_cache()
            found = store.ls(path, detail=False) if store.isdir(path) else []
            return {Path(str(one)).name for one in found}

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None where it is not there."""
        if not is_remote(self.place):
            path = Path(self.place) / name
            return path.read_bytes() if path.is_file() else None
        with _reaching(self.place, OutputError):
            store, root = _store(self.place)
            whole = f"{root.rstrip('/')}/{name}"
            return bytes(store.cat_file(whole)) if store.isfile(whole) else None

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all."""
        if not is_remote(self.place):
            with whole_file(Path(self.place) / name) as path:
                path.write_bytes(content)
            return
        with _reaching(self.place, OutputError):
            store, root = _store(self.place)
            store.makedirs(root, exist_ok=True)
            root = root.rstrip("/")
            partial = f"{root}/{PARTIAL}{uuid.uuid4().hex[:8]}-{name}"
            store.pipe_file(partial, content)  # some stores write in place
            store.mv(partial, f"{root}/{name}")

    def write_if_any(self, name: str, content: bytes) -> None:
        """As `write`; without content there is no such file afterwards."""
        if content:
            self.write(name, content)
        elif not is_remote(self.place):
            (Path(self.place) / name).unlink(missing_ok=True)
        elif self.read(name) is not None:
            with _reaching(self.place, OutputError):
                store, root = _store(self.place)
                store.rm_file(f"{root.rstrip('/')}/{name}")


def _store(place: str) -> tuple[Any, str]:
    import fsspec

    store, path = fsspec.core.url_to_fs(place)
    return store, str(path)


@contextlib.contextmanager
def _reaching(place: str, kind: type[EdgetuneError]) -> Iterator[None]:
    """Whatever a store says in one line: its errors and its network's have no common class."""
    try:
        yield
    except EdgetuneError:
        raise
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise kind(
            "cannot be reached", where=place, got=f"{type(error).__name__}: {line}"[:200]
        ) from error
