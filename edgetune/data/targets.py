"""Rows of a text, or two, and a set of labels or a number (`sequence-classification` with
`problem = "multi-label"` or `"regression"`): token ids with float targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.tasks import VALUE
from edgetune.core.text import Text
from edgetune.data.columns import number_in
from edgetune.data.examples import Example, ExampleSet, Labels, Loading, Read, load
from edgetune.data.label_sets import label_reader
from edgetune.data.labels import encode_texts, first_of
from edgetune.data.prompts import PromptFormat, row_text
from edgetune.data.row import Row
from edgetune.data.rows import Rows, convert_rows


@dataclass(frozen=True)
class TargetRow:
    """A text (or two) and what it shall get: a tuple of labels, or a number."""

    line: int
    text: Text
    target: Any
    names: tuple[str, ...] = ()  # of all labels, where the file names them apart from the rows'


@dataclass(slots=True)
class TargetExample(Example):
    """`target`: a 0 or 1 for each label, or one number."""

    target: tuple[float, ...] | float = 0.0


def multi_label_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[TargetRow], int]:
    """Texts with a list of labels each, which may be empty; and how many rows were left out."""
    target, names = label_reader(source, form)
    rows, skipped = _target_rows(source, form, target, skip_invalid=skip_invalid)
    return [replace(row, names=names) for row in rows] if names else rows, skipped


def value_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[TargetRow], int]:
    """Texts with a number each, and how many rows were left out."""
    return _target_rows(
        source,
        form,
        lambda row, where: number_in(row, form.label or "{{ label }}", where=where),
        skip_invalid=skip_invalid,
    )


def _target_rows(
    source: Rows, form: PromptFormat, target: Callable[[Row, str], Any], *, skip_invalid: bool
) -> tuple[list[TargetRow], int]:
    def convert(row: Row, where: str) -> TargetRow:
        return TargetRow(row.line, row_text(form, row.values, where=where), target(row, where))

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_targets(loading: Loading) -> ExampleSet:
    """Texts, longer ones cut to `max_length` tokens, with what the stage's `problem` asks for."""
    if loading.stage.problem == "regression":
        return load_values(loading)
    return load_label_sets(loading)


def load_label_sets(loading: Loading) -> ExampleSet:
    """Texts with a 0 or 1 for each of the labels."""
    labels = Labels(tuple(loading.labels or ()), label_names, unknown_labels)

    def target(row: TargetRow) -> tuple[float, ...]:
        return tuple(float(name in row.target) for name in labels.names)

    return _load(loading, multi_label_rows, target, labels)


def load_values(loading: Loading) -> ExampleSet:
    """Texts with a number each; the head's one label says only that it gives a number."""
    labels = Labels[TargetRow]((VALUE,), label_names, lambda row, source, names: None)
    found = _load(loading, value_rows, lambda row: row.target, labels)
    if len(numbers := {example.target for example in found.train}) == 1:  # type: ignore[attr-defined]
        raise DataError(
            "there is nothing to tell apart",
            where=loading.sources["train"].source,
            expected="at least two different numbers",
            got=f"only {numbers.pop():g}",
        )
    return found


def _load(
    loading: Loading,
    read: Read[TargetRow],
    target: Callable[[TargetRow], tuple[float, ...] | float],
    labels: Labels[TargetRow],
) -> ExampleSet:
    truncated: dict[str, int] = {}

    def encode(name: str, rows: list[TargetRow]) -> list[TargetExample]:
        ids, truncated[name] = encode_texts(
            [row.text for row in rows], loading.tokenizer, limit=loading.limit
        )
        return [
            TargetExample(one, 0, row.line, target=target(row))
            for row, one in zip(rows, ids, strict=True)
        ]

    return replace(load(loading, read, encode, labels=labels), truncated=truncated)


def label_names(rows: Sequence[TargetRow], source: str) -> tuple[str, ...]:
    """The labels that a training file names, else the sorted ones of its rows, of which there must
    be one.
    """
    if rows and rows[0].names:
        return rows[0].names
    names = tuple(sorted({label for row in rows for label in row.target}))
    if not names:
        raise DataError(
            "no row has a label", where=source, expected="at least one label in the file"
        )
    return names


def unknown_labels(
    row: TargetRow,
    source: str,
    names: Sequence[str],
    *,
    what: str = "does not occur in the training rows",
) -> DataError | None:
    """The error for the first label of a row that is not among `names`; None where all are."""
    label = next((label for label in row.target if label not in names), None)
    if label is None:
        return None
    return DataError(
        f'the label "{label}" {what}',
        where=f"{source}, line {row.line}",
        expected=f"some of {first_of(names, 'labels')}",
        fix="Correct the label or add training rows for it.",
    )
