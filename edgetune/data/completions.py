"""Prompts and completions become token ids: with loss on the completion, for an encoder-decoder, or
prompts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgetune.core.errors import BaseModelError, DataError
from edgetune.data.batching import answer_length
from edgetune.data.conversations import Prompt, end_token, prompt_text, row_prompt
from edgetune.data.examples import IGNORED, Example, ExampleSet, Loading, convert_rows, subset
from edgetune.data.prompts import PromptFormat, chat_messages, chat_text, render, split_messages
from edgetune.data.rows import Row, Rows
from edgetune.recipe.own_settings import Grpo
from edgetune.recipe.schema import Stage


@dataclass(frozen=True)
class PromptedRow:
    """A row as texts: what the model is given (chat template applied) and what it shall answer.

    `answers`: where the assistant's earlier answers, each with its end token, begin and end in the
    prompt, in characters.
    """

    line: int
    prompt: str
    completion: str
    answers: tuple[tuple[int, int], ...] = ()


def prompted_rows(
    source: Rows, form: PromptFormat, tokenizer: Any, *, skip_invalid: bool = False
) -> tuple[list[PromptedRow], int]:
    """Prompt and completion of every row, and how many rows were left out."""

    def convert(row: Row, where: str) -> PromptedRow:
        if form.prompt is None or form.completion is None:
            messages, completion = split_messages(row.values, system=form.system, where=where)
            text = chat_text(tokenizer, messages, where=where)
            return PromptedRow(row.line, text, completion, answer_spans(messages, text, tokenizer))
        prompt = render(form.prompt, row.values, where=where, field="prompt")
        completion = render(form.completion, row.values, where=where, field="completion")
        if form.template == "chat":
            prompt = chat_text(tokenizer, chat_messages(prompt, system=form.system), where=where)
        return PromptedRow(row.line, prompt, completion)

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def encode_prompts(texts: Sequence[str], template: str, tokenizer: Any) -> list[list[int]]:
    """Prompt ids. A chat template writes its special tokens itself; a plain prompt gets the
    tokenizer's own (e.g. bos).
    """
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=template == "plain", verbose=False
    )["input_ids"]
    return ids


def answer_spans(
    messages: list[dict[str, str]], text: str, tokenizer: Any
) -> tuple[tuple[int, int], ...]:
    """Where the assistant's answers among `messages` lie in `text`, which the chat template made of
    them.

    An answer is left out where the template writes it otherwise in the middle of a conversation
    than when it is given, as those do that take the reasoning out: it is not what the model will
    have to write.
    """
    spans = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or at == 0 or not message["content"].strip():
            continue
        before = chat_text(tokenizer, messages[:at])
        written = next(
            (
                one
                for one in (message["content"], message["content"].strip())
                if text.startswith(before + one)
            ),
            None,
        )
        if written is not None:
            end = len(before) + len(written)
            spans.append(
                (
                    len(before),
                    end
                    + (
                        len(tokenizer.eos_token) if text.startswith(tokenizer.eos_token, end) else 0
                    ),
                )
            )
    return tuple(spans)


def load_completions(loading: Loading) -> ExampleSet:
    stage, tokenizer, limit = loading.stage, loading.tokenizer, loading.limit
    examples, skipped = {}, {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = prompted_rows(
            source, loading.form, tokenizer, skip_invalid=stage.data.skip_invalid
        )
        encoded = _encode_sft(rows, loading.form.template, tokenizer)
        kept = [example for example in encoded if len(example.input_ids) <= limit]
        if len(kept) < len(encoded) and (not stage.data.skip_invalid or not kept):
            longest = next(example for example in encoded if len(example.input_ids) > limit)
            raise _too_long(longest, source=source.source, stage=stage, limit=limit)
        examples[name] = kept
        skipped[name] = loading.sources[name].skipped + unusable + len(encoded) - len(kept)
    return loading.example_set(examples, skipped=skipped)


def _encode_sft(rows: Sequence[PromptedRow], template: str, tokenizer: Any) -> list[Example]:
    """Prompt and completion are tokenised apart, so that the device's prompt ids are a prefix of
    the training ids.
    """
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError(
            "the base's tokenizer has no end-of-text token",
            expected="eos_token in tokenizer_config.json",
        )
    prompts = encode_prompts([row.prompt for row in rows], template, tokenizer)
    completions = tokenizer(
        [row.completion for row in rows], add_special_tokens=False, verbose=False
    )["input_ids"]
    examples = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        answer = [*completion, end]
        examples.append(
            Example(prompt + answer, _prompt_labels(row, prompt, tokenizer) + answer, row.line)
        )
    return examples


def _prompt_labels(row: PromptedRow, ids: list[int], tokenizer: Any) -> list[int]:
    """The prompt's tokens that lie whole inside an earlier answer; the others bear no loss."""
    if not row.answers:
        return [IGNORED] * len(ids)
    places = tokenizer(
        row.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    return [
        token if any(begin <= start and stop <= end for begin, end in row.answers) else IGNORED
        for token, (start, stop) in zip(ids, places, strict=True)
    ]


def _too_long(example: Example, *, source: str, stage: Stage, limit: int) -> DataError:
    tokens = len(example.input_ids)
    if limit < stage.max_length:
        fix = (
            "Shorten the row: the base has no more positions. Or leave such rows out with"
            " data.skip_invalid = true."
        )
    else:
        fix = (
            f"Set max_length = {tokens} or more, or leave such rows out with data.skip_invalid ="
            " true."
        )
    where = f"{source}, line {example.row}"
    return DataError(
        "prompt and completion are too long",
        where=where,
        expected=f"at most {limit} tokens",
        got=str(tokens),
        fix=fix,
    )


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
    max_new_tokens = stage.own(Grpo).max_new_tokens
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
            PromptExample(prompt_ids, row.line, prompt, row.values, max_new_tokens)
            for (row, prompt, _), prompt_ids in zip(rows, ids, strict=True)
        ]
        kept = [example for example in found if example.padded_length <= limit]
        if len(kept) < len(found) and (not stage.data.skip_invalid or not kept):
            longest = next(example for example in found if example.padded_length > limit)
            raise _prompt_too_long(longest, source=source.source, limit=limit)
        examples[name] = kept
        skipped[name] = loading.sources[name].skipped + unusable + len(found) - len(kept)
    return loading.example_set(examples, skipped=skipped, max_new_tokens=max_new_tokens)


