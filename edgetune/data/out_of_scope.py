"""Rows that are none of the labels: what an adapter should answer with nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgetune.core.errors import DataError
from edgetune.core.tasks import CLASSIFICATION
from edgetune.core.templates import columns_of
from edgetune.data.labels import LabelledRow
from edgetune.data.prompts import PromptFormat, render, row_text
from edgetune.data.row import Row
from edgetune.data.rows import Rows
from edgetune.recipe.schema import Recipe

NO_LABEL = ""  # of such a row, whatever its file calls it


def outside_label(recipe: Recipe) -> str | None:
    """The label that a recipe's rows have which are none of its labels; "" where only rows without
    one are meant; None where there are no such rows.
    """
    asked, stage = recipe.confidence, recipe.stage[-1]
    if asked is None or stage.learned != CLASSIFICATION:
        return None
    return (asked.out_of_scope or NO_LABEL) if asked.has_threshold or asked.out_of_scope else None


def without_outside(
    sources: Mapping[str, Rows], form: PromptFormat, label: str
) -> tuple[dict[str, Rows], list[LabelledRow]]:
    """The rows of train and validation that have a label, and those of validation that are none of
    them; of train such rows teach nothing and are left out.
    """
    found = dict(sources)
    _, found["train"] = out_of_scope_rows(sources["train"], form, label or None, empty=False)
    if "validation" not in sources:
        return found, []
    outside, found["validation"] = out_of_scope_rows(
        sources["validation"], form, label or None, empty=True
    )
    return found, outside


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
