"""Raw text becomes packed sequences: documents one after the other, every sequence full, none padded.

A document ends with the end-of-text token; its tokens see no other document (their positions start again at 0). One
that runs over the end of a sequence is cut there, and goes on in the next with its last token repeated, so that every
token of a document but the first is predicted exactly once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgetune.data import Row, Rows
from edgetune.errors import BaseModelError, DataError
from edgetune.examples.common import IGNORED, Example, ExampleSet, Loading, convert_rows, subset
from edgetune.prompts import PromptFormat, render


@dataclass(frozen=True)
class TextRow:
    """A row as a document."""

    line: int
    text: str


def text_rows(source: Rows, form: PromptFormat, *, skip_invalid: bool = False) -> tuple[list[TextRow], int]:
    """The text of every row, and how many rows were left out."""
    template = form.text or "{{ text }}"

    def convert(row: Row, where: str) -> TextRow:
        return TextRow(row.line, render(template, row.values, where=where, field="text"))

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_packed(loading: Loading) -> ExampleSet:
    """Sequences of `max_length` tokens; the training documents are shuffled with the seed before they are packed."""
    stage, examples, skipped = loading.stage, {}, {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = text_rows(source, loading.form, skip_invalid=stage.data.skip_invalid)
        documents = encode_documents(rows, loading.tokenizer)
        if name == "train":
            random.Random(loading.seed).shuffle(documents)
        examples[name] = pack(documents, loading.limit)
        skipped[name] = loading.sources[name].skipped + unusable
        if not examples[name]:
            raise DataError("there is no text to learn from", where=source.source, expected="at least two tokens")
    return loading.example_set(examples, skipped=skipped)


def encode_documents(rows: Iterable[TextRow], tokenizer: Any) -> list[tuple[int, list[int]]]:
    """(line, token ids) of every document: the tokenizer's own beginning, the text, the end-of-text token."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError("the base's tokenizer has no end-of-text token", expected="eos_token in tokenizer_config.json")
    rows = list(rows)
    encoded = tokenizer([row.text for row in rows], verbose=False)["input_ids"]
    return [(row.line, ids if ids[-1:] == [end] else [*ids, end]) for row, ids in zip(rows, encoded, strict=True)]


def pack(documents: Iterable[tuple[int, list[int]]], length: int) -> list[Example]:
    """Sequences of `length` tokens (or one less; the last may be shorter), with labels on all but a piece's first token."""
    packed: list[Example] = []
    current: Example | None = None
    for line, ids in documents:
        start = 0
        while start < len(ids) - 1:
            if current is None or length - len(current.input_ids) < 2:  # a piece of one token would predict nothing
                current = Example([], [], line, [])
                packed.append(current)
            piece = ids[start : start + length - len(current.input_ids)]
            _append(current, piece)
            start += len(piece) - 1
    return packed


def _append(example: Example, piece: list[int]) -> None:
    assert isinstance(example.labels, list) and example.position_ids is not None
    example.input_ids += piece
    example.labels += [IGNORED, *piece[1:]]
    example.position_ids += range(len(piece))
