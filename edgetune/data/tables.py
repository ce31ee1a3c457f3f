"""Delimited text (CSV, TSV): the delimiter is found, unnamed index columns are passed over, and a
quote that swallows lines is noticed.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.settings import shown
from edgetune.data.decoding import decoded
from edgetune.data.row import Row

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
NEWLINE = re.compile(r"\r\n|\r|\n")
LOOKED_AT = 50  # records
FIX = "Put fields that contain the separator in double quotes."


def read_table(text: str, *, path: Path, usual: str, notes: list[str]) -> Iterator[Row | DataError]:
    """The rows of a table whose first line names the columns; `usual` is its ending's delimiter."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    first_line = 1
    if said := re.match(r"sep=(.)\r?\n", text):  # Excel's
        text, usual, first_line = text[said.end() :], said[1], 2
    delimiter = usual if said else _delimiter(text, usual)
    if delimiter != usual:
        notes.append(f"{DELIMITERS[delimiter]} between its fields")
    quoting = _quoting(text, delimiter)
    if quoting == csv.QUOTE_NONE:
        notes.append("quotes taken as characters, for they do not match")
    records = _records(text, delimiter, quoting=quoting, path=path, line=first_line)
    named_at, header = next(records, (1, []))
    header = [name.strip() for name in header]
    rest = list(records)
    kept = kept_columns(
        header, [fields for _, fields in rest], path=path, line=named_at, notes=notes
    )
    swallowed = _Swallowed(header, delimiter, [fields for _, fields in rest])
    lines = NEWLINE.split(text) if quoting != csv.QUOTE_NONE and '"' in text else []
    for line, fields in rest:
        count = 1 + sum(len(NEWLINE.findall(field)) for field in fields)
        alone = lines[line - first_line : line - first_line + count] if count > 1 else []
        yield swallowed.error(line, alone, path=path) or _row(
            header, fields, kept, path=path, line=line
        )


def _records(
    text: str, delimiter: str, *, quoting: Any, path: Path, line: int
) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of every record that is not blank."""
    header_line = text[: text.find("\n")] if "\n" in text else text
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        quoting=quoting,
        skipinitialspace=bool(re.search(re.escape(delimiter) + r" +\S", header_line))
        and delimiter != "\t",
    )
    first = line
    try:
        for fields in reader:
            if fields:
                yield first, fields
            first = reader.line_num + line
    except csv.Error as error:
        raise DataError(
            f"damaged table: {error}",
            where=f"{path}, line {first}",
            fix="Correct the quoting of this row: a quote inside a quoted field is written twice.",
        ) from error


def _delimiter(text: str, usual: str) -> str:
    """The delimiter that gives the header several names and most records as many fields."""
    scores: dict[str, tuple[float, int, bool]] = {}
    for delimiter in DELIMITERS:
        counts: list[int] = []
        try:
            for fields in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
                counts += [len(fields)] if fields else []
                if len(counts) > LOOKED_AT:
                    break
        except csv.Error:
            continue
        if counts and counts[0] > 1:
            alike = sum(count == counts[0] for count in counts) / len(counts)
            scores[delimiter] = (alike, counts[0], delimiter == usual)
    if usual in scores and scores[usual][0] >= 0.5:
        return usual
    return max(scores, key=lambda one: scores[one]) if scores else usual


def _quoting(text: str, delimiter: str) -> Any:
    """Whether quotes are quotes: in tables with tabs or bars they may be mere characters."""
    if delimiter not in "\t|" or '"' not in text:
        return csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        fits = len({len(fields) for fields in reader if fields}) == 1
    except csv.Error:
        fits = False
    plain = {line.count(delimiter) for line in text.splitlines() if line}
    return csv.QUOTE_NONE if not fits and len(plain) == 1 else csv.QUOTE_MINIMAL


def kept_columns(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    path: Path,
    line: int,
    notes: list[str],
) -> list[int]:
    """The places of the columns that have names; a first one without is an index, later ones must
    be empty. DataError for one that is not, and for a name that stands twice. `line`: the header's.
    """
    if not any(header):
        raise _unnamed(header, 0, f"{path}, line {line}")
    for at, name in enumerate(header):
        if name:
            continue
        if at == 0:
            notes.append("a first column without a name left out")
        elif any(len(fields) > at and fields[at].strip() for fields in rows):
            raise _unnamed(header, at, f"{path}, line {line}")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(
            f'the column "{twice[0]}" appears twice',
            where=f"{path}, line {line}",
            fix="Rename one of them.",
        )
    return [at for at, name in enumerate(header) if name]


def _unnamed(header: Sequence[str], at: int, where: str) -> DataError:
    return DataError(
        f"column {at + 1} has no name",
        where=where,
        expected="a first line with the columns' names",
        got=shown(",".join(header)),
        fix="Name it there, or delete it; what stands above the names must go.",
    )


def _row(
    header: list[str], fields: list[str], kept: list[int], *, path: Path, line: int
) -> Row | DataError:
    while len(fields) > len(header) and not fields[-1].strip():
        fields = fields[:-1]
    wanted = kept[-1] + 1  # empty columns without a name may be missing at the end
    if not wanted <= len(fields) <= len(header):
        return DataError(
            "wrong number of fields",
            where=f"{path}, line {line}",
            expected=f"{len(kept)} ({', '.join(header[at] for at in kept)})",
            got=str(len(fields)),
            fix=FIX,
        )
    return Row(line, {header[at]: fields[at] for at in kept})


class _Swallowed:
    """Tells a quoted field of several lines from a stray quote that made one row of several.

    It is stray where every line alone has the header's number of fields, and some column would take
    values that it takes in other rows too.
    """

    def __init__(self, header: list[str], delimiter: str, rows: list[list[str]]) -> None:
        self._width, self._delimiter = len(header), delimiter
        whole = [fields for fields in rows if len(fields) == len(header)]
        self._values = [{fields[at].strip() for fields in whole} for at in range(len(header))]

    def error(self, line: int, lines: list[str], *, path: Path) -> DataError | None:
        """Why the record of these `lines` is several rows; None where it is one."""
        count = len(lines)
        alone = [[part.strip().strip('"') for part in one.split(self._delimiter)] for one in lines]
        if not alone:
            return None
        if any(len(parts) != self._width for parts in alone):
            return None
        if not any(
            all(parts[at] in values for parts in alone) for at, values in enumerate(self._values)
        ):
            return None
        return DataError(
            f"a quote that opens here closes {count - 1} lines later, so that {count} lines, each"
            " like a row, would be one",
            where=f"{path}, line {line}",
            got=shown(lines[0]),
            fix="Correct the quoting: a field is quoted at both ends, a quote in it written twice.",
        )


def read_text_table(
    data: bytes, *, path: Path, encoding: str | None, usual: str, notes: list[str]
) -> Iterator[Row | DataError]:
    """`read_table` of bytes."""
    text, guess = decoded(data, encoding, path)
    if guess:
        notes.append(f"{guess} text (a guess; data.encoding sets it)")
    return read_table(text, path=path, usual=usual, notes=notes)
