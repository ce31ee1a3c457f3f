"""The formats of data files: JSON Lines, JSON, CSV, TSV, Parquet, Excel and text, each also
compressed.

A reader yields rows, and a `DataError` in the place of a row that cannot be read; it raises what
stops it from reading on. What a file is taken for is told from its content where the ending says
otherwise.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.settings import shown
from edgetune.data.decoding import decoded, unpacked
from edgetune.data.row import Row
from edgetune.data.tables import kept_columns, read_text_table
from edgetune.recipe.paths import file_format

SIGNED = {b"PAR1": ".parquet", b"PK\x03\x04": ".xlsx"}
NAMES = {
    ".jsonl": "JSON Lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    ".xlsx": "Excel",
    ".txt": "text",
}
# an object with one of these is a row, even where it is all of a file
ROW_KEYS = {"text", "messages", "conversations", "prompt", "chosen", "instruction"}
Reader = Callable[..., Iterator[Row | DataError]]


def read_file(path: Path, encoding: str | None, notes: list[str]) -> Iterator[Row | DataError]:
    """The rows of a file. `notes` gets what it was taken for: "CSV", and what is unusual of it."""
    ending = file_format(path) or ".txt"
    data = unpacked(path)
    kind = next((kind for mark, kind in SIGNED.items() if data.startswith(mark)), ending)
    if kind in (".csv", ".tsv") and data.lstrip(b"\xef\xbb\xbf \r\n")[:1] == b"{":
        kind = ".jsonl"
    notes.append(NAMES[kind] + (f", though it is named {ending}" if kind != ending else ""))
    return READERS[kind](data, path=path, encoding=encoding, notes=notes)


def read_lines(data: bytes, name: str) -> list[Row | DataError] | None:
    """The rows of JSON Lines or JSON that comes from no file; None for plain text."""
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"["):
        return None
    return list(_read_json(data, path=Path(name), encoding=None, notes=["JSON Lines"]))


def _text(data: bytes, path: Path, encoding: str | None, notes: list[str]) -> str:
    text, guess = decoded(data, encoding, path)
    if guess:
        notes.append(f"{guess} text (a guess; data.encoding sets it)")
    return text


def _read_json(
    data: bytes, *, path: Path, encoding: str | None, notes: list[str]
) -> Iterator[Row | DataError]:
    """JSON Lines, an array of objects, an object with one such array, or one of columns."""
    text = _text(data, path, encoding, notes)
    whole = _whole(text, path, alone=file_format(path) == ".json")
    if whole is not None:
        rows, note = whole
        notes[:1] = [notes[0].replace("JSON Lines", "JSON") + note]
        for number, value in enumerate(rows, start=1):
            yield _object_row(value, where=f"{path}, item {number}", line=number)
        return
    if file_format(path) == ".json":
        notes[:1] = [notes[0].replace("JSON", "JSON Lines", 1)]
    for line, one in enumerate(io.StringIO(text), start=1):
        if one.strip():
            yield _json_row(one, path=path, line=line)


def _whole(text: str, path: Path, *, alone: bool) -> tuple[list[Any], str] | None:
    """The rows of a text that is one JSON value, and where they stand in it; None for JSON Lines.

    `alone`: the file's ending says that it is one value.
    """
    begin = text.lstrip()[:200]
    is_array = begin.startswith("[") and (alone or begin[1:].lstrip()[:1] == "{")
    if not is_array and not (begin.startswith("{") and not _is_lines(text, alone=alone)):
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not alone:
            return None
        raise DataError(
            f"not valid JSON at column {error.colno}: {error.msg}",
            where=f"{path}, line {error.lineno}",
            expected="an array of objects, an object with one, or one object a line",
        ) from error
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list):
        return value, " (an array)"
    if ROW_KEYS & set(value):
        columns = list(value.values())
    else:
        lists = [key for key, one in value.items() if _is_objects(one)]
        if len(lists) == 1:
            return value[lists[0]], f' (the array "{lists[0]}")'
        columns = list(value.values())
    if columns and all(isinstance(one, dict) for one in columns):  # pandas' default
        keys = list(columns[0])
        if keys and all(list(one) == keys for one in columns):
            return [{name: value[name][key] for name in value} for key in keys], " (columns)"
    if len(columns) > 1 and all(isinstance(one, list) for one in columns):
        alike = len({len(one) for one in columns}) == 1 and not any(map(_is_objects, columns))
        if alike:
            rows = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
            return rows, " (columns)"
    return [value], ""


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _is_lines(text: str, *, alone: bool) -> bool:
    """Whether the first line alone is a value, and is not all there is of a file that is one."""
    lines = (line for line in io.StringIO(text) if line.strip())
    try:
        json.loads(next(lines))
    except (ValueError, RecursionError):
        return False
    return not alone or next(lines, None) is not None


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
    except ValueError:  # Python reads no integer of more than 4,300 digits
        return DataError(
            "a number with too many digits",
            where=where,
            expected="integers of at most 4,300 digits",
            got=_shown(text),
            fix="Write it as a string, or leave such rows out with data.skip_invalid = true.",
        )
    return _object_row(value, where=where, line=line, text=text)


def _object_row(value: Any, *, where: str, line: int, text: str | None = None) -> Row | DataError:
    if isinstance(value, list) and len(value) == 2:  # spaCy's (text, annotations)
        text_of, about = value
        if isinstance(text_of, str) and isinstance(about, dict):
            return Row(line, {"text": text_of, **about})
    if isinstance(value, dict):
        return Row(line, value)
    return DataError(
        "the row is not an object",
        where=where,
        expected='a JSON object such as {"text": "…", "label": "…"}',
        got=_shown(text if text is not None else shown(value)),
    )


def _read_csv(data: bytes, **how: Any) -> Iterator[Row | DataError]:
    return read_text_table(data, usual=",", **how)


def _read_tsv(data: bytes, **how: Any) -> Iterator[Row | DataError]:
    return read_text_table(data, usual="\t", **how)


def _read_parquet(
    data: bytes, *, path: Path, encoding: str | None, notes: list[str]
) -> Iterator[Row | DataError]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        message = str(error).splitlines()[0]
        raise DataError(f"not a readable Parquet file: {message}", where=str(path)) from error
    kept = (table.schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(kept)["info"]["features"]
    except (ValueError, LookupError, TypeError):
        features = {}
    names = class_names(features, notes)
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(number, with_class_names(values, names))


def class_names(features: Any, notes: list[str]) -> dict[str, list[str]]:
    """The names of the classes of every column that holds their numbers, or lists of these, as
    Hugging Face's `datasets` records them.
    """
    found: dict[str, list[str]] = {}
    for column, feature in features.items() if isinstance(features, Mapping) else ():
        inner = feature
        while True:
            if isinstance(inner, list) and len(inner) == 1:
                inner = inner[0]
            elif isinstance(inner, Mapping) and "feature" in inner:
                inner = inner["feature"]
            else:
                break
        if (
            isinstance(inner, Mapping)
            and inner.get("names")
            and "ClassLabel" in str(inner.get("_type", ""))
        ):
            found[column] = [str(name) for name in inner["names"]]
    if found:
        notes.append("names of the classes of " + ", ".join(found))
    return found


def with_class_names(values: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """A row with names in the place of the numbers of classes; -1, which says "none", as null."""

    def named(value: Any, of: list[str]) -> Any:
        if isinstance(value, list):
            return [named(item, of) for item in value]
        if type(value) is not int or value >= len(of):
            return value
        return of[value] if value >= 0 else None

    return {
        column: named(value, names[column]) if column in names else value
        for column, value in values.items()
    }


def _read_xlsx(
    data: bytes, *, path: Path, encoding: str | None, notes: list[str]
) -> Iterator[Row | DataError]:
    """The first sheet of an Excel workbook; its first row names the columns."""
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(
            "reading Excel files needs openpyxl",
            where=str(path),
            fix="Install it (pip install openpyxl), or save the sheet as CSV.",
        ) from error
    try:
        sheets = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True).worksheets
        rows = [list(row) for row in sheets[0].iter_rows(values_only=True)]
    except Exception as error:  # zipfile's, XML's and openpyxl's own have no common class
        raise DataError(f"not a readable Excel file: {error}", where=str(path)) from error
    if len(sheets) > 1:
        notes.append(f'the first of {len(sheets)} sheets, "{sheets[0].title}"')
    there = [at for at, row in enumerate(rows) if any(value is not None for value in row)]
    if not there:
        return
    header, *records = [
        ["" if one is None else str(one).strip() for one in rows[at]] for at in there
    ]
    kept = kept_columns(header, records, path=path, line=there[0] + 1, notes=notes)
    for at in there[1:]:
        yield Row(at + 1, {header[column]: rows[at][column] for column in kept})


def _read_txt(
    data: bytes, *, path: Path, encoding: str | None, notes: list[str]
) -> Iterator[Row | DataError]:
    """One document: the whole file in the column `text`."""
    text = _text(data, path, encoding, notes)
    if text.strip():
        yield Row(1, {"text": text})


READERS: dict[str, Reader] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".xlsx": _read_xlsx,
    ".txt": _read_txt,
}


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "…")
