"""Answers → the token ids that a reward adapter reads → scores: by a decoder's prefill, without a
step of decode.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgetune.core.arrays import Float32
from edgetune.core.control_tokens import Rendered
from edgetune.core.errors import InputError
from edgetune.core.messages import Conversation, read_messages, tools_in, tools_of
from edgetune.core.templates import Message, check_messages, columns_of, render_columns, with_system
from edgetune.runtime.bundle.tokenizer import BundleTokenizer
from edgetune.runtime.engine.interface import AdapterRow, Decoder
from edgetune.runtime.tasks.open_bundle import OpenBundle

Answered = str | Sequence[Message] | tuple[str | Sequence[Message], str]
"""What is scored: a conversation that ends with the assistant's answer, a (prompt, answer) pair, or
a text as it stands.
"""
SCORE_TOKENS, SCORE_ROWS = 512, 16
"""One batch at most, padding included; a longer row is read alone, piece by piece."""
PLACE = "the assistant's answer"  # stands for an answer where only what follows it is wanted


def read_scores(
    engine: Decoder, rows: Sequence[Sequence[int]], adapters: Sequence[AdapterRow]
) -> tuple[Float32, Float32]:
    """Scores (rows,) of one batch and the last tokens' states (rows, hidden).

    InputError for a row that is empty, too long or holds an unknown id, and for an adapter without
    a score.
    """
    reading = engine.begin_scores(rows, adapters)
    while (found := reading.step()) is None:
        pass
    return found


def score_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers in batches of like length that keep within SCORE_TOKENS and SCORE_ROWS, padding
    included.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == SCORE_ROWS or (len(batch) + 1) * lengths[place] > SCORE_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


class AnswerReader:
    """Answers → token ids as `reward` trains on them: prompt, answer and what closes an answer,
    each tokenised apart.

    A prompt that several answers share is tokenised once, and so is what closes them. A text that
    stands alone is read as it is.
    """

    def __init__(
        self,
        opened: OpenBundle,
        adapter: str | None,
        *,
        truncate: bool,
        limit: int | None = None,
        control_tokens: str | None = None,
    ) -> None:
        """`limit`: tokens of one answer with its prompt (None: the graph's context); `truncate`
        keeps the end; `control_tokens`: see `Runtime.prompt_ids`.
        """
        self._truncate = truncate
        self._form: dict[str, Any] = (
            opened.adapter(adapter).prompt_format if adapter is not None else None
        ) or {}
        self._tokenizer = opened.tokenizer_of(adapter, control_tokens)
        self._template = self._tokenizer.template_of(self._form)
        self._limit = limit or opened.manifest.graph.max_length
        self._heads: dict[str, list[int]] = {}
        self._closing: list[int] | None = None

    def ids(self, answered: Answered) -> list[int]:
        """One answer's token ids. InputError when it has none, or more than the limit."""
        if isinstance(answered, str):
            ids = self._tokenizer.encode(answered, add_special_tokens=self._template == "plain")
        else:
            prompt, answer = prompt_and_answer(answered)
            if self._closing is None:
                self._closing = closing_ids(self._tokenizer, self._template)
            ids = [
                *self._head(prompt),
                *self._tokenizer.encode(answer, add_special_tokens=False),
                *self._closing,
            ]
        if not ids:
            raise InputError("there is nothing to score", expected="one token at least")
        if len(ids) > self._limit and not self._truncate:
            raise InputError(
                "prompt and answer are longer than the context",
                expected=f"at most {self._limit} tokens",
                got=f"{len(ids)} tokens",
                fix="Shorten them, or pass truncate=True (`--truncate`), which keeps the end.",
            )
        return ids[-self._limit :]

    def _head(self, prompt: str | Sequence[Message]) -> list[int]:
        tools = tools_of(prompt)
        key = prompt if isinstance(prompt, str) else json.dumps([list(prompt), tools], default=str)
        key = f"{type(prompt).__name__} {key}"
        if key not in self._heads:
            if isinstance(prompt, str):
                self._heads[key] = self._tokenizer.encode_prompt(prompt, self._form)
            else:
                self._heads[key] = self._tokenizer.encode_chat(
                    with_system(check_messages(prompt), system=self._form.get("system")),
                    tools=tools,
                )
        return self._heads[key]


def answered_ids(
    opened: OpenBundle,
    answered: Answered,
    adapter: str | None,
    *,
    truncate: bool,
    limit: int | None = None,
) -> list[int]:
    """Token ids of one answer; see `AnswerReader`."""
    return AnswerReader(opened, adapter, truncate=truncate, limit=limit).ids(answered)


def prompt_and_answer(answered: Any) -> tuple[str | Sequence[Message], str]:
    """A pair as it is; a conversation cut before its last message, which must be the
    assistant's.
    """
    if isinstance(answered, tuple) and len(answered) == 2 and isinstance(answered[1], str):
        return answered[0], answered[1]
    messages = check_messages(answered)
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str) or len(messages) < 2:
        raise InputError(
            "the conversation does not end with an answer",
            expected="a last message by the assistant, after one by the user",
            got=f"{len(messages)} messages, the last by {last['role']}",
        )
    before = Conversation(map(dict, messages[:-1]), tools=tools_of(answered))
    return before, last["content"]


def closing_ids(tokenizer: BundleTokenizer, template: str) -> list[int]:
    """What follows a finished answer: what the chat template writes there, or the end token;
    without tokens at the end that also pad, as in training
    (`edgetune.data.conversations.closing_tokens`)."""
    end = tokenizer.special_tokens.get("eos_token")
    end_id = None if end is None else tokenizer.tokenizer.token_to_id(end)
    if template == "chat":
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PLACE}]
        closing = tokenizer.encode(
            Rendered(tokenizer.chat_of(turns, add_generation_prompt=False).partition(PLACE)[2]),
            add_special_tokens=False,
        )
    else:
        closing = [] if end_id is None else [end_id]
    padding = tokenizer.padding_id if tokenizer.padding_id is not None else end_id
    while closing and closing[-1] == padding:
        closing.pop()
    return closing


def answered_of(
    row: Mapping[str, Any], form: Mapping[str, Any] | None, *, where: str = ""
) -> Answered:
    """A row to be scored: `messages`; the prompt (by the adapter's template, else `prompt`) and
    `completion`; or `text`.
    """
    if row.get("messages") is not None:
        messages = read_messages(row["messages"], where=where, field="messages")
        messages.tools = tools_in(row, where=where)
        return messages
    answer = row.get("completion")
    if answer is None and isinstance(row.get("text"), str) and row["text"]:
        return str(row["text"])
    template = (form or {}).get("prompt")
    plain = row.get("prompt")
    prompt = (
        plain
        if isinstance(plain, list) or template is None or not set(columns_of(template)) <= set(row)
        else render_columns(template, row, where=where)
    )
    if (
        not isinstance(answer, str)
        or not answer
        or not prompt
        or not isinstance(prompt, (str, list))
    ):
        raise InputError(
            "the row holds no answer to score",
            where=where,
            expected="`prompt` and `completion`, or `messages`, or `text`",
            got=f"columns {', '.join(row) or 'none'}",
        )
    return prompt, answer
