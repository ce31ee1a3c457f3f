"""Data files as rows: JSON Lines, CSV, TSV, Parquet and text, each also gzipped, or a hub data set.

Every complaint names file, line, column, what was expected, what was found and what to do.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgetune.core.errors import DataError
from edgetune.core.files import sha256_file, sha256_text
from edgetune.recipe.paths import SUFFIXES, _kind, is_hub_id


class Row(NamedTuple):
    """One row: its line in the file (from 1; in Parquet the row's number) and its columns."""

    line: int
    values: dict[str, Any]


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
    try:
        for row in READERS[kind](path):
            if isinstance(row, Row):
                rows.append(row)
            elif skip_invalid:
                skipped += 1
            else:
                raise row
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
    if not rows:
        got = f"{skipped} invalid rows" if skipped else "none"
        raise DataError(
            "there are no rows in this file", where=str(path), expected="at least one row", got=got
        )
    return Rows(source=str(path), rows=rows, skipped=skipped, digest="sha256:" + sha256_file(path))


def spread(rows: Sequence[Any], limit: int | None) -> list[Any]:
    """All rows, or `limit` of them at equal distances."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[at * len(rows) // count] for at in range(count)]


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


def _open_text(path: Path) -> io.TextIOBase:
    """Text of a plain or gzipped file, without a byte order mark; newlines as the csv module wants
    them.
    """
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[return-value]
    return path.open(encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path) -> Iterator[Row | DataError]:
    with _open_text(path) as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield _json_row(text, path=path, line=line)


def _json_row(text: str, *, path: Path, line: int) -> Row | DataError:
    where = f"{path}, line {line}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return DataError(
            f"not valid JSON at column {error.colno}: {error.msg}",
            where=where,
            expected="one JSON object a line",
            got=_shown(text),
            fix="Correct the line, or leave such rows out with data.skip_invalid = true.",
        )
    except RecursionError:
        return DataError("JSON nested too deeply", where=where, got=_shown(text))
    if not isinstance(value, dict):
        expected = 'a JSON object such as {"text": "…", "label": "…"}'
        return DataError(
            "the row is not an object", where=where, expected=expected, got=_shown(text)
        )
    return Row(line, value)


def _read_csv(path: Path) -> Iterator[Row | DataError]:
    return _read_table(path, delimiter=",")


def _read_tsv(path: Path) -> Iterator[Row | DataError]:
    return _read_table(path, delimiter="\t")


def _read_table(path: Path, *, delimiter: str) -> Iterator[Row | DataError]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            _check_header(header, path=path)
            first = (
                reader.line_num + 1
            )  # where the next record starts: a quoted field may span lines
            for fields in reader:
                if fields:
                    yield _table_row(header, fields, path=path, line=first)
                first = reader.line_num + 1
        except csv.Error as error:
            fix = "Correct the quoting of this row."
            raise DataError(
                f"damaged table: {error}", where=f"{path}, line {reader.line_num}", fix=fix
            ) from error


def _check_header(header: list[str], *, path: Path) -> None:
    where = f"{path}, line 1"
    expected = "a first line with the columns' names"
    if not header or not all(name.strip() for name in header):
        raise DataError(
            "a column has no name", where=where, expected=expected, got=_shown(",".join(header))
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f'the column "{twice[0]}" appears twice', where=where, fix="Rename one of them."
        )


def _table_row(header: list[str], fields: list[str], *, path: Path, line: int) -> Row | DataError:
    if len(fields) != len(header):
        return DataError(
            "wrong number of fields",
            where=f"{path}, line {line}",
            expected=f"{len(header)} ({', '.join(header)})",
            got=str(len(fields)),
            fix="Put fields that contain the separator in double quotes.",
        )
    return Row(line, dict(zip(header, fields, strict=True)))


def _read_parquet(path: Path) -> Iterator[Row | DataError]:
    import pyarrow
    import pyarrow.parquet

    source: Any = (
        io.BytesIO(gzip.decompress(path.read_bytes()))
        if path.name.lower().endswith(".gz")
        else path
    )
    try:
        table = pyarrow.parquet.read_table(source)
    except (pyarrow.ArrowException, OSError) as error:
        message = str(error).splitlines()[0]
        raise DataError(f"not a readable Parquet file: {message}", where=str(path)) from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(number, values)


def _read_txt(path: Path) -> Iterator[Row | DataError]:
    """One document: the whole file in the column `text`."""
    with _open_text(path) as file:
        text = file.read()
    if text.strip():
        yield Row(1, {"text": text})


READERS: dict[str, Callable[[Path], Iterator[Row | DataError]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


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


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "…")
