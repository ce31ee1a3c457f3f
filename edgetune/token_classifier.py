"""The head that tags words: class logits of every token's last state, and its objective."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edgetune.batching import IGNORE, Batch
from edgetune.heads import Pooling, SequenceClassifier, unwrapped

TAGGING = "token-classification"


class TokenClassifier(SequenceClassifier):
    """An encoder body and a linear classifier on every token's state: `logits = classifier(hidden)`.

    Parameter names are those of transformers' `AutoModelForTokenClassification`, so an adapter loads there. Pooling
    is for what else the body is asked (embeddings); the head does not use it.
    """

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) token ids → (batch, seq, hidden)."""
        hidden: Tensor = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(batch, seq) token ids → (batch, seq, labels) logits. Rows are one text: there are no types."""
        logits: Tensor = self.classifier(self.states(input_ids, attention_mask))
        return logits


def build_classifier(body: Any, *, task: str, labels: int, pooling: Pooling | None) -> SequenceClassifier:
    """The encoder with the head that the task needs, untrained."""
    kind = TokenClassifier if task == TAGGING else SequenceClassifier
    return kind(body, labels=labels, pooling=pooling or "mean")


def token_classification(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Cross entropy of the tags at each word's first sub-word; 0 for a batch without any."""
    logits, targets = word_logits(model, batch)
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing) if len(targets) else logits.sum()
    return loss, targets.numel()


def word_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (words, labels) in fp32, row after row, and the tags (words,); from the features where the batch has them."""
    inner = unwrapped(model)
    labelled = batch.labels != IGNORE  # (batch, seq)
    states = batch.features if batch.features is not None else inner.states(batch.input_ids, batch.attention_mask)[labelled]
    return inner.classifier(states).float(), batch.labels[labelled]
