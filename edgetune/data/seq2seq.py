"""Rows of a prompt and a completion for an encoder-decoder: two sequences with positions of their
own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.core.errors import DataError
from edgetune.data.batching import IGNORE, Batch
from edgetune.data.completions import PromptedRow, encoded, prompted_rows
from edgetune.data.examples import Example, ExampleSet, Loading, load


def load_answers(loading: Loading) -> ExampleSet:
    """Prompts (`input_ids`) and answers (`labels`), each of at most `max_length` tokens."""

    def encode(_: str, rows: list[PromptedRow]) -> list[Example]:
        return [
            Example(prompt, answer, row.line)
            for row, prompt, answer in encoded(rows, loading.form, loading.tokenizer)
        ]

    def refuse(example: Example, source: str) -> DataError | None:
        tokens = {"prompt": len(example.input_ids), "completion": answer_length(example)}
        longer = max(tokens, key=lambda text: tokens[text])
        if tokens[longer] <= loading.limit:
            return None
        where = f"{source}, line {example.row}"
        return loading.too_long(f"the {longer} is too long", where, tokens[longer])

    read = functools.partial(prompted_rows, tokenizer=loading.tokenizer)
    return load(loading, read, encode, refuse=refuse)


def answer_length(example: Any) -> int:
    """Tokens of an example's answer."""
    return len(example.labels)


def both_lengths(example: Any) -> int:
    """Tokens of an example's prompt and answer together."""
    return len(example.input_ids) + answer_length(example)


def collate_answers(examples: Sequence[Any], pad_id: int) -> Batch:
    """Prompts padded on the right to the longest, answers (`labels`) too, with IGNORE."""
    input_ids = _padded([example.input_ids for example in examples], pad_id)
    mask = _padded([[1] * len(example.input_ids) for example in examples], 0)
    labels = _padded([example.labels for example in examples], IGNORE)
    targets = int((labels != IGNORE).sum())
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        rows=tuple(example.row for example in examples),
        tokens=int(mask.sum()) + targets,
        targets=targets,
    )


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
