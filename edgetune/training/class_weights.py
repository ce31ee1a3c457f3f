"""What a row of each label counts: `class_weights` of a recipe as numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edgetune.core.errors import RecipeError
from edgetune.core.settings import nearest, shortened
from edgetune.data.batching import IGNORE, Batch
from edgetune.data.examples import ExampleSet


def weights_of(
    asked: str | Mapping[str, float], examples: ExampleSet, *, several: bool, path: str
) -> Tensor | None:
    """(labels,) fp32 from a recipe's `class_weights`; None where every row counts alike. `several`:
    a row may have several labels. RecipeError for a label that the training rows have not.
    """
    labels = examples.labels
    if asked == "none" or labels is None:
        return None
    if isinstance(asked, str):
        return balanced(counts_of(examples.train, len(labels)), several=several)
    for name in asked:
        if name not in labels:
            raise RecipeError(
                f'{path}.class_weights weighs "{shortened(name)}", which is no label of these rows',
                **nearest(name, labels),
            )
    return torch.tensor([asked.get(name, 1.0) for name in labels], dtype=torch.float32)


def counts_of(examples: Sequence[Any], labels: int) -> tuple[Tensor, int]:
    """How many rows (or words) have each label, and how many there are, in fp64."""
    if examples and hasattr(examples[0], "target"):
        targets = torch.tensor([example.target for example in examples], dtype=torch.float64)
        return targets.sum(0), len(examples)
    found = [
        label
        for example in examples
        for label in (example.labels if isinstance(example.labels, list) else [example.labels])
        if label != IGNORE
    ]
    return torch.bincount(torch.tensor(found), minlength=labels).double(), len(found)


def balanced(counts: tuple[Tensor, int], *, several: bool) -> Tensor:
    """rows / (labels · rows of the label), where rows have one label (scikit-learn's "balanced");
    where they have several, rows without / rows with it. 1 for a label that no row has.
    """
    having, rows = counts
    there = having.clamp(min=1)
    weights = (rows - having) / there if several else rows / (int((having > 0).sum()) * there)
    # a label that every row has is learned from nothing else
    usable = (having > 0) & (having < rows) if several else having > 0
    return torch.where(usable, weights, torch.ones_like(weights)).float()


def weighing(
    collate: Callable[[Sequence[Any], int], Batch], weights: Tensor
) -> Callable[[Sequence[Any], int], Batch]:
    """`collate` of rows (or words) with one label, whose batches know what they count together: the
    parts of a step then add up to the loss of the whole step.
    """

    def weighed(examples: Sequence[Any], pad_id: int) -> Batch:
        batch = collate(examples, pad_id)
        return replace(batch, weight=float(weights[batch.labels[batch.labels != IGNORE]].sum()))

    return weighed


def by_class(weights: Tensor | None, present: Collection[int]) -> Mapping[int, float] | None:
    """As scikit-learn's `class_weight` takes them."""
    return None if weights is None else {int(at): float(weights[at]) for at in present}
