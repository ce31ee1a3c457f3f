"""Examples → a batch of tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edgetune.core.text import second_of
from edgetune.data.batching import IGNORE, Batch, Example


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right to the longest of these rows."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(
            example.input_ids, dtype=torch.int64
        )
        attention_mask[row, : len(example.input_ids)] = 1
    labels = _collate_labels(examples, longest)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        rows=tuple(example.row for example in examples),
        tokens=int(attention_mask.sum()),
        # The label of a row's first token is never predicted: nothing stands before it.
        targets=int((labels[:, 1:] != IGNORE).sum()) if labels.ndim == 2 else len(examples),
        position_ids=_collate_positions(examples, longest),
        features=_collate_features(examples),
        token_type_ids=token_types([example.input_ids for example in examples], longest),
    )


def token_types(rows: Sequence[Sequence[int]], longest: int) -> Tensor | None:
    """(rows, longest) int64, 1 at the tokens of second texts; None where no row has two texts."""
    seconds = [second_of(row) for row in rows]
    if all(second is None for second in seconds):
        return None
    types = torch.zeros((len(rows), longest), dtype=torch.int64)
    for at, (row, second) in enumerate(zip(rows, seconds, strict=True)):
        if second is not None:
            types[at, second : len(row)] = 1
    return types


def _collate_features(examples: Sequence[Example]) -> Tensor | None:
    features = [
        feature
        for example in examples
        if (feature := getattr(example, "features", None)) is not None
    ]
    return torch.stack(features) if features else None


def _collate_positions(examples: Sequence[Example], longest: int) -> Tensor | None:
    """None unless an example holds several documents; padding is at position 0."""
    positions: list[list[int] | None] = [
        getattr(example, "position_ids", None) for example in examples
    ]
    if not any(positions):
        return None
    padded = torch.zeros((len(examples), longest), dtype=torch.int64)
    for row, (example, position) in enumerate(zip(examples, positions, strict=True)):
        length = len(example.input_ids)
        padded[row, :length] = torch.arange(length) if position is None else torch.tensor(position)
    return padded


def _collate_labels(examples: Sequence[Example], longest: int) -> Tensor:
    labels = [example.labels for example in examples]
    classes = [label for label in labels if isinstance(label, int)]
    if len(classes) == len(labels):
        return torch.tensor(classes, dtype=torch.int64)
    padded = torch.full((len(examples), longest), IGNORE, dtype=torch.int64)
    for row, label in enumerate(labels):
        if isinstance(label, list):
            padded[row, : len(label)] = torch.tensor(label, dtype=torch.int64)
    return padded


def collate_tagged(examples: Sequence[Any], pad_id: int) -> Batch:
    """A batch whose targets are the labelled tokens; features (words, hidden) stand row after
    row.
    """
    features = [example.features for example in examples if example.features is not None]
    bare = [replace(example, features=None) for example in examples] if features else examples
    batch = collate(bare, pad_id)
    return replace(
        batch,
        targets=int((batch.labels != IGNORE).sum()),
        features=torch.cat(features) if features else None,
    )


def collate_targets(examples: Sequence[Any], pad_id: int) -> Batch:
    """A batch with float targets: (rows, labels), or (rows,) numbers."""
    labels = torch.tensor([example.target for example in examples], dtype=torch.float32)
    return replace(collate(examples, pad_id), labels=labels)
