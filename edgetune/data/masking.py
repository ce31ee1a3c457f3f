"""Rows of plain text (`masked-lm`): pieces whose tokens are masked anew at every step."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgetune.core.errors import BaseModelError
from edgetune.data.batching import IGNORE, Batch
from edgetune.data.examples import Example, ExampleSet, Loading, load
from edgetune.data.plain_text import TextRow, no_text, text_rows

MEASURING = 0  # the step of a batch that is only measured
SHARE = 0.15  # of the tokens that may be masked
# of the chosen tokens: replaced by the mask token, by any token; the rest stays as it is
MASKED, RANDOM = 0.8, 0.1


def load_masked(loading: Loading) -> ExampleSet:
    """Every document cut into pieces, each between the tokenizer's own special tokens."""
    tokenizer = loading.tokenizer
    if tokenizer.mask_token_id is None:
        raise BaseModelError(
            "the base's tokenizer has no mask token", expected="mask_token in tokenizer_config.json"
        )

    def encode(name: str, rows: list[TextRow]) -> list[Example]:
        pieces = cut(rows, tokenizer, loading.limit)
        if not pieces:
            raise no_text(loading.sources[name].source, "at least one token")
        return pieces

    masking = Masking(tokenizer.mask_token_id, len(tokenizer), loading.seed)
    return replace(load(loading, text_rows, encode), mask=masking)


def cut(rows: Iterable[TextRow], tokenizer: Any, limit: int) -> list[Example]:
    """Pieces of at most `limit` tokens, special ones included; labels on the tokens that may be
    masked.
    """
    rows = list(rows)
    encoded = tokenizer(
        [row.text for row in rows],
        truncation=True,
        max_length=limit,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    examples = []
    for ids, special, row in zip(
        encoded["input_ids"],
        encoded["special_tokens_mask"],
        encoded["overflow_to_sample_mapping"],
        strict=True,
    ):
        labels = [
            IGNORE if is_special else token for token, is_special in zip(ids, special, strict=True)
        ]
        if any(label != IGNORE for label in labels):
            examples.append(Example(ids, labels, rows[row].line))
    return examples


@dataclass(frozen=True)
class Masking:
    """Chooses tokens of a batch, hides them, and leaves labels on them alone."""

    mask_id: int
    vocab_size: int
    seed: int

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch of optimizer step `step` with tokens hidden; its labels say which tokens may be
        chosen.
        """
        input_ids, labels = batch.input_ids.clone(), torch.full_like(batch.labels, IGNORE)
        for row, line in enumerate(batch.rows):
            length = int(batch.attention_mask[row].sum())
            ids = batch.input_ids[row, :length]
            draw = torch.rand(
                2, length, generator=self._generator(step, line, ids), dtype=torch.float64
            )  # (which, how)
            allowed = batch.labels[row, :length] != IGNORE
            chosen = (draw[0] < SHARE) & allowed
            if step == MEASURING and not chosen.any():  # a short row is measured too
                chosen[draw[0].masked_fill(~allowed, 2.0).argmin()] = True
            labels[row, :length][chosen] = ids[chosen]
            hidden = input_ids[row, :length]
            hidden[chosen & (draw[1] < MASKED)] = self.mask_id
            randomly = chosen & (draw[1] >= MASKED) & (draw[1] < MASKED + RANDOM)
            # Uniform within its interval, so that no further draw is needed.
            words = (
                ((draw[1] - MASKED) / RANDOM * self.vocab_size).long().clamp(0, self.vocab_size - 1)
            )
            hidden[randomly] = words[randomly]
        return replace(
            batch, input_ids=input_ids, labels=labels, targets=int((labels != IGNORE).sum())
        )

    def _generator(self, step: int, line: int, ids: torch.Tensor) -> torch.Generator:
        key = zlib.crc32(f"{self.seed}/{step}/{line}/".encode() + ids.numpy().tobytes())
        return torch.Generator().manual_seed(key)
