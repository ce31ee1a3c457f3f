"""Answers as a reward adapter reads them, and their scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from edgetune.batching import Batch, collate, in_order_of_length, split_alike
from edgetune.examples.common import Example
from edgetune.examples.generation import encode_prompts
from edgetune.examples.preference import encode_answers
from edgetune.examples.turns import Prompt, closing_tokens, prompt_text
from edgetune.prompts import PromptFormat

TOKENS_AT_ONCE, ROWS_AT_ONCE, DIFFERENT_AT_ONCE = 4096, 64, 2048


def encode_answered(
    prompts: Sequence[Prompt], completions: Sequence[str], form: PromptFormat, tokenizer: Any, *, limit: int
) -> list[list[int]]:
    """Prompts and answers as `reward` trains on them; of more than `limit` tokens the last ones."""
    heads = encode_prompts([prompt_text(form, prompt, tokenizer) for prompt in prompts], form.template, tokenizer)
    closing = closing_tokens(form, tokenizer)
    answers = encode_answers(completions, tokenizer)
    return [(head + answer + closing)[-limit:] for head, answer in zip(heads, answers, strict=True)]


def score_rows(rows: Sequence[list[int]], reward: Callable[[Batch], Tensor], *, alike: bool = False) -> list[float]:
    """`reward` (batch) → (rows,) over all rows, in batches of like length, or of rows that begin `alike`."""
    rewards = [0.0] * len(rows)
    by_length = functools.partial(in_order_of_length, [len(row) for row in rows], TOKENS_AT_ONCE, batch_size=ROWS_AT_ONCE)
    for part in split_alike(rows, DIFFERENT_AT_ONCE) if alike else by_length():
        batch = collate([Example(rows[index], 0, index) for index in part], 0)
        for index, value in zip(part, reward(batch).tolist(), strict=True):
            rewards[index] = value
    return rewards
