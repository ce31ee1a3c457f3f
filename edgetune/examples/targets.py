"""Texts with any number of labels, or with a number, become token ids with targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgetune.batching import Batch, collate
from edgetune.data import Row, Rows
from edgetune.errors import DataError
from edgetune.examples.classification import encode_texts
from edgetune.examples.common import Example, ExampleSet, Loading, convert_rows, sample
from edgetune.examples.tagging import FIX, is_text, shown
from edgetune.problems import VALUE
from edgetune.prompts import PromptFormat, render, row_text
from edgetune.recipe_checks import column_name
from edgetune.text_pairs import Text


@dataclass(frozen=True)
class TargetRow:
    """A text (or two) and what it shall get: a tuple of labels, or a number."""

    line: int
    text: Text
    target: Any


@dataclass(slots=True)
class TargetExample(Example):
    """`target`: a 0 or 1 for each label, or one number."""

    target: tuple[float, ...] | float = 0.0


def multi_label_rows(source: Rows, form: PromptFormat, *, skip_invalid: bool = False) -> tuple[list[TargetRow], int]:
    """Texts with a list of labels each, which may be empty; and how many rows were left out."""
    column = column_name(form.label or "label") or "label"
    return _rows(source, form, lambda row, where: _labels_of(row, column, where=where), skip_invalid=skip_invalid)


def value_rows(source: Rows, form: PromptFormat, *, skip_invalid: bool = False) -> tuple[list[TargetRow], int]:
    """Texts with a number each, and how many rows were left out."""
    return _rows(source, form, lambda row, where: _value_of(row, form.label or "{{ label }}", where=where), skip_invalid=skip_invalid)


def load_targets(loading: Loading) -> ExampleSet:
    """The examples of a multi-label or regression stage; labels are the sorted ones of the whole training file."""
    stage = loading.stage
    read = multi_label_rows if stage.problem == "multi-label" else value_rows
    examples: dict[str, list[Any]] = {}
    skipped, truncated = {}, {}
    names = (VALUE,) if stage.problem == "regression" else tuple(loading.labels) if loading.labels is not None else None
    for name, source in loading.sources.items():
        rows, unusable = read(source, loading.form, skip_invalid=stage.data.skip_invalid)
        if names is None:
            names = tuple(sorted({label for row in rows for label in row.target}))
            if not names:
                raise DataError("no row has a label", where=source.source, expected="at least one label in the file")
        known = rows if stage.problem == "regression" else [row for row in rows if set(row.target) <= set(names)]
        if len(known) < len(rows) and (not stage.data.skip_invalid or not known):
            raise unknown_label(next(row for row in rows if not set(row.target) <= set(names)), source.source, names)
        chosen = sample(known, stage.data.limit if name == "train" else None, seed=loading.seed)
        ids, truncated[name] = encode_texts([row.text for row in chosen], loading.tokenizer, limit=loading.limit)
        examples[name] = [_example(row, one, names, stage.problem) for row, one in zip(chosen, ids, strict=True)]
        skipped[name] = source.skipped + unusable + len(rows) - len(known)
    return loading.example_set(examples, labels=names, skipped=skipped, truncated=truncated)


def collate_targets(examples: Sequence[Any], pad_id: int) -> Batch:
    """A batch with float targets: (rows, labels), or (rows,) numbers."""
    labels = torch.tensor([example.target for example in examples], dtype=torch.float32)
    return replace(collate(examples, pad_id), labels=labels)


def unknown_label(row: TargetRow, source: str, names: Sequence[str], *, what: str = "does not occur in the training rows") -> DataError:
    """The error for a label that is not among `names`."""
    label = next(label for label in row.target if label not in names)
    known = ", ".join(names[:8]) + (f" … ({len(names)} labels)" if len(names) > 8 else "")
    return DataError(
        f'the label "{label}" {what}', where=f"{source}, line {row.line}", expected=f"some of {known}",
        fix="Correct the label or add training rows for it.",
    )  # fmt: skip


def _example(row: TargetRow, ids: list[int], names: Sequence[str], problem: str) -> TargetExample:
    target = row.target if problem == "regression" else tuple(float(name in row.target) for name in names)
    return TargetExample(ids, 0, row.line, target=target)


def _rows(
    source: Rows, form: PromptFormat, target: Callable[[Row, str], Any], *, skip_invalid: bool
) -> tuple[list[TargetRow], int]:
    def convert(row: Row, where: str) -> TargetRow:
        return TargetRow(row.line, row_text(form, row.values, where=where), target(row, where))

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def _labels_of(row: Row, column: str, *, where: str) -> tuple[str, ...]:
    """The column's labels, each once."""
    if column not in row.values:
        raise DataError(
            f'there is no column "{column}"', where=where, expected='a list of labels such as ["price", "service"]',
            got="the columns " + (", ".join(row.values) or "(none)"), fix="Set data.label to the column that holds them.",
        )  # fmt: skip
    value = row.values[column]
    if not isinstance(value, list):
        raise DataError(
            f'the column "{column}" is no list of labels', where=where, expected='a list such as ["price", "service"], or [] for none',
            got=f"{type(value).__name__} {shown(value)}", fix=FIX,
        )  # fmt: skip
    for at, label in enumerate(value):
        if not (type(label) is int or (is_text(label) and label.strip())):
            got = f"{type(label).__name__} {shown(label)}"
            raise DataError(f"{column}[{at}] cannot be used", where=where, expected="a string or an integer", got=got, fix=FIX)
    return tuple(dict.fromkeys(str(label).strip() for label in value))


def _value_of(row: Row, template: str, *, where: str) -> float:
    """A number: the column's own, or the one that the template spells."""
    column = column_name(template)
    value = row.values.get(column) if column is not None else None
    if value is None or isinstance(value, str) or column is None:
        value = render(template, row.values, where=where, field="label")
    try:
        number = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError("the label is no number", where=where, expected="a finite number such as 3.5", got=f"{type(value).__name__} {shown(value)}", fix=FIX)
    return number
