"""Texts and labels become token ids with a class each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.data import Row, Rows
from edgetune.errors import DataError
from edgetune.examples.common import Example, ExampleSet, Loading, convert_rows, sample
from edgetune.prompts import PromptFormat, render, row_text
from edgetune.text_pairs import Text, typed

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
        return LabelledRow(row.line, rendered, render(label, row.values, where=where, field="label").strip())

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_labelled(loading: Loading) -> ExampleSet:
    """Labels come from the whole training file, so that `data.limit` never changes the head's shape."""
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
        examples[name], truncated[name] = _encode_classification(chosen, names, loading.tokenizer, limit=limit)
        skipped[name] = source.skipped + unusable + len(rows) - len(known)
    return loading.example_set(examples, labels=names, skipped=skipped, truncated=truncated)


def readable(label: str) -> str:
    """A label's name as words: card_arrival and CardArrival become "card arrival" and "Card Arrival"."""
    return re.sub(r"[\s_-]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).strip() or label


def _label_names(rows: Iterable[LabelledRow], *, source: str) -> tuple[str, ...]:
    names = tuple(sorted({row.label for row in rows}))
    if len(names) < 2:
        raise DataError(
            "there is nothing to tell apart", where=source, expected="at least two labels", got=f"only {names[0]!r}"
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
    return [Example(ids, index[row.label], row.line) for row, ids in zip(rows, encoded, strict=True)], cut


def encode_texts(texts: Sequence[Text], tokenizer: Any, *, limit: int) -> tuple[list[list[int]], int]:
    """Token ids of each text, or of two, and how many were cut to `limit` tokens (special tokens stay).

    Of two texts the longer one is cut first; their ids say where the second begins (`PairIds`) as the tokenizer's types do.
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
    found = tokenizer(list(first), list(second), return_token_type_ids=True, verbose=False, **settings)
    return [typed(row, types) for row, types in zip(found["input_ids"], found["token_type_ids"], strict=True)]
