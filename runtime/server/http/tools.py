"""Tool calls in the Hermes form that many chat templates teach: `<tool_call>{"name",
"arguments"}</tool_call>`.

A template that takes `tools` shows them to the model; what it answers between the two tags becomes
`tool_calls`. With `tool_choice` "required" or a function's name, a grammar holds the model to a
call whose arguments fit the schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgetune.core.files import parse_json
from edgetune.runtime.generation.sampling import stop_overlap
from edgetune.runtime.server.http.errors import bad_request

OPENING, CLOSING = "<tool_call>", "</tool_call>"
SPELLING = {"whitespace_pattern": "", "item_separator": ", ", "key_separator": ": "}
"""llguidance's words for JSON as `tojson` writes it: a small model can write blanks for ever."""


def takes_tools(template: str | None) -> bool:
    """Whether a chat template shows tools to the model and teaches it this form."""
    return template is not None and OPENING in template and "tools" in template


def chosen_tools(body: Mapping[str, Any], template: str | None) -> list[Mapping[str, Any]]:
    """The tools that a request offers; none with `tool_choice` "none". ApiError when the template
    knows no tools.
    """
    tools, choice = body.get("tools") or [], body.get("tool_choice", "auto")
    if choice == "none" or not tools:
        if choice not in ("none", "auto"):
            raise bad_request(
                "'tool_choice' needs 'tools'.", param="tool_choice", code="invalid_value"
            )
        return []
    if not takes_tools(template):
        message = (
            "Unsupported parameter: 'tools'. This bundle's chat template has no tools; use"
            " response_format."
        )
        raise bad_request(message, param="tools", code="unsupported_parameter")
    return list(tools)


def call_grammar(tools: Sequence[Mapping[str, Any]], choice: Any) -> str | None:
    """A Lark grammar (llguidance's, with `%json`) of one call that must be made; None when the
    model may choose.
    """
    if choice in (None, "auto", "none"):
        return None
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        functions = [f for f in functions if f["name"] == choice["function"]["name"]]
        if not functions:
            message = (
                f"'tool_choice' names {choice['function']['name']!r}, which is not in 'tools'."
            )
            raise bad_request(message, param="tool_choice", code="invalid_value")
    calls, rules = [], []
    for number, function in enumerate(functions):
        calls.append(f"call_{number}")
        before = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        rules.append(f'call_{number}: {json.dumps(before)} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps(_arguments_schema(function))}")
    start = f'start: "{OPENING}\\n" ({" | ".join(calls)}) "\\n{CLOSING}"'
    return "\n".join([start, *rules]) + "\n"


class ToolParser:
    """Text in pieces → content that is certain, and whole calls. What is no JSON call stays
    content.
    """

    def __init__(self) -> None:
        self._held = ""
        self.calls = 0

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Take more text; (content, calls) that are certain now. `last`: nothing follows."""
        self._held += text
        content, calls = [], []
        while (start := self._held.find(OPENING)) >= 0 and (
            end := self._held.find(CLOSING, start)
        ) >= 0:
            before, inside = self._held[:start], self._held[start + len(OPENING) : end]
            self._held = self._held[end + len(CLOSING) :]
            call = _parse(inside)
            content.append(before if call else f"{before}{OPENING}{inside}{CLOSING}")
            calls += [call] if call else []
        if last:
            keep = 0
        elif (start := self._held.find(OPENING)) >= 0:
            keep = len(self._held) - start
        else:
            keep = stop_overlap(self._held, (OPENING,))
        certain, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        self.calls += len(calls)
        return "".join([*content, certain]), calls


def plain_tool_messages(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a template reads of an earlier call or its result: arguments as an object, as the model
    wrote them.
    """
    found: dict[str, Any] = {}
    if message.get("tool_call_id") is not None:
        found["tool_call_id"] = message["tool_call_id"]
    if message.get("tool_calls"):
        found["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": _function(call)}
            for call in message["tool_calls"]
        ]
    return found


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    given = call["function"]["arguments"]
    try:
        arguments = parse_json(given.encode("utf-8"))
    except ValueError:  # also what is nested too deeply, or half a surrogate pair
        raise bad_request(
            f"The arguments of tool call {call['id']!r} are not JSON.", param="messages"
        ) from None
    return {"name": call["function"]["name"], "arguments": arguments}


def _arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """A schema of its own, since a `$ref` counts from the root; spelled as templates spell it."""
    given = function.get("parameters") or {}
    if given.get("type", "object") != "object":
        message = (
            f"The parameters of {function['name']!r} have the type {given['type']!r:.40}: expected"
            " 'object'."
        )
        raise bad_request(message, param="tools", code="invalid_value")
    return {"type": "object", "x-guidance": SPELLING, **given}


def _parse(inside: str) -> dict[str, Any] | None:
    try:
        value = json.loads(inside)
        fits = (
            isinstance(value, dict)
            and isinstance(value.get("name"), str)
            and isinstance(value.get("arguments"), dict)
        )
        if not fits:
            return None
        return {"name": value["name"], "arguments": json.dumps(value["arguments"], allow_nan=False)}
    except (ValueError, RecursionError):  # NaN and what is nested too deeply are no call either
        return None
