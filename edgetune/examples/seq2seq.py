"""Prompts and answers of an encoder-decoder: two texts, each with positions of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune.errors import BaseModelError, DataError
from edgetune.examples.common import Example, ExampleSet, Loading, subset
from edgetune.examples.generation import PromptedRow, encode_prompts, prompted_rows
from edgetune.recipe import Stage


def load_answers(loading: Loading) -> ExampleSet:
    """Prompts and answers, each of at most `max_length` tokens: they have positions of their own."""
    stage, limit = loading.stage, loading.limit
    examples: dict[str, list[Any]] = {}
    skipped = {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = prompted_rows(source, loading.form, loading.tokenizer, skip_invalid=stage.data.skip_invalid)
        encoded = _encoded(rows, loading.form.template, loading.tokenizer)
        kept = [example for example in encoded if _longer_part(example)[1] <= limit]
        if len(kept) < len(encoded) and (not stage.data.skip_invalid or not kept):
            raise _too_long(next(example for example in encoded if _longer_part(example)[1] > limit), source=source.source, stage=stage, limit=limit)
        examples[name] = kept
        skipped[name] = loading.sources[name].skipped + unusable + len(encoded) - len(kept)
    return loading.example_set(examples, skipped=skipped)


def _encoded(rows: Sequence[PromptedRow], template: str, tokenizer: Any) -> list[Example]:
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError("the base's tokenizer has no end-of-text token", expected="eos_token in tokenizer_config.json")
    prompts = encode_prompts([row.prompt for row in rows], template, tokenizer)
    completions = tokenizer([row.completion for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    return [Example(prompt, [*answer, end], row.line) for row, prompt, answer in zip(rows, prompts, completions, strict=True)]


def _longer_part(example: Example) -> tuple[str, int]:
    parts = {"prompt": len(example.input_ids), "completion": answer_length(example)}
    longer = max(parts, key=lambda name: parts[name])
    return longer, parts[longer]


def answer_length(example: Any) -> int:
    """Tokens of an example's answer."""
    return len(example.labels)


def _too_long(example: Example, *, source: str, stage: Stage, limit: int) -> DataError:
    what, tokens = _longer_part(example)
    if limit < stage.max_length:
        fix = "Shorten the row: the base has no more positions. Or leave such rows out with data.skip_invalid = true."
    else:
        fix = f"Set max_length = {tokens} or more, or leave such rows out with data.skip_invalid = true."
    return DataError(f"the {what} is too long", where=f"{source}, line {example.row}", expected=f"at most {limit} tokens", got=str(tokens), fix=fix)
