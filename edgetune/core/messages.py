"""A row's conversation, in OpenAI's, ShareGPT's or TRL's spelling, as the messages that a chat
template reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from edgetune.core.errors import DataError
from edgetune.core.settings import shown

ROLES = ("system", "user", "assistant", "tool")
ALSO = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
CONVERSATIONS = ("messages", "conversations", "conversation")  # columns that hold one
READ = {"role", "from", "content", "value", "weight", "function_call"}
# what a chat template may read of a message beside role and content
PASSED_ON = ("name", "tool_call_id", "tool_calls", "reasoning_content", "thinking")


class Conversation(list[dict[str, Any]]):
    """Messages, the `tools` that the assistant may call, and `silent`: the places of answers that
    are not to be learned.
    """

    def __init__(
        self,
        messages: Iterable[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        silent: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(messages)
        self.tools = tools
        self.silent = silent

    def until(self, end: int) -> Conversation:
        """The messages before place `end`."""
        return Conversation(self[:end], tools=self.tools, silent=self.silent)

    def with_system(self, system: str | None) -> Conversation:
        """With this system message at the start, where there is none."""
        if system is None or (self and self[0]["role"] == "system"):
            return self
        first = {"role": "system", "content": system}
        return Conversation(
            [first, *self], tools=self.tools, silent=frozenset(at + 1 for at in self.silent)
        )


def tools_of(messages: Any) -> list[Any] | None:
    """The tools that come with a prompt, where it is a conversation that has some."""
    return getattr(messages, "tools", None) or None


def conversation_column(values: Mapping[str, Any]) -> str | None:
    """The column of a row that holds a conversation; None where there is none."""
    return next((name for name in CONVERSATIONS if _is_conversation(values.get(name))), None)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and {"role", "from"} & set(one) for one in value)
    )


def read_messages(value: Any, *, where: str, field: str) -> Conversation:
    """The messages of a list, roles and contents in a chat template's words.

    `weight: 0` (OpenAI's) makes an answer silent. DataError for one that cannot be used, saying
    why.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f'the column "{field}" cannot be used',
            where=where,
            expected='a list of {"role", "content"}',
            got="an empty conversation" if value == [] else shown(value),
        )
    messages, silent = [], set()
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        messages.append(_message(message, where=where, place=place))
        weight = message.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise DataError(
                f"{place}.weight is out of range", where=where, expected="0 or 1", got=shown(weight)
            )
        if weight == 0 and messages[-1]["role"] == "assistant":
            silent.add(number)
    return Conversation(messages, silent=frozenset(silent))


def tools_in(values: Mapping[str, Any], *, where: str) -> list[Any] | None:
    """The row's `tools` (or OpenAI's older `functions`), also as JSON text; None without any."""
    found = values.get("tools")
    if found is None and isinstance(values.get("functions"), (list, str)):
        found = _parsed(values["functions"])
        if isinstance(found, list):
            found = [{"type": "function", "function": one} for one in found]
    found = _filled(_parsed(found))
    if not found:
        return None
    if not isinstance(found, list):
        raise DataError(
            'the column "tools" cannot be used',
            where=where,
            expected="a list of functions with their JSON schemas",
            got=shown(found),
        )
    return found


def unread_keys(value: Any) -> list[str]:
    """The keys of a list's messages that nothing reads, sorted."""
    messages = value if isinstance(value, list) else []
    found = {
        key
        for one in messages
        if isinstance(one, Mapping)
        for key, item in one.items()
        if item is not None
    }
    return sorted(found - READ - set(PASSED_ON))


def calls_text(message: Mapping[str, Any]) -> str:
    """An answer's text with its tool calls, in the widespread form of Hermes and Qwen."""
    calls = [
        "<tool_call>\n"
        + json.dumps(call.get("function", call), ensure_ascii=False)
        + "\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def _message(message: Any, *, where: str, place: str) -> dict[str, Any]:
    def error(reason: str, expected: str, got: Any) -> DataError:
        return DataError(
            f"{place} cannot be used: {reason}", where=where, expected=expected, got=shown(got)
        )

    if not isinstance(message, Mapping):
        raise error("it is no message", 'an object with "role" and "content"', message)
    named = message.get("role", message.get("from"))
    role = ALSO.get(named, named) if isinstance(named, str) else named
    if role not in ROLES:
        raise error("its role is not known", f"one of {', '.join((*ROLES, *ALSO))}", named)
    found: dict[str, Any] = {"role": role}
    content = message.get("content", message.get("value"))
    calls = _filled(_parsed(message.get("tool_calls"))) or []
    if message.get("function_call"):
        calls = [_filled(_parsed(message["function_call"]))]
    if named == "function_call":
        calls, content = [_parsed(content)], ""
    if isinstance(content, list):
        parts = [one if isinstance(one, str) else _part(one) for one in content]
        if None in parts:
            wrong = content[parts.index(None)]
            raise error("a part of its content is no text", '{"type": "text", "text"}', wrong)
        content = "".join(str(part) for part in parts)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise error("its content is no text", "a string, or a list of parts of text", content)
    found["content"] = content
    for key in PASSED_ON:
        if message.get(key) is not None and key != "tool_calls":
            found[key] = message[key]
    if calls:
        if role != "assistant":
            raise error("only the assistant calls tools", "tool_calls of the assistant", named)
        found["tool_calls"] = [_call(call, error) for call in calls]
    return found


def _part(part: Any) -> str | None:
    """The text of a part of a content."""
    text = part.get("text") if isinstance(part, Mapping) else None
    is_text = isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text")
    return text if is_text and isinstance(text, str) else None


def _call(call: Any, error: Any) -> dict[str, Any]:
    """A tool call whose arguments are an object, as transformers' chat templates want them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise error("a tool call has no function with a name", '{"function": {"name", …}}', call)
    arguments = _parsed(function.get("arguments", {}))
    made: dict[str, Any] = {"type": "function"}
    if call.get("id") is not None:
        made["id"] = call["id"]
    return {**made, "function": {"name": function["name"], "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """JSON that stands in a string; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _filled(value: Any) -> Any:
    """Without the nulls that a table's structs have where a row has no such key."""
    if isinstance(value, Mapping):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value
