"""Rows of a text, or two, and one label (`sequence-classification`): token ids with a class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.text import Text, typed
from edgetune.data.examples import Example, ExampleSet, Labels, Loading, load
from edgetune.data.prompts import PromptFormat, render, row_text
from edgetune.data.row import Row
from edgetune.data.rows import Rows, convert_rows

NO_LINE = 0  # of a row that stands in no file, such as a label's name


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
    """Texts, longer ones cut to `max_length` tokens, with the place of their label among all
    labels.
    """
    truncated: dict[str, int] = {}
    labels = Labels(tuple(loading.labels or ()), label_names, unknown_label)

    def encode(name: str, rows: list[LabelledRow]) -> list[Example]:
        if name == "train" and loading.stage.data.label_names:
            rows = [*rows, *(LabelledRow(NO_LINE, readable(one), one) for one in labels.names)]
        ids, truncated[name] = encode_texts(
            [row.text for row in rows], loading.tokenizer, limit=loading.limit
        )
        place = {label: at for at, label in enumerate(labels.names)}
        return [
            Example(one, place[row.label], row.line) for row, one in zip(rows, ids, strict=True)
        ]

    found = load(loading, labelled_rows, encode, labels=labels)
    return replace(found, truncated=truncated)


def readable(label: str) -> str:
    """A label's name as words: card_arrival and CardArrival become "card arrival" and "Card
    Arrival".
    """
    return re.sub(r"[\s_-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).strip() or label


def label_names(rows: Sequence[LabelledRow], source: str) -> tuple[str, ...]:
    """The sorted labels of a training file, of which there must be two."""
    return two_or_more({row.label for row in rows}, "labels", source)


def two_or_more(found: set[str], what: str, source: str) -> tuple[str, ...]:
    """These labels (or tags) in order; a DataError for a single one."""
    names = tuple(sorted(found))
    if len(names) < 2:
        raise DataError(
            "there is nothing to tell apart",
            where=source,
            expected=f"at least two {what}",
            got=f"only {names[0]!r}",
        )
    return names


def unknown_label(row: LabelledRow, source: str, names: Sequence[str]) -> DataError | None:
    """The error for a row whose label is not among `names`; None where it is."""
    if row.label in names:
        return None
    return DataError(
        f'the label "{row.label}" does not occur in the training rows',
        where=f"{source}, line {row.line}",
        expected=f"one of {first_of(names, 'labels')}",
        fix="Correct the label or add training rows for it.",
    )


def first_of(names: Sequence[str], what: str) -> str:
    """Eight of the names for an error, and how many `what` (labels, tags) there are if more."""
    return ", ".join(names[:8]) + (f" … ({len(names)} {what})" if len(names) > 8 else "")


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
