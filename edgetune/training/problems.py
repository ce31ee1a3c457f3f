"""Training of multi-label and regression heads: validation, and the heads' first weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from edgetune.batching import Batch
from edgetune.heads import SequenceClassifier
from edgetune.objectives import class_logits
from edgetune.problems import multi_label_metrics, regression_metrics
from edgetune.recipe import Stage
from edgetune.token_classifier import TokenClassifier
from edgetune.training.measure import outputs_of
from edgetune.training.precision import Precision
from edgetune.training.probe import C, fit_probe, pooled_features
from edgetune.training.tagging import fit_word_probe

RIDGE = np.logspace(-3, 2, 11)  # L2 strengths, on features of length 1; leave-one-out cross validation chooses


def measure_label_sets(model: nn.Module, batches: Sequence[Batch], *, precision: Precision) -> dict[str, float]:
    """Binary cross entropy a label, and `multi_label_metrics`."""
    loss, count = 0.0, 0
    predicted, expected = list[list[str]](), list[list[str]]()
    for logits, targets in outputs_of(model, batches, _targets, precision=precision):
        loss += F.binary_cross_entropy_with_logits(logits, targets, reduction="sum").item()
        count += targets.numel()
        predicted += [_on(row) for row in logits >= 0]
        expected += [_on(row) for row in targets > 0]
    return {"loss": loss / max(1, count), **multi_label_metrics(predicted, expected)}


def measure_values(model: nn.Module, batches: Sequence[Batch], *, precision: Precision) -> dict[str, float]:
    """Mean squared error (the loss), and `regression_metrics`."""
    predicted, expected = list[float](), list[float]()
    for logits, targets in outputs_of(model, batches, _targets, precision=precision):
        predicted += logits.squeeze(-1).tolist()
        expected += targets.tolist()
    metrics = regression_metrics(predicted, expected)
    return {"loss": metrics.pop("mse"), **metrics}


def fit_head(model: SequenceClassifier, stage: Stage, examples: Sequence[Any], *, pad_id: int) -> None:
    """The head's first weights on the frozen body's features, as its task needs them."""
    if isinstance(model, TokenClassifier):
        fit_word_probe(model, examples, pad_id=pad_id)
    elif stage.problem == "multi-label":
        fit_label_probes(model, examples, pad_id=pad_id)
    elif stage.problem == "regression":
        fit_value_probe(model, examples, pad_id=pad_id)
    else:
        fit_probe(model, examples, pad_id=pad_id)


def fit_label_probes(model: SequenceClassifier, examples: Sequence[Any], *, pad_id: int) -> None:
    """One logistic regression a label, on features of length 1; a label that all or no rows have gets its log odds."""
    from sklearn.linear_model import LogisticRegression

    features, scale = _unit_features(model, examples, pad_id=pad_id)
    targets = np.array([example.target for example in examples])  # (rows, labels)
    weights, biases = np.zeros((targets.shape[1], features.shape[1])), np.zeros(targets.shape[1])
    for label, column in enumerate(targets.T):
        if 0 < column.sum() < len(column):
            fitted = LogisticRegression(C=C, max_iter=1000).fit(features, column)
            weights[label], biases[label] = fitted.coef_[0] / scale, fitted.intercept_[0]
        else:
            biases[label] = np.log((column.sum() + 1) / (len(column) - column.sum() + 1))
    _set(model.classifier, weights, biases)


def fit_value_probe(model: SequenceClassifier, examples: Sequence[Any], *, pad_id: int) -> None:
    """Ridge regression on features of length 1; the mean of the numbers where they are all the same."""
    from sklearn.linear_model import RidgeCV

    targets = np.array([example.target for example in examples])
    if np.ptp(targets) == 0:
        _set(model.classifier, np.zeros((1, model.classifier.in_features)), targets[:1])
        return
    features, scale = _unit_features(model, examples, pad_id=pad_id)
    fitted = RidgeCV(alphas=RIDGE).fit(features, targets)
    _set(model.classifier, fitted.coef_[None] / scale, np.array([fitted.intercept_]))


def _unit_features(model: SequenceClassifier, examples: Sequence[Any], *, pad_id: int) -> tuple[NDArray[np.float32], float]:
    """Features of length 1, and their mean length, by which the raw ones are about larger."""
    features = pooled_features(model, examples, pad_id=pad_id)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: NDArray[np.float32] = features / np.maximum(lengths, 1e-12)
    return unit, float(lengths.mean()) or 1.0


def _set(head: nn.Linear, weights: NDArray[np.float64], biases: NDArray[np.float64]) -> None:
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights))
        head.bias.copy_(torch.from_numpy(biases))


def _targets(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return class_logits(model, batch), batch.labels


def _on(row: torch.Tensor) -> list[str]:
    """The numbers of the labels that are set, as names."""
    return [str(label) for label in row.nonzero().flatten().tolist()]
