"""Where only the head learns, the frozen body runs once over every row; the epochs then see its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from edgetune.examples import Example, ExampleSet
from edgetune.heads import SequenceClassifier
from edgetune.token_classifier import TokenClassifier
from edgetune.training.probe import pooled_features
from edgetune.training.tagging import with_word_features


def with_features(model: SequenceClassifier, examples: ExampleSet, *, pad_id: int) -> ExampleSet:
    """The set with the pooled features of every example in fp32; those of single words where words are tagged."""
    if isinstance(model, TokenClassifier):
        return with_word_features(model, examples, pad_id=pad_id)
    return replace(
        examples,
        train=_featured(model, examples.train, pad_id=pad_id),
        validation=_featured(model, examples.validation, pad_id=pad_id),
    )


def _featured(model: SequenceClassifier, examples: Sequence[Example], *, pad_id: int) -> list[Example]:
    if not examples:
        return []
    features = torch.from_numpy(pooled_features(model, examples, pad_id=pad_id))
    return [replace(example, features=row) for example, row in zip(examples, features, strict=True)]
