"""The formats of data files: JSON Lines, CSV, TSV, Parquet and text, each also gzipped.

A reader yields rows, and a `DataError` in the place of a row that cannot be read; it raises what
stops it from reading on.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edgetune.core.errors import DataError


class Row(NamedTuple):
    """One row: its line in the file (from 1; in Parquet the row's number) and its columns."""

    line: int
    values: dict[str, Any]


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


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "…")
