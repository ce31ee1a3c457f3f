"""Metrics of labels, sets of labels, numbers and tagged words. Pure functions of predictions and
references.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from edgetune.core.text import entities, has_entities
from edgetune.metrics.statistics import spearman

Sentences = Sequence[Sequence[str]]  # the tags of each sentence


def tag_metrics(
    predictions: Sentences, references: Sentences, labels: Sequence[str]
) -> dict[str, float]:
    """Entity F1 (micro, and macro over types), precision and recall, and the shares of words and of
    sentences that are right.

    `exact_match` is the share of sentences with all their entities and no others. Tags that are no
    entities (see `has_entities`) give accuracy and macro-F1 over the tags, and the share of
    sentences with every tag right.
    """
    predicted, expected = (
        [tag for row in rows for tag in row] for rows in (predictions, references)
    )
    words = {"token_accuracy": accuracy(predicted, expected)}
    read: Callable[[Sequence[str]], list[Any]] = entities if has_entities(labels) else list
    pairs = [
        (read(ours), read(theirs)) for ours, theirs in zip(predictions, references, strict=True)
    ]
    words["exact_match"] = sum(ours == theirs for ours, theirs in pairs) / max(1, len(pairs))
    if not has_entities(labels):
        return words | {"macro_f1": macro_f1(predicted, expected)}
    return entity_metrics(predictions, references) | words


def entity_metrics(predictions: Sentences, references: Sentences) -> dict[str, float]:
    """`entity_f1`, `entity_precision`, `entity_recall` over all entities, `macro_entity_f1` the
    mean over types.

    An entity counts when its first word, its last word and its type are right (conlleval; Tjong Kim
    Sang and De Meulder 2003). Types are those of predictions and references together, as in
    seqeval.
    """
    hits, found, wanted = Counter[str](), Counter[str](), Counter[str]()
    for predicted, expected in zip(predictions, references, strict=True):
        ours, theirs = set(entities(predicted)), set(entities(expected))
        hits.update(entity.type for entity in ours & theirs)
        found.update(entity.type for entity in ours)
        wanted.update(entity.type for entity in theirs)
    types = sorted(found.keys() | wanted.keys())
    right, predicted_count, expected_count = hits.total(), found.total(), wanted.total()
    each = [2 * hits[kind] / (found[kind] + wanted[kind]) for kind in types]
    return {
        "entity_f1": 2 * right / max(1, predicted_count + expected_count),
        "macro_entity_f1": sum(each) / len(each) if each else 0.0,
        "entity_precision": right / max(1, predicted_count),
        "entity_recall": right / max(1, expected_count),
    }


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows with the right label."""
    return _share(p == r for p, r in zip(predictions, references, strict=True))


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the labels that occur in predictions or references, each label weighing the
    same.
    """
    labels = sorted(set(predictions) | set(references))
    return (
        sum(_f1(label, predictions, references) for label in labels) / len(labels)
        if labels
        else 0.0
    )


def _f1(label: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(p == r == label for p, r in pairs)
    wrong = sum((p == label) != (r == label) for p, r in pairs)
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


def _share(hits: Any) -> float:
    flags = list(hits)
    return sum(flags) / len(flags) if flags else 0.0


def multi_label_metrics(
    predictions: Sequence[Collection[str]], references: Sequence[Collection[str]]
) -> dict[str, float]:
    """F1 over all decisions (micro), its mean over the labels that occur (macro), and the share of
    rows all right.
    """
    pairs = [
        (set(predicted), set(expected))
        for predicted, expected in zip(predictions, references, strict=True)
    ]
    labels = sorted(set[str]().union(*(predicted | expected for predicted, expected in pairs)))
    hits = {
        label: sum(label in predicted and label in expected for predicted, expected in pairs)
        for label in labels
    }
    named = {
        label: sum((label in predicted) + (label in expected) for predicted, expected in pairs)
        for label in labels
    }
    each = [2 * hits[label] / named[label] for label in labels]
    return {
        "micro_f1": 2 * sum(hits.values()) / max(1, sum(named.values())),
        "macro_f1": sum(each) / len(each) if each else 0.0,
        "exact_match": (
            sum(predicted == expected for predicted, expected in pairs) / max(1, len(pairs))
        ),
    }


def regression_metrics(
    predictions: Sequence[float], references: Sequence[float]
) -> dict[str, float]:
    """Pearson and Spearman correlation (0 where one side is constant), and the mean squared
    error.
    """
    pairs = np.array([predictions, references], np.float64).T  # (rows, 2)
    x, y = (pairs - pairs.mean(axis=0)).T
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    pearson = float((x * y).sum()) / size if size else 0.0
    return {
        "pearson": pearson,
        "spearman": spearman(pairs),
        "mse": float(((pairs[:, 0] - pairs[:, 1]) ** 2).mean()),
    }
