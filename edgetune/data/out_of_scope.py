"""Rows that are none of the labels: what an adapter should answer with nothing."""

from __future__ import annotations

from dataclasses import replace

from edgetune.core.errors import DataError
from edgetune.core.templates import columns_of
from edgetune.data.labels import LabelledRow
from edgetune.data.prompts import PromptFormat, render, row_text
from edgetune.data.row import Row
from edgetune.data.rows import Rows

NO_LABEL = ""  # of such a row, whatever its file calls it


def out_of_scope_rows(
    source: Rows, form: PromptFormat, name: str | None, *, empty: bool
) -> tuple[list[LabelledRow], Rows]:
    """The rows whose label is `name`, and with `empty` those without one; and all others. A row
    without a text is left to the others, whose reader names it.
    """
    found, others = [], []
    for row in source.rows:
        if _is_outside(row, form, name, empty=empty):
            try:
                text = row_text(form, row.values, where="")
            except DataError:
                others.append(row)
                continue
            found.append(LabelledRow(row.line, text, NO_LABEL))
        else:
            others.append(row)
    if found:
        source.note(f"{len(found)} rows count as none of the labels")
    return found, replace(source, rows=others)


def _is_outside(row: Row, form: PromptFormat, name: str | None, *, empty: bool) -> bool:
    template = form.label or "{{ label }}"
    columns = columns_of(template)
    if empty and columns and all(column in row.values for column in columns):
        values = [row.values[column] for column in columns]
        if all(value is None or (isinstance(value, str) and not value.strip()) for value in values):
            return True
    if name is None:
        return False
    try:
        return render(template, row.values, where="", field="label").strip() == name
    except DataError:
        return False
