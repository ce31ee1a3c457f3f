"""Rows of data files, or of hub data sets: read, drawn, held out and converted.

Every error names file, line, column, what was expected, what was found and what to do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgetune.core.errors import DataError
from edgetune.core.files import sha256_file, sha256_text
from edgetune.data.readers import read_file
from edgetune.data.row import LineOf, Row
from edgetune.data.sources import check_file, files_of, hub_table
from edgetune.recipe.paths import is_hub_id

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """All rows of one source; `skipped` counts the unreadable ones left out, `digest` is of the
    source's bytes. `notes` say what it was taken for.
    """

    source: str
    rows: list[Row]
    skipped: int
    digest: str
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something of the rows, once."""
        if text not in self.notes:
            self.notes.append(text)


def read_rows(
    source: str | Path | Sequence[str | Path],
    skip_invalid: bool = False,
    encoding: str | None = None,
) -> Rows:
    """Read all rows of a file, a folder of files, a glob pattern, a hub data set, or of a list of
    these. A bad row raises `DataError`, or is counted when `skip_invalid`; a file without rows
    raises.
    """
    if not isinstance(source, (str, Path)):
        return _joined([read_rows(one, skip_invalid, encoding) for one in source])
    if not Path(source).exists() and is_hub_id(str(source)):
        return _read_hub(str(source))
    paths = files_of(Path(source))
    if len(paths) > 1:
        return _joined([read_rows(path, skip_invalid, encoding) for path in paths])
    (path,) = paths
    check_file(path)
    rows: list[Row] = []
    notes: list[str] = []
    skipped, reason = 0, ""
    with _reading(path):
        for row in read_file(path, encoding, notes):
            if isinstance(row, Row):
                rows.append(row)
            elif skip_invalid:
                skipped += 1
                reason = reason or f"; the first: {row}"
            else:
                raise row
    if not rows:
        got = f"{skipped} that cannot be read{reason}" if skipped else "none"
        raise DataError(
            "there are no rows in this file", where=str(path), expected="at least one row", got=got
        )
    digest = "sha256:" + sha256_file(path)
    return Rows(str(path), rows, skipped=skipped, digest=digest, notes=[", ".join(notes)])


def _joined(parts: list[Rows]) -> Rows:
    """The rows of several sources as one, each with a number of its own that prints its place."""
    if len(parts) == 1:
        return parts[0]
    rows: list[Row] = []
    for part in parts:
        name = Path(part.source).name
        for row in part.rows:
            rows.append(Row(LineOf.of(row.line, name, len(rows) + 1), row.values))
    notes = [f"{len(parts)} files: " + ", ".join(dict.fromkeys(n for p in parts for n in p.notes))]
    return Rows(
        source=f"{parts[0].source} and {len(parts) - 1} more",
        rows=rows,
        skipped=sum(part.skipped for part in parts),
        digest="sha256:" + sha256_text("\n".join(part.digest for part in parts)),
        notes=notes,
    )


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


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged file raises, as a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror or error}", where=str(path)
        ) from error


def _read_hub(source: str) -> Rows:
    """A hub data set as rows."""
    values, notes = hub_table(source)
    rows = [Row(number, one) for number, one in enumerate(values, start=1)]
    if not rows:
        raise DataError(
            "there are no rows in this data set", where=source, expected="at least one row"
        )
    digest = sha256_text(
        "\n".join(json.dumps(row.values, sort_keys=True, default=str) for row in rows)
    )
    return Rows(source, rows, skipped=0, digest="sha256:" + digest, notes=[", ".join(notes)])
