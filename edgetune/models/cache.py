"""Where converted bases are kept, and how a whole one is told from a damaged one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.core.exclusive import exclusive
from edgetune.core.files import whole_folder, write_json
from edgetune.models.base import Base, digest_of, open_folder

SCHEMA = 1
RECORD = "base.json"


def cached(folder: Path, *, name: str, source_sha256: str, make: Callable[[Path], None]) -> Base:
    """The base in `folder`; when it is missing, damaged or of another source, `make` fills a new
    folder first. One process at a time does; what a killed one left is removed.
    """
    record = read_record(folder, source_sha256=source_sha256)
    if record is None:
        with exclusive(folder, wait_for=lambda: _say_waiting(name)):
            # another process may have made it meanwhile
            record = read_record(folder, source_sha256=source_sha256)
            if record is None:
                with whole_folder(folder) as partial:
                    make(partial)
                    record = _record(partial, name=name, source_sha256=source_sha256)
                    write_json(partial / RECORD, record)
    return open_folder(folder, name=name, digest=str(record["digest"]))


def _say_waiting(name: str) -> None:
    print(f"another process is converting {name}; waiting for it", file=sys.stderr, flush=True)


def read_record(folder: Path, *, source_sha256: str) -> dict[str, Any] | None:
    """The cached base's record, or None when the folder is not a whole copy made from this
    source.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = record["schema"] == SCHEMA and record["source_sha256"] == source_sha256
        whole = all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if same and whole else None


def _record(folder: Path, *, name: str, source_sha256: str) -> dict[str, Any]:
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        "schema": SCHEMA,
        "name": name,
        "digest": digest_of(folder),
        "source_sha256": source_sha256,
        "files": files,
    }
