"""Metrics of labels, sets of labels, numbers and tagged words. Pure functions of predictions and
references; scikit-learn counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from edgetune.core.text import Entity, entities, has_entities
from edgetune.metrics.statistics import correlation, share, spearman

T = TypeVar("T", bound=Hashable)
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
    words["exact_match"] = share(ours == theirs for ours, theirs in pairs)
    if not has_entities(labels):
        return words | {"macro_f1": macro_f1(predicted, expected)}
    return entity_metrics(predictions, references) | words


def entity_metrics(predictions: Sentences, references: Sentences) -> dict[str, float]:
    """`entity_f1`, `entity_precision`, `entity_recall` over all entities, `macro_entity_f1` the
    mean over types.

    An entity counts when its first word, its last word and its type are right (conlleval; Tjong Kim
    Sang and De Meulder 2003). Types are those of predictions and references together, as in
    seqeval, which reads tags otherwise than the runtime does: of BILOU it makes neighbours of one
    type one entity.
    """
    found, wanted = ([set(entities(tags)) for tags in rows] for rows in (predictions, references))
    precision, recall, f1, macro_f1 = _scores_of_sets(found, wanted, _type)
    return {
        "entity_f1": f1,
        "macro_entity_f1": macro_f1,
        "entity_precision": precision,
        "entity_recall": recall,
    }


def _type(entity: Entity) -> str:
    return entity.type


def _scores_of_sets(
    found: Sequence[set[T]], wanted: Sequence[set[T]], label_of: Callable[[T], str]
) -> tuple[float, float, float, float]:
    """Precision, recall and F1 over all items of all rows, and the mean of the labels' F1; 0 where
    there are no items.
    """
    from sklearn.metrics import precision_recall_fscore_support

    rows = list(zip(found, wanted, strict=True))
    labels = sorted({label_of(item) for ours, theirs in rows for item in ours | theirs})
    if not labels:
        return 0.0, 0.0, 0.0, 0.0
    number = {label: at for at, label in enumerate(labels)}
    # an item that one side lacks is of no label there: -1
    pairs = [
        [number[label_of(item)] if item in side else -1 for side in (theirs, ours)]
        for ours, theirs in rows
        for item in ours | theirs
    ]
    micro, macro = (
        precision_recall_fscore_support(
            *np.array(pairs).T, labels=range(len(labels)), average=average, zero_division=0
        )
        for average in ("micro", "macro")
    )
    return float(micro[0]), float(micro[1]), float(micro[2]), float(macro[2])


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows with the right label."""
    return share(p == r for p, r in zip(predictions, references, strict=True))


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the labels that occur in predictions or references, each label weighing the
    same.
    """
    from sklearn.metrics import f1_score

    if not references:
        return 0.0
    with warnings.catch_warnings():  # "more than half are classes": few rows of many labels
        warnings.simplefilter("ignore", UserWarning)
        return float(f1_score(references, predictions, average="macro", zero_division=0))


def multi_label_metrics(
    predictions: Sequence[Collection[str]], references: Sequence[Collection[str]]
) -> dict[str, float]:
    """F1 over all decisions (micro), its mean over the labels that occur (macro), and the share of
    rows all right.
    """
    found, wanted = ([set(labels) for labels in rows] for rows in (predictions, references))
    *_, micro_f1, macro_f1 = _scores_of_sets(found, wanted, str)
    return {
        "micro_f1": micro_f1,
        "macro_f1": macro_f1,
        "exact_match": share(ours == theirs for ours, theirs in zip(found, wanted, strict=True)),
    }


def regression_metrics(
    predictions: Sequence[float], references: Sequence[float]
) -> dict[str, float]:
    """Pearson and Spearman correlation (0 where one side is constant), and the mean squared
    error.
    """
    pairs = np.array([predictions, references], np.float64).T  # (rows, 2)
    return {
        "pearson": correlation(pairs),
        "spearman": spearman(pairs),
        "mse": float(((pairs[:, 0] - pairs[:, 1]) ** 2).mean()) if len(pairs) else 0.0,
    }
