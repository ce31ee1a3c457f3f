"""Rows of plain text (`causal-lm`): documents packed into sequences of one length."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import DataError
from edgetune.data.batching import IGNORE
from edgetune.data.conversations import end_token
from edgetune.data.examples import Example, ExampleSet, Loading, load
from edgetune.data.prompts import PromptFormat, render
from edgetune.data.row import Row
from edgetune.data.rows import Rows, convert_rows


@dataclass(frozen=True)
class TextRow:
    """A row as a document."""

    line: int
    text: str


def text_rows(
    source: Rows, form: PromptFormat, *, skip_invalid: bool = False
) -> tuple[list[TextRow], int]:
    """The text of every row, and how many rows were left out."""
    template = form.text or "{{ text }}"

    def convert(row: Row, where: str) -> TextRow:
        return TextRow(row.line, render(template, row.values, where=where, field="text"))

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_packed(loading: Loading) -> ExampleSet:
    """Sequences of `max_length` tokens; the training documents are shuffled with the seed before
    they are packed.
    """

    def encode(name: str, rows: list[TextRow]) -> list[Example]:
        documents = encode_documents(rows, loading.tokenizer)
        if name == "train":
            random.Random(loading.seed).shuffle(documents)
        packed = pack(documents, loading.limit)
        if not packed:
            raise no_text(loading.sources[name].source, "at least two tokens")
        return packed

    return load(loading, text_rows, encode)


def no_text(source: str, expected: str) -> DataError:
    """The error for a file whose texts have no tokens."""
    return DataError("there is no text to learn from", where=source, expected=expected)


def encode_documents(rows: Iterable[TextRow], tokenizer: Any) -> list[tuple[int, list[int]]]:
    """(line, token ids) of every document: the tokenizer's own beginning, the text, the end-of-text
    token.
    """
    end = end_token(tokenizer)
    rows = list(rows)
    encoded = tokenizer([row.text for row in rows], verbose=False)["input_ids"]
    return [
        (row.line, ids if ids[-1:] == [end] else [*ids, end])
        for row, ids in zip(rows, encoded, strict=True)
    ]


def pack(documents: Iterable[tuple[int, list[int]]], length: int) -> list[Example]:
    """Sequences of `length` tokens (or one less; the last may be shorter), with labels on all but a
    piece's first token.
    """
    packed: list[Example] = []
    current: Example | None = None
    for line, ids in documents:
        start = 0
        while start < len(ids) - 1:
            # a piece of one token would predict nothing
            if current is None or length - len(current.input_ids) < 2:
                current = Example([], [], line, [])
                packed.append(current)
            piece = ids[start : start + length - len(current.input_ids)]
            _append(current, piece)
            start += len(piece) - 1
    return packed


def _append(example: Example, piece: list[int]) -> None:
    assert isinstance(example.labels, list) and example.position_ids is not None
    example.input_ids += piece
    example.labels += [IGNORE, *piece[1:]]
    example.position_ids += range(len(piece))
