"""Rows of a prompt and a completion (`sft`): token ids with loss on the completion alone, or on all
answers of a conversation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.templates import chat_messages
from edgetune.data.batching import IGNORE
from edgetune.data.conversations import end_token
from edgetune.data.examples import Example, ExampleSet, Loading, load
from edgetune.data.prompts import PromptFormat, apply_chat_template, render, split_messages
from edgetune.data.readers import Row
from edgetune.data.rows import Rows, convert_rows


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
    source: Rows, form: PromptFormat, *, tokenizer: Any, skip_invalid: bool = False
) -> tuple[list[PromptedRow], int]:
    """Prompt and completion of every row, and how many rows were left out."""

    def convert(row: Row, where: str) -> PromptedRow:
        if form.prompt is None or form.completion is None:
            messages, completion = split_messages(row.values, system=form.system, where=where)
            text = apply_chat_template(tokenizer, messages, where=where)
            return PromptedRow(row.line, text, completion, answer_spans(messages, text, tokenizer))
        prompt = render(form.prompt, row.values, where=where, field="prompt")
        completion = render(form.completion, row.values, where=where, field="completion")
        if form.template == "chat":
            prompt = apply_chat_template(
                tokenizer, chat_messages(prompt, system=form.system), where=where
            )
        return PromptedRow(row.line, prompt, completion)

    return convert_rows(source, convert, skip_invalid=skip_invalid)


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
        before = apply_chat_template(tokenizer, messages[:at])
        for written in (message["content"], message["content"].strip()):
            if text.startswith(before + written):
                end = len(before) + len(written)
                if text.startswith(tokenizer.eos_token, end):
                    end += len(tokenizer.eos_token)
                spans.append((len(before), end))
                break
    return tuple(spans)


def load_completions(loading: Loading) -> ExampleSet:
    """Prompt and completion as one sequence of at most `max_length` tokens."""
    tokenizer = loading.tokenizer

    def encode(_: str, rows: list[PromptedRow]) -> list[Example]:
        return [
            Example(prompt + answer, _prompt_labels(row, prompt, tokenizer) + answer, row.line)
            for row, prompt, answer in encoded(rows, loading.form, tokenizer)
        ]

    def refuse(example: Example, source: str) -> DataError | None:
        tokens = len(example.input_ids)
        if tokens <= loading.limit:
            return None
        where = f"{source}, line {example.row}"
        return loading.too_long("prompt and completion are too long", where, tokens)

    read = functools.partial(prompted_rows, tokenizer=tokenizer)
    return load(loading, read, encode, refuse=refuse)


def encoded(
    rows: Sequence[PromptedRow], form: PromptFormat, tokenizer: Any
) -> list[tuple[PromptedRow, list[int], list[int]]]:
    """Every row with the ids of its prompt, and of its completion and the end token after it.

    They are tokenised apart, so that the device's prompt ids are a prefix of the training ids.
    """
    end = end_token(tokenizer)
    prompts = encode_prompts([row.prompt for row in rows], form.template, tokenizer)
    completions = encode_completions([row.completion for row in rows], tokenizer)
    return [
        (row, prompt, [*completion, end])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


def encode_prompts(texts: Sequence[str], template: str, tokenizer: Any) -> list[list[int]]:
    """Prompt ids. A chat template writes its special tokens itself; a plain prompt gets the
    tokenizer's own (e.g. bos).
    """
    return _ids(texts, tokenizer, add_special_tokens=template == "plain")


def encode_completions(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of completions, without anything before or after them."""
    return _ids(texts, tokenizer, add_special_tokens=False)


def _ids(texts: Sequence[str], tokenizer: Any, *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, verbose=False
    )["input_ids"]
    return ids


def _prompt_labels(row: PromptedRow, ids: list[int], tokenizer: Any) -> list[int]:
    """The prompt's tokens that lie whole inside an earlier answer; the others bear no loss."""
    if not row.answers:
        return [IGNORE] * len(ids)
    places = tokenizer(
        row.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    return [
        token if any(begin <= start and stop <= end for begin, end in row.answers) else IGNORE
        for token, (start, stop) in zip(ids, places, strict=True)
    ]
