"""Rows of a prompt alone (`grpo`): the model writes the answers, a reward function sees the row."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgetune.core.errors import DataError
from edgetune.data.completions import encode_prompts
from edgetune.data.conversations import Prompt, end_token, prompt_text, row_prompt
from edgetune.data.examples import ExampleSet, Loading, load
from edgetune.data.prompts import PromptFormat
from edgetune.data.row import Row
from edgetune.data.rows import Rows, convert_rows
from edgetune.recipe.own_settings import Grpo


@dataclass(slots=True)
class PromptExample:
    """A prompt and the row it comes from, which a reward function sees."""

    input_ids: list[int]
    row: int
    prompt: Prompt
    values: Mapping[str, Any]
    max_new_tokens: int
    labels: list[int] = field(default_factory=list)

    @property
    def padded_length(self) -> int:
        """Tokens that answering it may take, prompt included."""
        return len(self.input_ids) + self.max_new_tokens


@dataclass(frozen=True)
class PromptRow:
    """A row, its prompt, and this as the model is given it."""

    row: Row
    prompt: Prompt
    text: str


def prompt_rows(
    source: Rows, form: PromptFormat, *, tokenizer: Any, skip_invalid: bool = False
) -> tuple[list[PromptRow], int]:
    """The prompt of every row, and how many rows were left out."""

    def convert(row: Row, where: str) -> PromptRow:
        prompt = row_prompt(form, row.values, where=where)
        return PromptRow(row, prompt, prompt_text(form, prompt, tokenizer, where=where))

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def load_prompts(loading: Loading) -> ExampleSet:
    """Prompts that leave room for `max_new_tokens`; all columns pass on to the reward functions."""
    tokenizer, limit = loading.tokenizer, loading.limit
    new_tokens = loading.stage.own(Grpo).max_new_tokens
    end_token(tokenizer)  # without one no answer would end

    def encode(_: str, rows: list[PromptRow]) -> list[PromptExample]:
        ids = encode_prompts([row.text for row in rows], loading.form.template, tokenizer)
        return [
            PromptExample(prompt_ids, found.row.line, found.prompt, found.row.values, new_tokens)
            for found, prompt_ids in zip(rows, ids, strict=True)
        ]

    def refuse(example: PromptExample, source: str) -> DataError | None:
        if example.padded_length <= limit:
            return None
        return DataError(
            f"the prompt leaves no room for {new_tokens} new tokens",
            where=f"{source}, line {example.row}",
            expected=f"at most {limit} tokens with the answer",
            got=f"{example.padded_length}",
            fix=(
                "Raise max_length (if the base has the positions), lower max_new_tokens, or set"
                " data.skip_invalid = true."
            ),
        )

    read = functools.partial(prompt_rows, tokenizer=tokenizer)
    found = load(loading, read, encode, refuse=refuse)
    return replace(found, max_new_tokens=new_tokens)
