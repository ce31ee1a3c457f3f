"""A task head on an encoder: pooled last hidden states → class logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.errors import BaseModelError

Pooling = Literal["mean", "cls"]
HEAD = "classifier"


class SequenceClassifier(nn.Module):
    """An encoder body and a linear classifier on its pooled output: `logits = classifier(pooled)`.

    The body sits under its own `base_model_prefix` (`bert`, `roberta`, …) and the head under `classifier`, so the
    parameter names are those of transformers' `AutoModelForSequenceClassification` and an adapter loads there.
    """

    def __init__(self, body: Any, *, labels: int, pooling: Pooling) -> None:
        super().__init__()
        self.config = body.config
        self.pooling = pooling
        self.body_name: str = body.base_model_prefix
        if not self.body_name or self.body_name == HEAD:
            raise BaseModelError(f"{type(body).__name__} has no usable base_model_prefix", got=repr(self.body_name))
        setattr(self, self.body_name, body)
        self.classifier = nn.Linear(body.config.hidden_size, labels)
        nn.init.normal_(self.classifier.weight, std=getattr(body.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @property
    def body(self) -> nn.Module:
        """The encoder without the head."""
        module: nn.Module = getattr(self, self.body_name)
        return module

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) token ids → (batch, hidden)."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool(hidden, attention_mask, self.pooling)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) token ids → (batch, labels) logits."""
        logits: Tensor = self.classifier(self.pooled(input_ids, attention_mask))
        return logits


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT model, its adapted layers included; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """(batch, seq, hidden) → (batch, hidden): the first token, or the mean over real tokens."""
    if pooling == "cls":
        return hidden[:, 0]
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
