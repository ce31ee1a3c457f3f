"""Prompts and completions become token ids with loss on the completion; in a conversation, on every answer of the assistant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.data import Row, Rows
from edgetune.errors import BaseModelError, DataError
from edgetune.examples.common import IGNORED, Example, ExampleSet, Loading, convert_rows, subset
from edgetune.prompts import PromptFormat, chat_messages, chat_text, render, split_messages
from edgetune.recipe import Stage


@dataclass(frozen=True)
class PromptedRow:
    """A row as texts: what the model is given (chat template applied) and what it shall answer.

    `answers`: where the assistant's earlier answers, each with its end token, begin and end in the prompt, in characters.
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
    """Prompt ids. A chat template writes its special tokens itself; a plain prompt gets the tokenizer's own (e.g. bos)."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=template == "plain", verbose=False)["input_ids"]
    return ids


def answer_spans(messages: list[dict[str, str]], text: str, tokenizer: Any) -> tuple[tuple[int, int], ...]:
    """Where the assistant's answers among `messages` lie in `text`, which the chat template made of them.

    An answer is left out where the template writes it otherwise in the middle of a conversation than when it is given,
    as those do that take the reasoning out: it is not what the model will have to write.
    """
    spans = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant" or at == 0 or not message["content"].strip():
            continue
        before = chat_text(tokenizer, messages[:at])
        written = next((one for one in (message["content"], message["content"].strip()) if text.startswith(before + one)), None)
        if written is not None:
            end = len(before) + len(written)
            spans.append((len(before), end + (len(tokenizer.eos_token) if text.startswith(tokenizer.eos_token, end) else 0)))
    return tuple(spans)


def load_completions(loading: Loading) -> ExampleSet:
    stage, tokenizer, limit = loading.stage, loading.tokenizer, loading.limit
    examples, skipped = {}, {}
    for name, source in loading.sources.items():
        if name == "train":
            source = subset(source, stage.data.limit, seed=loading.seed)
        rows, unusable = prompted_rows(source, loading.form, tokenizer, skip_invalid=stage.data.skip_invalid)
        encoded = _encode_sft(rows, loading.form.template, tokenizer)
        kept = [example for example in encoded if len(example.input_ids) <= limit]
        if len(kept) < len(encoded) and (not stage.data.skip_invalid or not kept):
            longest = next(example for example in encoded if len(example.input_ids) > limit)
            raise _too_long(longest, source=source.source, stage=stage, limit=limit)
        examples[name] = kept
        skipped[name] = loading.sources[name].skipped + unusable + len(encoded) - len(kept)
    return loading.example_set(examples, skipped=skipped)


def _encode_sft(rows: Sequence[PromptedRow], template: str, tokenizer: Any) -> list[Example]:
    """Prompt and completion are tokenised apart, so that the device's prompt ids are a prefix of the training ids."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError("the base's tokenizer has no end-of-text token", expected="eos_token in tokenizer_config.json")
    prompts = encode_prompts([row.prompt for row in rows], template, tokenizer)
    completions = tokenizer([row.completion for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    examples = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        answer = [*completion, end]
        examples.append(Example(prompt + answer, _prompt_labels(row, prompt, tokenizer) + answer, row.line))
    return examples


def _prompt_labels(row: PromptedRow, ids: list[int], tokenizer: Any) -> list[int]:
    """The prompt's tokens that lie whole inside an earlier answer; the others bear no loss."""
    if not row.answers:
        return [IGNORED] * len(ids)
    places = tokenizer(row.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [
        token if any(begin <= start and stop <= end for begin, end in row.answers) else IGNORED
        for token, (start, stop) in zip(ids, places, strict=True)
    ]


def _too_long(example: Example, *, source: str, stage: Stage, limit: int) -> DataError:
    tokens = len(example.input_ids)
    if limit < stage.max_length:
        fix = "Shorten the row: the base has no more positions. Or leave such rows out with data.skip_invalid = true."
    else:
        fix = f"Set max_length = {tokens} or more, or leave such rows out with data.skip_invalid = true."
    where = f"{source}, line {example.row}"
    return DataError(
        "prompt and completion are too long", where=where, expected=f"at most {limit} tokens", got=str(tokens), fix=fix
    )
