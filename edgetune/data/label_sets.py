"""Several labels of a row as people write them: a list, a vector of 0 and 1, a cell of text, or
columns of 0 and 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.settings import shown
from edgetune.core.templates import columns_of
from edgetune.data.columns import FIX, labels_in, spelled_list
from edgetune.data.prompts import PromptFormat
from edgetune.data.row import Row
from edgetune.data.rows import Rows
from edgetune.recipe.checks import column_name

BIT_VALUES = {"0": False, "1": True, "false": False, "true": True, "0.0": False, "1.0": True}
Read = Callable[[Row, str], tuple[str, ...]]
Names = tuple[str, ...]


def label_reader(source: Rows, form: PromptFormat) -> tuple[Read, Names]:
    """How a row's labels are read, (row, place) → labels, and the names of all labels where the
    file says them without a row that has them. DataError where none of the ways fits.
    """
    columns = _columns(form)
    if columns is None:
        column = column_name(form.label or "label") or "label"
        if column not in source.rows[0].values:
            columns = _bit_columns(source, form)
            if columns:
                source.note("a label each: the columns " + ", ".join(columns))
        if not columns:
            return _of_column(source, column)
    return lambda row, where: _named_bits(row, columns or (), where=where), columns


def _columns(form: PromptFormat) -> tuple[str, ...] | None:
    """The columns that data.label lists; None where it names one that holds the labels."""
    if form.label is None or not form.label.startswith("["):
        return None
    return tuple(json.loads(form.label))


def _bit_columns(source: Rows, form: PromptFormat) -> tuple[str, ...]:
    """The columns of which every row has 0 or 1, where there are two at least."""
    read = {name for text in (form.text, form.text_pair) if text for name in columns_of(text)}
    first = source.rows[0].values
    found = tuple(
        name
        for name in first
        if name not in read and all(_bit(row.values.get(name)) is not None for row in source.rows)
    )
    return found if len(found) > 1 else ()


def _named_bits(row: Row, columns: Sequence[str], *, where: str) -> tuple[str, ...]:
    found = []
    for name in columns:
        bit = _bit(row.values.get(name))
        if bit is None:
            raise DataError(
                f'the column "{name}" is no label',
                where=where,
                expected="0 or 1",
                got=shown(row.values.get(name)) if name in row.values else "no such column",
                fix=FIX,
            )
        found += [name] if bit else []
    return tuple(found)


def _of_column(source: Rows, column: str) -> tuple[Read, Names]:
    """Labels of one column: a list of them, a vector of 0 and 1, or text."""
    cells = [cell_labels(row.values.get(column)) for row in source.rows]
    lists = [cell for cell in cells if isinstance(cell, list)]
    sizes = {len(cell) for cell in lists}
    bits = all(not isinstance(one, str) and _bit(one) is not None for cell in lists for one in cell)
    is_vector = len(sizes) == 1 and min(sizes) > 1 and bits and len(lists) == len(cells)
    if is_vector:
        source.note(
            f'"{column}" holds vectors of 0 and 1: a label is named by its place, 0 to'
            f" {min(sizes) - 1}"
        )
        names = tuple(str(at) for at in range(min(sizes)))
        return lambda row, where: tuple(
            name
            for name, one in zip(names, cell_labels(row.values[column]), strict=True)
            if _bit(one)
        ), names

    def read(row: Row, where: str) -> tuple[str, ...]:
        values = dict(row.values)
        if isinstance(values.get(column), str):
            source.note(f'several labels in a cell of "{column}"')
            values[column] = cell_labels(values[column])
        return labels_in(Row(row.line, values), column, where=where)

    return read, ()


def cell_labels(value: Any) -> Any:
    """The list that a text spells, as JSON, as Python or with | ; or , between labels."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if (found := spelled_list(text)) is not None:
        return found
    parts = re.split(r"[|;]" if re.search(r"[|;]", text) else ",", text)
    return [part.strip() for part in parts if part.strip()]


def _bit(value: Any) -> bool | None:
    """0 or 1 in any spelling; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    return BIT_VALUES.get(value.strip().lower()) if isinstance(value, str) else None
