"""Task heads: pooled last hidden states of an encoder → class logits; a decoder's last hidden state
→ a reward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import BaseModelError
from edgetune.core.tasks import TAGGING
from edgetune.models.sentence_encoder import Pooling

HEAD, SCORE = "classifier", "score"  # as transformers names them in encoders and in decoders
HEADS = (HEAD, SCORE)
# an encoder's own pooler: no head reads it, an adapter there would learn nothing
UNUSED = ("pooler",)


class SequenceClassifier(nn.Module):
    """An encoder body and a linear classifier on its pooled output: `logits = classifier(pooled)`.

    The body sits under its own `base_model_prefix` (`bert`, `roberta`, …) and the head under
    `classifier`, so the parameter names are those of transformers'
    `AutoModelForSequenceClassification` and an adapter loads there.
    """

    def __init__(self, body: Any, *, labels: int, pooling: Pooling) -> None:
        super().__init__()
        self.config = body.config
        self.pooling = pooling
        self.body_name: str = body.base_model_prefix
        if not self.body_name or self.body_name == HEAD:
            raise BaseModelError(
                f"{type(body).__name__} has no usable base_model_prefix", got=repr(self.body_name)
            )
        setattr(self, self.body_name, body)
        self.classifier = nn.Linear(body.config.hidden_size, labels)
        nn.init.normal_(self.classifier.weight, std=getattr(body.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    @property
    def body(self) -> nn.Module:
        """The encoder without the head."""
        module: nn.Module = getattr(self, self.body_name)
        return module

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, hidden). Types of tokens (two texts in a row) where the
        body knows any.
        """
        types = (
            {}
            if token_type_ids is None or not has_token_types(self.config)
            else {"token_type_ids": token_type_ids}
        )
        hidden = self.body(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).last_hidden_state
        return pool(hidden, attention_mask, self.pooling)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, labels) logits."""
        logits: Tensor = self.classifier(self.pooled(input_ids, attention_mask, token_type_ids))
        return logits


class RewardModel(nn.Module):
    """A decoder's body and a scalar on the hidden state of a sequence's last token: `reward =
    score(hidden)`.

    Parameter names are those of transformers' decoder `AutoModelForSequenceClassification` with
    `num_labels=1` (`score.weight` (1, hidden), no bias), so an adapter loads there.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.config = decoder.config
        self.body_name: str = decoder.base_model_prefix
        if not self.body_name or self.body_name == SCORE or decoder.base_model is decoder:
            raise BaseModelError(
                f"{type(decoder).__name__} has no usable base_model_prefix",
                got=repr(self.body_name),
            )
        setattr(self, self.body_name, decoder.base_model)
        self.score = nn.Linear(decoder.config.hidden_size, 1, bias=False)
        nn.init.normal_(self.score.weight, std=getattr(decoder.config, "initializer_range", 0.02))

    @property
    def body(self) -> nn.Module:
        """The decoder without its output projection."""
        module: nn.Module = getattr(self, self.body_name)
        return module

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) right-padded token ids → (batch, hidden) in fp32."""
        return last_hidden(self.body, input_ids, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) right-padded token ids → (batch,) rewards."""
        hidden = self.pooled(input_ids, attention_mask)
        with torch.autocast(
            hidden.device.type, enabled=False
        ):  # a reward in bf16 would have 8 bits
            rewards: Tensor = self.score(hidden).squeeze(-1)
        return rewards


def last_hidden(body: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A causal body's hidden states (batch, hidden), fp32, at the last real token of right-padded
    rows.

    No mask goes in: a token sees no later one, so padding on the right changes nothing before it.
    """
    hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state
    last = attention_mask.sum(dim=1) - 1
    state: Tensor = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    return state


def has_token_types(config: Any) -> bool:
    """Whether an encoder has an embedding for the types of tokens, which tell two texts of a row
    apart.
    """
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def head_of(model: nn.Module) -> str | None:
    """The name of the model's task head; None for one that has none."""
    return (
        HEAD
        if isinstance(model, SequenceClassifier)
        else SCORE
        if isinstance(model, RewardModel)
        else None
    )


def unwrapped(model: Any) -> Any:
    """The model inside a PEFT model, its adapted layers included; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """(batch, seq, hidden) → (batch, hidden): the first token, or the mean over real tokens."""
    if pooling == "cls":
        return hidden[:, 0]
    mask = attention_mask.unsqueeze(-1).to(torch.float32)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


class TokenClassifier(SequenceClassifier):
    """An encoder body and a linear classifier on every token's state: `logits =
    classifier(hidden)`.

    Parameter names are those of transformers' `AutoModelForTokenClassification`, so an adapter
    loads there. Pooling is for what else the body is asked (embeddings); the head does not use it.
    """

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, seq) token ids → (batch, seq, hidden)."""
        hidden: Tensor = self.body(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) token ids → (batch, seq, labels) logits. Rows are one text: there are no
        types.
        """
        logits: Tensor = self.classifier(self.states(input_ids, attention_mask))
        return logits


def build_classifier(
    body: Any, *, task: str, labels: int, pooling: Pooling | None
) -> SequenceClassifier:
    """The encoder with the head that the task needs, untrained."""
    kind = TokenClassifier if task == TAGGING else SequenceClassifier
    return kind(body, labels=labels, pooling=pooling or "mean")
