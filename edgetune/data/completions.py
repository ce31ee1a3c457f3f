"""Rows of a prompt and a completion (`sft`): token ids with loss on the completion alone, or on all
answers of a conversation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.messages import Conversation, conversation_column, unread_keys
from edgetune.data.batching import IGNORE
from edgetune.data.conversations import (
    end_token,
    prompt_text,
    row_answer,
    row_prompt,
    row_system,
    turns_and_answer,
)
from edgetune.data.examples import Example, ExampleSet, Loading, load
from edgetune.data.implicit_prompts import well_answered
from edgetune.data.prompts import PromptFormat, apply_chat_template
from edgetune.data.row import Row
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
    """Prompt and completion of every row, and how many rows were left out. Of answers that are
    marked good or bad only the good ones are read.
    """
    source = well_answered(source, form)

    def convert(row: Row, where: str) -> PromptedRow:
        if form.prompt is None or form.completion is None:
            system = row_system(form, row.values, where=where)
            messages, last = turns_and_answer(row.values, system=system, where=where)
            text = apply_chat_template(tokenizer, messages, where=where)
            tell_of_messages(source, row, messages, text, tokenizer)
            answer = written_answer(messages, text, last, tokenizer, where=where)
            spans = answer_spans(messages, text, tokenizer, where=where)
            return PromptedRow(row.line, text, answer, spans)
        prompt = row_prompt(form, row.values, where=where)
        completion = row_answer(form.completion, row.values, where=where, field="completion")
        return PromptedRow(row.line, prompt_text(form, prompt, tokenizer, where=where), completion)

    return convert_rows(source, convert, skip_invalid=skip_invalid)


def answer_spans(
    messages: list[dict[str, Any]], text: str, tokenizer: Any, *, where: str = ""
) -> tuple[tuple[int, int], ...]:
    """Where the assistant's answers among `messages` lie in `text`, which the chat template made of
    them; those of weight 0 are left out.

    An answer is left out, too, where the template writes it otherwise in the middle of a
    conversation than when it is given, as those do that take the reasoning out: it is not what the
    model will have to write.
    """
    spans = []
    turns = messages if isinstance(messages, Conversation) else Conversation(messages)
    for at, message in enumerate(turns):
        if message["role"] != "assistant" or at == 0 or at in turns.silent:
            continue
        if not message["content"].strip() and not message.get("tool_calls"):
            continue
        head = turns.until(at)
        before = apply_chat_template(tokenizer, head)
        rendered = written_answer(head, before, message, tokenizer, where=where)
        for written in (rendered, rendered.strip()):
            if text.startswith(before + written):
                end = len(before) + len(written)
                if text.startswith(tokenizer.eos_token, end):
                    end += len(tokenizer.eos_token)
                spans.append((len(before), end))
                break
    return tuple(spans)


def written_answer(
    turns: Conversation, before: str, answer: dict[str, Any], tokenizer: Any, *, where: str
) -> str:
    """What the model has to write after `before`, the rendered `turns`: the answer's text, and the
    tool calls and the reasoning as the chat template writes them.

    DataError where the template leaves the calls out.
    """
    if not any(answer.get(key) for key in ("tool_calls", "reasoning_content", "thinking")):
        return str(answer["content"])
    whole = Conversation([*turns, answer], tools=turns.tools)
    text = apply_chat_template(tokenizer, whole, where=where, answered=True)
    rest = text.removeprefix(before) if text.startswith(before) else ""
    rest = rest.partition(tokenizer.eos_token)[0].rstrip("\n")
    names = [call["function"]["name"] for call in answer.get("tool_calls") or ()]
    if any(name not in rest for name in names):
        raise DataError(
            f'the base\'s chat template does not write the call of "{names[0]}"',
            where=where,
            expected="a template that writes tool_calls",
            fix="Choose a base whose template does, or write the calls as text into content.",
        )
    return rest if rest.strip() else str(answer["content"])


def tell_of_messages(
    source: Rows, row: Row, messages: Conversation, text: str, tokenizer: Any
) -> None:
    """Note what of a conversation is read in its own way, and what is not read at all."""
    column = conversation_column(row.values) or "messages"
    source.note(f'conversations in the column "{column}"')
    if "prompt" in row.values:
        source.note('the column "prompt" beside them is not read')
    if unread := unread_keys(row.values.get(column)):
        source.note(f"not read of a message: {', '.join(unread)}")
    if messages.silent:
        source.note("answers of weight 0 are not learned")
    if messages.tools and text == apply_chat_template(tokenizer, Conversation(messages)):
        source.note("the base's chat template does not show the tools of a row")


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
    completions = encode_completions(
        [without_end(row.completion, tokenizer) for row in rows], tokenizer
    )
    return [
        (row, prompt, [*completion, end])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


def encode_prompts(texts: Sequence[str], template: str, tokenizer: Any) -> list[list[int]]:
    """Prompt ids. A chat template writes its special tokens itself; a plain prompt gets the
    tokenizer's own (e.g. bos).
    """
    return _ids(texts, tokenizer, add_special_tokens=template == "plain")


def without_end(completion: str, tokenizer: Any) -> str:
    """A completion without an end token that it spells itself, for every answer gets one."""
    end = tokenizer.eos_token
    bare = completion.rstrip()
    while end and bare.endswith(end):
        completion = bare = bare.removesuffix(end)
    return completion


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
