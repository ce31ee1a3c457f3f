"""Texts with any number of labels (multi-label) or with a number (regression): objectives and metrics."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.batching import Batch
from edgetune.forgetting.intervals import spearman
from edgetune.objectives import class_logits

THRESHOLD = 0.5  # of a label's probability: the logit 0
VALUE = "value"  # the name of a regression head's only output


def multi_label(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Binary cross entropy, a mean over rows and labels (transformers' problem_type multi_label_classification)."""
    return F.binary_cross_entropy_with_logits(class_logits(model, batch), batch.labels), len(batch.labels)


def regression(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Squared error, a mean over rows (transformers' problem_type regression)."""
    return F.mse_loss(class_logits(model, batch).squeeze(-1), batch.labels), len(batch.labels)


def decisions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each label of each row as a choice between no and yes: logits (rows · labels, 2), targets (rows · labels,)."""
    logits = class_logits(model, batch).flatten()
    return torch.stack([torch.zeros_like(logits), logits], dim=-1), batch.labels.flatten().long()


def values(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predicted values (rows, 1) and the right ones (rows,)."""
    return class_logits(model, batch), batch.labels


def multi_label_metrics(predictions: Sequence[Collection[str]], references: Sequence[Collection[str]]) -> dict[str, float]:
    """F1 over all decisions (micro), its mean over the labels that occur (macro), and the share of rows all right."""
    pairs = [(set(predicted), set(expected)) for predicted, expected in zip(predictions, references, strict=True)]
    labels = sorted(set[str]().union(*(predicted | expected for predicted, expected in pairs)))
    hits = {label: sum(label in predicted and label in expected for predicted, expected in pairs) for label in labels}
    named = {label: sum((label in predicted) + (label in expected) for predicted, expected in pairs) for label in labels}
    each = [2 * hits[label] / named[label] for label in labels]
    return {
        "micro_f1": 2 * sum(hits.values()) / max(1, sum(named.values())),
        "macro_f1": sum(each) / len(each) if each else 0.0,
        "exact_match": sum(predicted == expected for predicted, expected in pairs) / max(1, len(pairs)),
    }


def regression_metrics(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman correlation (0 where one side is constant), and the mean squared error."""
    pairs = np.array([predictions, references], np.float64).T  # (rows, 2)
    x, y = (pairs - pairs.mean(axis=0)).T
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    pearson = float((x * y).sum()) / size if size else 0.0
    return {"pearson": pearson, "spearman": spearman(pairs), "mse": float(((pairs[:, 0] - pairs[:, 1]) ** 2).mean())}
