"""Prompts that may be conversations: a row's column holds a text or a list of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.core.control_tokens import Rendered
from edgetune.core.errors import BaseModelError, DataError
from edgetune.core.templates import chat_messages
from edgetune.data.prompts import COLUMN, ROLES, PromptFormat, apply_chat_template, render

Prompt = (
    str | list[dict[str, str]]
)  # the user's turn, or a conversation that ends before the answer
PLACE = "the assistant's answer"  # stands for an answer where only what follows it is wanted


def row_prompt(form: PromptFormat, values: Mapping[str, Any], *, where: str) -> Prompt:
    """The prompt of a row: its template filled in, or the conversation that its column holds."""
    template = form.prompt or "{{ prompt }}"
    value = _column(template, values)
    if not isinstance(value, list):
        return render(template, values, where=where, field="prompt")
    if form.template == "plain":
        raise DataError(
            "the prompt is a conversation, but this stage uses plain prompts",
            where=where,
            expected="a string",
            fix="Choose a base with a chat template, or render the turns in data.prompt.",
        )
    messages = _messages(value, where=where, field="prompt")
    if messages[-1]["role"] == "assistant":
        fix = "Leave the answer out of the prompt."
        raise DataError(
            "the prompt ends with an answer",
            where=where,
            expected="a last message by the user",
            fix=fix,
        )
    if form.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": form.system})
    return messages


def row_answer(template: str, values: Mapping[str, Any], *, where: str, field: str) -> str:
    """An answer of a row: its template filled in, or the one assistant message that its column
    holds.
    """
    value = _column(template, values)
    if not isinstance(value, list):
        return render(template, values, where=where, field=field)
    messages = _messages(value, where=where, field=field)
    if (
        len(messages) != 1
        or messages[0]["role"] != "assistant"
        or not messages[0]["content"].strip()
    ):
        raise DataError(
            f"the {field} answer cannot be used",
            where=where,
            expected="a text, or a list of one message by the assistant",
            got=f"{len(messages)} messages, the last by {messages[-1]['role']}",
        )
    return messages[0]["content"]


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
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


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
    column = COLUMN.fullmatch(template)
    return values.get(column.group(1)) if column is not None else None


def _messages(value: list[Any], *, where: str, field: str) -> list[dict[str, str]]:
    expected = f'a list of {{"role", "content"}}, role one of {", ".join(ROLES)}'
    for number, message in enumerate(value):
        usable = (
            isinstance(message, dict)
            and isinstance(message.get("content"), str)
            and message.get("role") in ROLES
        )
        if not usable:
            raise DataError(
                f"{field}[{number}] is no message",
                where=where,
                expected=expected,
                got=repr(message)[:60],
            )
    if not value:
        raise DataError(f"the {field} is an empty conversation", where=where, expected=expected)
    return [{"role": message["role"], "content": message["content"]} for message in value]
