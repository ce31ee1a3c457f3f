"""Prompts that may be conversations: a row's column holds a text or a list of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.core.control_tokens import Rendered
from edgetune.core.errors import BaseModelError, DataError
from edgetune.core.messages import (
    Conversation,
    calls_text,
    conversation_column,
    read_messages,
    tools_in,
)
from edgetune.core.settings import shown
from edgetune.core.templates import chat_messages, referred_column
from edgetune.data.prompts import PromptFormat, apply_chat_template, render

Prompt = (
    str | list[dict[str, Any]]
)  # the user's turn, or a conversation that ends before the answer
PLACE = "the assistant's answer"  # stands for an answer where only what follows it is wanted


def row_prompt(form: PromptFormat, values: Mapping[str, Any], *, where: str) -> Prompt:
    """The prompt of a row: its template filled in, or the conversation that its column holds."""
    template = form.prompt or "{{ prompt }}"
    value = _column(template, values)
    if not isinstance(value, list):
        text = render(template, values, where=where, field="prompt")
        system = None if form.system_column is None else row_system(form, values, where=where)
        tools = tools_in(values, where=where) if form.template == "chat" else None
        if system is None and tools is None:
            return text
        turns = Conversation([{"role": "user", "content": text}], tools=tools)
        return turns.with_system(system if system is not None else form.system)
    if form.template == "plain":
        raise DataError(
            "the prompt is a conversation, but this stage uses plain prompts",
            where=where,
            expected="a string",
            fix="Choose a base with a chat template, or render the turns in data.prompt.",
        )
    messages = read_messages(value, where=where, field="prompt")
    if messages[-1]["role"] == "assistant":
        fix = "Leave the answer out of the prompt."
        raise DataError(
            "the prompt ends with an answer",
            where=where,
            expected="a last message by the user",
            fix=fix,
        )
    messages.tools = tools_in(values, where=where)
    return messages.with_system(row_system(form, values, where=where))


def row_answer(template: str, values: Mapping[str, Any], *, where: str, field: str) -> str:
    """An answer of a row: its template filled in, or the one assistant message that its column
    holds.
    """
    value = _column(template, values)
    if not isinstance(value, list):
        return render(template, values, where=where, field=field)
    messages = read_messages(value, where=where, field=field)
    text = calls_text(messages[-1])
    if len(messages) != 1 or messages[0]["role"] != "assistant" or not text.strip():
        raise DataError(
            f"the {field} answer cannot be used",
            where=where,
            expected="a text, or a list of one message by the assistant",
            got=f"{len(messages)} messages, the last by {messages[-1]['role']}",
        )
    return text


def split_messages(
    values: Mapping[str, Any], *, system: str | None, where: str
) -> tuple[Conversation, str]:
    """A row's conversation as (all turns before the last answer, this as text)."""
    turns, last = turns_and_answer(values, system=system, where=where)
    return turns, calls_text(last)


def turns_and_answer(
    values: Mapping[str, Any], *, system: str | None, where: str
) -> tuple[Conversation, dict[str, Any]]:
    """A row's conversation as (all turns before the last answer that is learned, this answer)."""
    column = conversation_column(values) or "messages"
    messages = values.get(column)
    expected = 'a list of {"role", "content"}, the last one by the assistant'
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f'the column "{column}" cannot be used',
            where=where,
            expected=expected,
            got=shown(messages),
        )
    found = read_messages(messages, where=where, field=column)
    last = found[-1]
    if last["role"] != "assistant" or not (last["content"].strip() or last.get("tool_calls")):
        raise DataError(
            "the last message is no answer", where=where, expected=expected, got=shown(last)
        )
    learned = [
        at
        for at, one in enumerate(found)
        if one["role"] == "assistant" and at not in found.silent and at > 0
    ]
    if not learned:
        raise DataError(
            "no answer is to be learned",
            where=where,
            expected="an answer of the assistant whose weight is not 0",
        )
    found.tools = tools_in(values, where=where)
    turns = found.until(learned[-1]).with_system(system)
    return turns, found[learned[-1]]


def row_system(form: PromptFormat, values: Mapping[str, Any], *, where: str) -> str | None:
    """The system message of a row: its own, or that of all rows; None: the chat template's."""
    column = form.system_column
    if column is None:
        return form.system
    name = referred_column(column)
    if name is not None and not values.get(name):
        return None
    return render(column, values, where=where, field="system")


def prompt_text(form: PromptFormat, prompt: Prompt, tokenizer: Any, *, where: str = "") -> str:
    """The prompt as the model is given it: the chat template applied, up to where the answer
    starts.
    """
    if isinstance(prompt, list):
        return apply_chat_template(tokenizer, prompt, where=where)
    if form.template == "chat":
        return apply_chat_template(
            tokenizer, chat_messages(prompt, system=form.system), where=where
        )
    return prompt


def last_turn(prompt: Prompt) -> str:
    """What the user said last, as a reward function sees it."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def end_token(tokenizer: Any) -> int:
    """The token that ends an answer."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise BaseModelError(
            "the base's tokenizer has no end-of-text token",
            expected="eos_token in tokenizer_config.json",
        )
    return end


def closing_tokens(form: PromptFormat, tokenizer: Any) -> list[int]:
    """What follows a finished answer: what the chat template writes there, or the end token.

    Tokens that this tokenizer also pads with are left out at the end: transformers' sequence
    classifiers read the last token that is no padding, and so must find it where it was in
    training.
    """
    if form.template == "chat":
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PLACE}]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
        closing: list[int] = tokenizer(
            Rendered(text.partition(PLACE)[2]), add_special_tokens=False
        )["input_ids"]
    else:
        closing = [end_token(tokenizer)]
    padding = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    while closing and closing[-1] == padding:
        closing.pop()
    return closing


def _column(template: str, values: Mapping[str, Any]) -> Any:
    """The value of the column that the template takes as it is; None for any other template."""
    column = referred_column(template)
    return values.get(column) if column is not None else None
