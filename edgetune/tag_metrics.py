"""Metrics of word tags: entities found whole and of the right type, and single words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from edgetune.metrics import accuracy, macro_f1
from edgetune.words import entities, has_entities

Sentences = Sequence[Sequence[str]]  # the tags of each sentence


def tag_metrics(predictions: Sentences, references: Sentences, labels: Sequence[str]) -> dict[str, float]:
    """Entity F1 (micro, and macro over types), precision and recall, and the shares of words and of sentences that are right.

    `exact_match` is the share of sentences with all their entities and no others. Tags that are no entities (see
    `has_entities`) give accuracy and macro-F1 over the tags, and the share of sentences with every tag right.
    """
    predicted, expected = ([tag for row in rows for tag in row] for rows in (predictions, references))
    words = {"token_accuracy": accuracy(predicted, expected)}
    read: Callable[[Sequence[str]], list[Any]] = entities if has_entities(labels) else list
    pairs = [(read(ours), read(theirs)) for ours, theirs in zip(predictions, references, strict=True)]
    words["exact_match"] = sum(ours == theirs for ours, theirs in pairs) / max(1, len(pairs))
    if not has_entities(labels):
        return words | {"macro_f1": macro_f1(predicted, expected)}
    return entity_metrics(predictions, references) | words


def entity_metrics(predictions: Sentences, references: Sentences) -> dict[str, float]:
    """`entity_f1`, `entity_precision`, `entity_recall` over all entities, `macro_entity_f1` the mean over types.

    An entity counts when its first word, its last word and its type are right (conlleval; Tjong Kim Sang and De Meulder
    2003). Types are those of predictions and references together, as in seqeval.
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
