"""Texts become token ids with a class, a set of labels, or a number each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgetune.core.errors import DataError
from edgetune.core.settings import shown
from edgetune.core.tasks import VALUE
from edgetune.core.text import Text, typed
from edgetune.data.batching import Batch, collate
from edgetune.data.examples import Example, ExampleSet, Loading, convert_rows, sample
from edgetune.data.prompts import PromptFormat, render, row_text
from edgetune.data.rows import Row, Rows
from edgetune.data.tagging import FIX, is_text
from edgetune.recipe.checks import column_name

NO_LINE = 0  # of a row that is a label's name and stands in no file


@dataclass(frozen=True)
class LabelledRow:
    """A row as texts: what is classified (a text, or two) and its label."""

    line: int
    text: Text
    label: str


def labelled_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[LabelledRow], int]:
    """Text and label of every row, and how many rows were left out."""
    label = form.label or "{{ label }}"

    def convert(row: Row, where: str) -> LabelledRow:
        rendered = row_text(form, row.values, where=where)
        return LabelledRow(
            row.line, rendered, render(label, row.values, where=where, field="label").strip()
        )

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_labelled(loading: Loading) -> ExampleSet:
    """Labels come from the whole training file, so that `data.limit` never changes the head's
    shape.
    """
    examples, skipped, truncated = {}, {}, {}
    stage, limit = loading.stage, loading.limit
    names = tuple(loading.labels) if loading.labels is not None else None
    for name, source in loading.sources.items():
        rows, unusable = labelled_rows(source, loading.form, skip_invalid=stage.data.skip_invalid)
        if names is None:
            names = _label_names(rows, source=source.source)
        known = [row for row in rows if row.label in names]
        if len(known) < len(rows) and (not stage.data.skip_invalid or not known):
            unknown = next(row for row in rows if row.label not in names)
            raise _unknown_label(unknown, source=source.source, names=names)
        chosen = sample(known, stage.data.limit if name == "train" else None, seed=loading.seed)
        if name == "train" and stage.data.label_names:
            chosen = [*chosen, *(LabelledRow(NO_LINE, readable(label), label) for label in names)]
        examples[name], truncated[name] = _encode_classification(
            chosen, names, loading.tokenizer, limit=limit
        )
        skipped[name] = source.skipped + unusable + len(rows) - len(known)
    return loading.example_set(examples, labels=names, skipped=skipped, truncated=truncated)


def readable(label: str) -> str:
    """A label's name as words: card_arrival and CardArrival become "card arrival" and "Card
    Arrival".
    """
    return re.sub(r"[\s_-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).strip() or label


def _label_names(rows: Iterable[LabelledRow], *, source: str) -> tuple[str, ...]:
    names = tuple(sorted({row.label for row in rows}))
    if len(names) < 2:
        raise DataError(
            "there is nothing to tell apart",
            where=source,
            expected="at least two labels",
            got=f"only {names[0]!r}",
        )
    return names


def _unknown_label(row: LabelledRow, *, source: str, names: tuple[str, ...]) -> DataError:
    shown = ", ".join(names[:8]) + (f" … ({len(names)} labels)" if len(names) > 8 else "")
    return DataError(
        f'the label "{row.label}" does not occur in the training rows',
        where=f"{source}, line {row.line}",
        expected=f"one of {shown}",
        fix="Correct the label or add training rows for it.",
    )


def _encode_classification(
    rows: Sequence[LabelledRow], names: tuple[str, ...], tokenizer: Any, *, limit: int
) -> tuple[list[Example], int]:
    """Examples and how many were cut to `limit` tokens (special tokens stay)."""
    encoded, cut = encode_texts([row.text for row in rows], tokenizer, limit=limit)
    index = {name: number for number, name in enumerate(names)}
    return [
        Example(ids, index[row.label], row.line) for row, ids in zip(rows, encoded, strict=True)
    ], cut


def encode_texts(
    texts: Sequence[Text], tokenizer: Any, *, limit: int
) -> tuple[list[list[int]], int]:
    """Token ids of each text, or of two, and how many were cut to `limit` tokens (special tokens
    stay).

    Of two texts the longer one is cut first; their ids say where the second begins (`PairIds`) as
    the tokenizer's types do.
    """
    encoded = _encode(texts, tokenizer, truncation=True, max_length=limit)
    at_limit = [text for text, ids in zip(texts, encoded, strict=True) if len(ids) == limit]
    whole = _encode(at_limit, tokenizer, truncation=False) if at_limit else []
    return encoded, sum(len(ids) > limit for ids in whole)


def _encode(texts: Sequence[Text], tokenizer: Any, **settings: Any) -> list[list[int]]:
    if not texts or isinstance(texts[0], str):
        ids: list[list[int]] = tokenizer(list(texts), verbose=False, **settings)["input_ids"]
        return ids
    first, second = zip(*texts, strict=True)
    found = tokenizer(
        list(first), list(second), return_token_type_ids=True, verbose=False, **settings
    )
    return [
        typed(row, types)
        for row, types in zip(found["input_ids"], found["token_type_ids"], strict=True)
    ]


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


def multi_label_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[TargetRow], int]:
    """Texts with a list of labels each, which may be empty; and how many rows were left out."""
    column = column_name(form.label or "label") or "label"
    return _rows(
        source,
        form,
        lambda row, where: _labels_of(row, column, where=where),
        skip_invalid=skip_invalid,
    )


def value_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[TargetRow], int]:
    """Texts with a number each, and how many rows were left out."""
    return _rows(
        source,
        form,
        lambda row, where: _value_of(row, form.label or "{{ label }}", where=where),
        skip_invalid=skip_invalid,
    )


def load_targets(loading: Loading) -> ExampleSet:
    """The examples of a multi-label or regression stage; labels are the sorted ones of the whole
    training file.
    """
    stage = loading.stage
    read = multi_label_rows if stage.problem == "multi-label" else value_rows
    examples: dict[str, list[Any]] = {}
    skipped, truncated = {}, {}
    names = (
        (VALUE,)
        if stage.problem == "regression"
        else tuple(loading.labels)
        if loading.labels is not None
        else None
    )
    for name, source in loading.sources.items():
        rows, unusable = read(source, loading.form, skip_invalid=stage.data.skip_invalid)
        if names is None:
            names = tuple(sorted({label for row in rows for label in row.target}))
            if not names:
                raise DataError(
                    "no row has a label",
                    where=source.source,
                    expected="at least one label in the file",
                )
        known = (
            rows
            if stage.problem == "regression"
            else [row for row in rows if set(row.target) <= set(names)]
        )
        if len(known) < len(rows) and (not stage.data.skip_invalid or not known):
            raise unknown_label(
                next(row for row in rows if not set(row.target) <= set(names)), source.source, names
            )
        chosen = sample(known, stage.data.limit if name == "train" else None, seed=loading.seed)
        ids, truncated[name] = encode_texts(
            [row.text for row in chosen], loading.tokenizer, limit=loading.limit
        )
        examples[name] = [
            _example(row, one, names, stage.problem) for row, one in zip(chosen, ids, strict=True)
        ]
        skipped[name] = source.skipped + unusable + len(rows) - len(known)
    return loading.example_set(examples, labels=names, skipped=skipped, truncated=truncated)


def collate_targets(examples: Sequence[Any], pad_id: int) -> Batch:
    """A batch with float targets: (rows, labels), or (rows,) numbers."""
    labels = torch.tensor([example.target for example in examples], dtype=torch.float32)
    return replace(collate(examples, pad_id), labels=labels)


def unknown_label(
    row: TargetRow,
    source: str,
    names: Sequence[str],
    *,
    what: str = "does not occur in the training rows",
) -> DataError:
    """The error for a label that is not among `names`."""
    label = next(label for label in row.target if label not in names)
    known = ", ".join(names[:8]) + (f" … ({len(names)} labels)" if len(names) > 8 else "")
    return DataError(
        f'the label "{label}" {what}',
        where=f"{source}, line {row.line}",
        expected=f"some of {known}",
        fix="Correct the label or add training rows for it.",
    )


def _example(row: TargetRow, ids: list[int], names: Sequence[str], problem: str) -> TargetExample:
    target = (
        row.target
        if problem == "regression"
        else tuple(float(name in row.target) for name in names)
    )
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
            f'there is no column "{column}"',
            where=where,
            expected='a list of labels such as ["price", "service"]',
            got="the columns " + (", ".join(row.values) or "(none)"),
            fix="Set data.label to the column that holds them.",
        )
    value = row.values[column]
    if not isinstance(value, list):
        raise DataError(
            f'the column "{column}" is no list of labels',
            where=where,
            expected='a list such as ["price", "service"], or [] for none',
            got=f"{type(value).__name__} {shown(value)}",
            fix=FIX,
        )
    for at, label in enumerate(value):
        if not (type(label) is int or (is_text(label) and label.strip())):
            got = f"{type(label).__name__} {shown(label)}"
            raise DataError(
                f"{column}[{at}] cannot be used",
                where=where,
                expected="a string or an integer",
                got=got,
                fix=FIX,
            )
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
        raise DataError(
            "the label is no number",
            where=where,
            expected="a finite number such as 3.5",
            got=f"{type(value).__name__} {shown(value)}",
            fix=FIX,
        )
    return number