def _prompt_too_long(example: PromptExample, *, source: str, limit: int) -> DataError:
    return DataError(
        f"the prompt leaves no room for {example.max_new_tokens} new tokens",
        where=f"{source}, line {example.row}",
        expected=f"at most {limit} tokens with the answer",
        got=f"{example.padded_length}",
        fix=(
            "Raise max_length (if the base has the positions), lower max_new_tokens, or set"
            " data.skip_invalid = true."
        ),
    )


def load_answers(loading: Loading) -> ExampleSet:
    """Prompts and answers, each of at most `max_length` tokens: they have positions of their
    own.
    """
    stage, limit = loading.stage, loading.limit
    examples: dict[str, list[Any]] = {}
    skipped = {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = prompted_rows(
            source, loading.form, loading.tokenizer, skip_invalid=stage.data.skip_invalid
        )
        encoded = _encoded(rows, loading.form.template, loading.tokenizer)
        kept = [example for example in encoded if _longer_part(example)[1] <= limit]
        if len(kept) < len(encoded) and (not stage.data.skip_invalid or not kept):
            raise _pair_too_long(
                next(example for example in encoded if _longer_part(example)[1] > limit),
                source=source.source,
                stage=stage,
                limit=limit,
            )
        examples[name] = kept
        skipped[name] = loading.sources[name].skipped + unusable + len(encoded) - len(kept)
    return loading.example_set(examples, skipped=skipped)


def _encoded(rows: Sequence[PromptedRow], template: str, tokenizer: Any) -> list[Example]:
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError(
            "the base's tokenizer has no end-of-text token",
            expected="eos_token in tokenizer_config.json",
        )
    prompts = encode_prompts([row.prompt for row in rows], template, tokenizer)
    completions = tokenizer(
        [row.completion for row in rows], add_special_tokens=False, verbose=False
    )["input_ids"]
    return [
        Example(prompt, [*answer, end], row.line)
        for row, prompt, answer in zip(rows, prompts, completions, strict=True)
    ]


def _longer_part(example: Example) -> tuple[str, int]:
    parts = {"prompt": len(example.input_ids), "completion": answer_length(example)}
    longer = max(parts, key=lambda name: parts[name])
    return longer, parts[longer]


def _pair_too_long(example: Example, *, source: str, stage: Stage, limit: int) -> DataError:
    what, tokens = _longer_part(example)
    if limit < stage.max_length:
        fix = (
            "Shorten the row: the base has no more positions. Or leave such rows out with"
            " data.skip_invalid = true."
        )
    else:
        fix = (
            f"Set max_length = {tokens} or more, or leave such rows out with data.skip_invalid ="
            " true."
        )
    return DataError(
        f"the {what} is too long",
        where=f"{source}, line {example.row}",
        expected=f"at most {limit} tokens",
        got=str(tokens),
        fix=fix,
    )
