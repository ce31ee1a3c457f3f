"""Prompts without answers: the policy of `grpo` answers them itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgetune.data import Row
from edgetune.errors import DataError
from edgetune.examples.common import ExampleSet, Loading, convert_rows, subset
from edgetune.examples.generation import encode_prompts
from edgetune.examples.turns import Prompt, end_token, prompt_text, row_prompt


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


def load_prompts(loading: Loading) -> ExampleSet:
    """The prompts of a `grpo` stage; every other column passes on to the reward functions."""
    stage, tokenizer, form, limit = loading.stage, loading.tokenizer, loading.form, loading.limit
    end_token(tokenizer)  # without one no answer would end
    examples: dict[str, list[Any]] = {}
    skipped = {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)

        def convert(row: Row, where: str) -> tuple[Row, Prompt, str]:
            prompt = row_prompt(form, row.values, where=where)
            return row, prompt, prompt_text(form, prompt, tokenizer, where=where)

        rows, unusable = convert_rows(source, convert, skip_invalid=stage.data.skip_invalid)
        ids = encode_prompts([text for *_, text in rows], form.template, tokenizer)
        found = [
            PromptExample(prompt_ids, row.line, prompt, row.values, stage.max_new_tokens)
            for (row, prompt, _), prompt_ids in zip(rows, ids, strict=True)
        ]
        kept = [example for example in found if example.padded_length <= limit]
        if len(kept) < len(found) and (not stage.data.skip_invalid or not kept):
            longest = next(example for example in found if example.padded_length > limit)
            raise _too_long(longest, source=source.source, limit=limit)
        examples[name] = kept
        skipped[name] = loading.sources[name].skipped + unusable + len(found) - len(kept)
    return loading.example_set(examples, skipped=skipped, max_new_tokens=stage.max_new_tokens)


def _too_long(example: PromptExample, *, source: str, limit: int) -> DataError:
    return DataError(
        f"the prompt leaves no room for {example.max_new_tokens} new tokens",
        where=f"{source}, line {example.row}",
        expected=f"at most {limit} tokens with the answer",
        got=f"{example.padded_length}",
        fix="Raise max_length (if the base has the positions), lower max_new_tokens, or set data.skip_invalid = true.",
    )
