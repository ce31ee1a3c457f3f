"""Losses of labelled texts: word tags, sets of labels and numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.data.batching import IGNORE, Batch
from edgetune.models.heads import unwrapped
from edgetune.objectives.language import class_logits, on


def multi_label(
    model: nn.Module, batch: Batch, *, weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """Binary cross entropy, a mean over rows and labels (transformers' problem_type
    multi_label_classification); `weights` (labels,) weigh the rows that have a label (torch's
    `pos_weight`).
    """
    logits = class_logits(model, batch)
    loss = F.binary_cross_entropy_with_logits(logits, batch.labels, pos_weight=on(logits, weights))
    return loss, len(batch.labels)


def regression(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Squared error, a mean over rows (transformers' problem_type regression)."""
    return F.mse_loss(class_logits(model, batch).squeeze(-1), batch.labels), len(batch.labels)


def decisions(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each label of each row as a choice between no and yes: logits (rows · labels, 2), targets
    (rows · labels,).
    """
    logits = class_logits(model, batch).flatten()
    return torch.stack([torch.zeros_like(logits), logits], dim=-1), batch.labels.flatten().long()


def values(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predicted values (rows, 1) and the right ones (rows,)."""
    return class_logits(model, batch), batch.labels


def token_classification(
    model: nn.Module,
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Cross entropy of the tags at each word's first sub-word, weighed by `weights` (tags,); 0 for
    a batch without any.
    """
    logits, targets = word_logits(model, batch)
    loss = (
        F.cross_entropy(
            logits, targets, weight=on(logits, weights), label_smoothing=label_smoothing
        )
        if len(targets)
        else logits.sum()
    )
    return loss, targets.numel()


def word_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (words, labels) in fp32, row after row, and the tags (words,); from the features where
    the batch has them.
    """
    inner = unwrapped(model)
    labelled = batch.labels != IGNORE  # (batch, seq)
    states = (
        batch.features
        if batch.features is not None
        else inner.states(batch.input_ids, batch.attention_mask)[labelled]
    )
    return inner.logits_of(states).float(), batch.labels[labelled]
