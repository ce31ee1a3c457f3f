"""A model in torch as a subject: `before` and `after` lend it without and with what it learned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgetune.core.tasks import Kind
from edgetune.data.batching import in_order_of_length
from edgetune.evaluation.forgetting.likelihood import (
    SEQUENCES_AT_ONCE,
    TOKENS_AT_ONCE,
    ChoiceItem,
    Score,
    beginning,
    score_items,
)
from edgetune.evaluation.forgetting.tasks import Texts
from edgetune.models.heads import SequenceClassifier, pool, unwrapped
from edgetune.models.sentence_encoder import Pooling
from edgetune.models.torch_device import Precision, autocast, device_of, to_device

Lend = Callable[[], contextlib.AbstractContextManager[Any]]


class TorchSubject:
    """See `edgetune.evaluation.forgetting.measure.Subject`."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        kind: Kind,
        limit: int,
        pooling: Pooling | None,
        before: Lend,
        after: Lend,
        precision: Precision = "fp32",
    ) -> None:
        self._lend = {False: before, True: after}
        self._tokenizer, self._limit, self._pooling, self._precision = (
            tokenizer,
            limit,
            pooling,
            precision,
        )
        self.texts = Texts(self._encode, beginning(tokenizer), limit) if kind == "decoder" else None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def score(self, items: Sequence[ChoiceItem], *, adapted: bool) -> list[list[Score]]:
        """A score for every choice of every item."""
        with self._lend[adapted]() as model:
            return score_items(model, items, precision=self._precision)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, adapted: bool) -> Any:
        """Pooled states (texts, hidden) as a float32 array; longer texts are cut to the model's
        positions.
        """
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._limit, verbose=False)[
            "input_ids"
        ]
        lengths, rows = [len(row) for row in ids], list[tuple[int, torch.Tensor]]()
        with self._lend[adapted]() as model, autocast(self._precision, device_of(model)):
            for part in in_order_of_length(
                lengths, 4 * TOKENS_AT_ONCE, batch_size=SEQUENCES_AT_ONCE
            ):
                batch = self._tokenizer.pad(
                    {"input_ids": [ids[index] for index in part]}, return_tensors="pt"
                )
                inputs = to_device((batch["input_ids"], batch["attention_mask"]), device_of(model))
                rows += zip(part, self._pooled(model, *inputs).float().cpu(), strict=True)
        return torch.stack([row for _, row in sorted(rows, key=lambda pair: pair[0])]).numpy()

    def _pooled(self, model: Any, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        inner = unwrapped(model)
        if isinstance(inner, SequenceClassifier):
            return inner.pooled(input_ids, mask)
        body = inner.base_model  # of a masked-lm model; a bare body is its own
        hidden = body(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return pool(hidden, mask, self._pooling or "mean")
