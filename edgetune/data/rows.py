"""Rows of data files, or of hub data sets: read, drawn, held out and converted.

Every error names file, line, column, what was expected, what was found and what to do.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from edgetune.core.errors import DataError
from edgetune.core.files import sha256_file, sha256_text
from edgetune.data.readers import READERS, Row
from edgetune.recipe.paths import SUFFIXES, _kind, is_hub_id

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """All rows of one source; `skipped` counts the unreadable ones left out, `digest` is of the
    source's bytes.
    """

    source: str
    rows: list[Row]
    skipped: int
    digest: str


def read_rows(source: str | Path, skip_invalid: bool = False) -> Rows:
    """Read all rows. A bad row raises `DataError`, or is counted when `skip_invalid`; a file
    without rows raises.
    """
    path = Path(source)
    if not path.exists() and is_hub_id(str(source)):
        return _read_hub(str(source))
    kind = _check_file(path)
    rows: list[Row] = []
    skipped = 0
    with _reading(path):
        for row in READERS[kind](path):
            if isinstance(row, Row):
                rows.append(row)
            elif skip_invalid:
                skipped += 1
            else:
                raise row
    if not rows:
        got = f"{skipped} invalid rows" if skipped else "none"
        raise DataError(
            "there are no rows in this file", where=str(path), expected="at least one row", got=got
        )
    return Rows(source=str(path), rows=rows, skipped=skipped, digest="sha256:" + sha256_file(path))


def convert_rows(
    source: Rows, convert: Callable[[Row, str], T], *, skip_invalid: bool
) -> tuple[list[T], int]:
    """Every row converted, and how many were left out. `convert` gets the row and "file, line n"
    for its errors.

    The DataError of the first bad row is raised; with `skip_invalid` only where all rows are bad.
    """
    converted: list[T] = []
    first: DataError | None = None
    for row in source.rows:
        try:
            converted.append(convert(row, f"{source.source}, line {row.line}"))
        except DataError as error:
            if not skip_invalid:
                raise
            first = first or error
    skipped = len(source.rows) - len(converted)
    if not converted and first is not None:
        raise DataError(
            f"none of {skipped} rows can be used; the first: {first}", where=source.source
        ) from first
    return converted, skipped


def sample(rows: list[T], limit: int | None, *, seed: int) -> list[T]:
    """A random subset in file order; the same seed draws the same rows. No `limit`: all of them."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def spread(rows: Sequence[Any], limit: int | None) -> list[Any]:
    """All rows, or `limit` of them at equal distances."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[at * len(rows) // count] for at in range(count)]


def hold_out(source: Rows, count: int, *, seed: int) -> tuple[Rows, Rows]:
    """The rows without `count` random ones, and these; both in file order. The same seed draws the
    same rows.
    """
    if count >= len(source.rows):
        raise DataError(
            "data.hold_out leaves no row to train on",
            where=source.source,
            expected=f"less than {len(source.rows)}",
            got=str(count),
        )
    drawn = set(random.Random(seed).sample(range(len(source.rows)), count))
    kept = [row for at, row in enumerate(source.rows) if at not in drawn]
    held = [row for at, row in enumerate(source.rows) if at in drawn]
    return replace(source, rows=kept), replace(source, rows=held, skipped=0)


def _check_file(path: Path) -> str:
    """The file's format; a missing, empty or unknown file raises."""
    formats = "one of " + " ".join(SUFFIXES) + ", also with .gz"
    if not path.exists():
        parent = path.parent
        near = sorted(p.name for p in parent.iterdir() if _kind(p)) if parent.is_dir() else []
        got = f"{parent} has " + ", ".join(near[:6]) if near else ""
        raise DataError(
            "there is no such data file", where=str(path), got=got, fix="Correct the path."
        )
    if not path.is_file():
        raise DataError("this is a folder", where=str(path), expected="a data file, " + formats)
    kind = _kind(path)
    if kind is None:
        fix = (
            "Write one JSON object a line and name it .jsonl."
            if path.suffix in {".json", ".gz"}
            else ""
        )
        raise DataError("unknown kind of data file", where=str(path), expected=formats, fix=fix)
    if path.stat().st_size == 0:
        raise DataError(
            "the file is empty", where=str(path), expected="at least one row", got="0 bytes"
        )
    return kind


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged file raises, as a DataError."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fix = "Fetch or compress the file again."
        raise DataError(f"damaged gzip file: {error}", where=str(path), fix=fix) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "not UTF-8 text",
            where=str(path),
            got=f"byte 0x{error.object[error.start]:02x}",
            fix="Save it as UTF-8.",
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror or error}", where=str(path)
        ) from error


def _read_hub(source: str) -> Rows:
    """A hub data set, `owner/name` or `owner/name:split` (default split: train)."""
    import datasets
    import huggingface_hub

    name, _, split = source.partition(":")
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(
                name
            )  # fails at once where load_dataset would retry for half a minute
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's errors and the data set's own have no common class
        line = (str(error).splitlines() or [""])[0]
        raise DataError(
            "no such file, and it cannot be loaded as a hub data set",
            where=source,
            got=f"{type(error).__name__}: {line}"[:200],
            fix="Check the name and the connection, or give a local file ("
            + " ".join(SUFFIXES)
            + ", also .gz).",
        ) from error
    rows = [Row(number, dict(values)) for number, values in enumerate(table, start=1)]
    if not rows:
        raise DataError(
            "there are no rows in this data set", where=source, expected="at least one row"
        )
    digest = sha256_text(
        "\n".join(json.dumps(row.values, sort_keys=True, default=str) for row in rows)
    )
    return Rows(source=source, rows=rows, skipped=0, digest="sha256:" + digest)
