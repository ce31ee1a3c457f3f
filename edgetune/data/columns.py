"""Columns that hold no text but a list of words, tags or labels, or a number."""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Callable, Mapping
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.numbers import point_of
from edgetune.core.settings import shown
from edgetune.core.templates import column_reference
from edgetune.data.prompts import render
from edgetune.data.row import Row
from edgetune.recipe.checks import column_name

FIX = "Correct the row, or leave such rows out with data.skip_invalid = true."
NEIGHBOURS = re.compile(r"""['"]\s+['"]""")  # strings without a comma between
WORDS_AND_TAGS = "Set data.tokens and data.tags to the columns that hold words and tags."


def spelled_list(text: str) -> list[Any] | None:
    """The list that a text in brackets spells, as JSON, Python or numpy; None where it is none."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, _python, _numpy):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found
    return None


def _python(text: str) -> Any:
    """A list as Python prints it. Of numpy's, which has no commas, Python would make one string."""
    if not NEIGHBOURS.search(text):
        return ast.literal_eval(text)
    try:
        parts = [*tokenize.generate_tokens(io.StringIO(text).readline)]
    except tokenize.TokenError as error:
        raise ValueError(str(error)) from error
    if any(part.string == "," for part in parts):
        return ast.literal_eval(text)
    return [ast.literal_eval(part.string) for part in parts if part.type == tokenize.STRING]


def _numpy(text: str) -> list[int]:
    """`[0 1 0]`, as numpy prints an array."""
    return [int(part) for part in text[1:-1].split()]


def as_lists(values: Mapping[str, Any], *columns: str) -> Mapping[str, Any]:
    """A row's values with lists in columns that all hold texts that spell them: in brackets, as
    tables hold lists, or with spaces between the words; as it is where some are no text.
    """
    texts = [values.get(column) for column in columns]
    if not all(isinstance(text, str) for text in texts):
        return values
    lists = [spelled_list(str(text).strip()) for text in texts]
    if None in lists:
        lists = [str(text).split() for text in texts]
    return {**values, **dict(zip(columns, lists, strict=True))}


def words_in(row: Row, column: str, *, where: str) -> list[str]:
    """The column's words; an empty list is a DataError."""
    return _strings_in(
        row,
        column,
        "words",
        where=where,
        such_as='["New", "York"]',
        usable=_is_text,
        item="a string",
        fix=WORDS_AND_TAGS,
    )


def tags_in(row: Row, column: str, *, where: str) -> list[str]:
    """The column's tags, integers as their digits; an empty list is a DataError."""
    return _strings_in(
        row,
        column,
        "tags",
        where=where,
        such_as='["B-place", "I-place"]',
        usable=lambda tag: type(tag) is int or (_is_text(tag) and tag != ""),
        fix=WORDS_AND_TAGS,
    )


def labels_in(row: Row, column: str, *, where: str) -> tuple[str, ...]:
    """The column's labels, each once, integers as their digits."""
    labels = _strings_in(
        row,
        column,
        "labels",
        where=where,
        such_as='["price", "service"]',
        usable=lambda label: type(label) is int or (_is_text(label) and label.strip() != ""),
        fix="Set data.label to the column that holds them.",
        may_be_empty=True,
    )
    return tuple(dict.fromkeys(label.strip() for label in labels))


def _strings_in(
    row: Row,
    column: str,
    what: str,
    *,
    where: str,
    such_as: str,
    usable: Callable[[Any], bool],
    item: str = "a string or an integer",
    fix: str,
    may_be_empty: bool = False,
) -> list[str]:
    """The column's list as strings; `fix` says what to do where there is no such column."""
    if column not in row.values:
        raise DataError(
            f'there is no column "{column}"',
            where=where,
            expected=f"a list {'of labels ' if may_be_empty else ''}such as {such_as}",
            got="the columns " + (", ".join(row.values) or "(none)"),
            fix=fix,
        )
    value = row.values[column]
    if not isinstance(value, list) or not (value or may_be_empty):
        raise DataError(
            f'the column "{column}" is no list of {what}',
            where=where,
            expected=f"a list such as {such_as}{', or [] for none' if may_be_empty else ''}",
            got="an empty list" if value == [] else _described(value),
            fix=FIX,
        )
    for at, one in enumerate(value):
        if not usable(one):
            raise DataError(
                f"{column}[{at}] cannot be used",
                where=where,
                expected=item,
                got=_described(one),
                fix=FIX,
            )
    return [str(one) for one in value]


def number_in(row: Row, template: str, *, where: str) -> float:
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
            got=_described(value),
            fix=_spelled_otherwise(value, template) or FIX,
        )
    return number


def _spelled_otherwise(value: Any, template: str) -> str:
    """How the label is read where it is a number in another spelling; "" where it is none."""
    point, column = point_of([str(value)]), column_name(template)
    if point is None or column is None:
        return ""
    read = "number(',')" if point == "," else "number"
    return f"Read it by data.label = {column_reference(column)[:-3]} | {read} }}}}."


def _is_text(item: Any) -> bool:
    """A string without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return isinstance(item, str) and item.encode(errors="ignore").decode() == item


def _described(value: Any) -> str:
    """A value of a row for an error: its type and itself, cut to 60 characters."""
    return f"{type(value).__name__} {shown(value)}"
