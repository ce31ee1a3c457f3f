"""Tools over HTTP: shown to the model by its template, called in its words, told in OpenAI's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runtime_helpers import decoder_bundle
from server_helpers import Running, serve

from edgetune.runtime.server.http.tools import (
    CLOSING,
    OPENING,
    ToolParser,
    call_grammar,
    takes_tools,
)

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}answer in"
    " <tool_call></tool_call>\n{% endif %}{% for message in messages %}{{ message.role }}: {{"
    " message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function |"
    " tojson }}</tool_call>{% endfor %}\n{% endfor %}"
)
LIGHTS = {
    "type": "function",
    "function": {
        "name": "lights",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}
HELLO: list[Any] = [{"role": "user", "content": "on"}]


@pytest.fixture(scope="module", autouse=True)
def template(server: Running) -> None:
    """One that has a place for tools."""
    server.runtime.tokenizer.chat_template = server.runtime.tokenizer.tool_template = TEMPLATE


def asked(server: Running, **more: Any) -> Any:
    return server.client().chat.completions.create(
        model="tiny", messages=HELLO, tools=[LIGHTS], max_tokens=90, **more
    )


def test_a_required_call_fits_the_tools_schema(server: Running) -> None:
    (choice,) = asked(server, tool_choice="required").choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, list(json.loads(call.function.arguments))) == ("lights", ["on"])
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_a_calls_arguments_may_refer_to_definitions_of_their_own(server: Running) -> None:
    switch = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    parameters = {
        "$defs": {"Switch": {**switch, "additionalProperties": False}},
        "properties": {"lamp": {"$ref": "#/$defs/Switch"}},
        "required": ["lamp"],
        "additionalProperties": False,
    }  # as pydantic writes nested models
    tool = {"type": "function", "function": {"name": 'say "lié"', "parameters": parameters}}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 90, "tools": [tool, LIGHTS]}
    choice = {"type": "function", "function": {"name": 'say "lié"'}}
    answer = server.post("/v1/chat/completions", {**body, "tool_choice": choice}).json()
    ((call,),) = [one["message"]["tool_calls"] for one in answer["choices"]]
    arguments = call["function"]["arguments"]
    assert call["function"]["name"] == 'say "lié"'
    assert arguments in ('{"lamp": {"on": true}}', '{"lamp": {"on": false}}')


def test_a_call_is_spelled_without_room_for_blanks(server: Running) -> None:
    """A small model writes blanks until its tokens run out, wherever a form lets it."""
    blanks = {str(token): 100 for token in server.runtime.tokenizer.encode(" ")}
    (choice,) = asked(server, tool_choice="required", logit_bias=blanks).choices
    assert choice.finish_reason == "tool_calls"


def test_a_streamed_call_is_the_same(server: Running) -> None:
    choice = {"type": "function", "function": {"name": "lights"}}
    (whole,) = asked(server, tool_choice=choice).choices
    chunks = [chunk.choices[0] for chunk in asked(server, tool_choice=choice, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (0, "lights", whole.message.tool_calls[0].function.arguments)
    ]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].finish_reason == "tool_calls"


def test_tools_and_their_results_reach_the_template(server: Running) -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "lights", "arguments": '{"on": true}'},
    }
    told = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    body = {"model": "tiny", "messages": told, "tools": [LIGHTS], "max_tokens": 1}
    read = server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    text = (
        'lights answer in <tool_call></tool_call>\nuser: onassistant: <tool_call>{"name": "lights",'
        ' "arguments": {"on": true}}</tool_call>tool: done'
    )
    assert read == len(server.runtime.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "doors"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required", "guided_regex": "x"}, "tool_choice"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}
                ],
            },
            "tools",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], param: str, server: Running) -> None:
    body = {"model": "tiny", "messages": HELLO, "tools": [LIGHTS], **change}
    answer = server.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_arguments_in_a_pit_are_the_requests_doing(depth: int, server: Running) -> None:
    pit = '{"a":' * depth + "1" + "}" * depth
    call = {"id": "c1", "type": "function", "function": {"name": "lights", "arguments": pit}}
    told = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    body = {"model": "tiny", "messages": told, "tools": [LIGHTS], "max_tokens": 1}
    answer = server.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    text = f'{OPENING}{{"name": "x", "arguments": {pit}}}{CLOSING}'
    if depth > 1000:
        assert ToolParser().add(text, last=True) == (text, [])


def test_a_template_without_tools_is_said_so(tiny_decoder: Path) -> None:
    with serve(decoder_bundle(tiny_decoder)) as plain:
        answer = plain.post(
            "/v1/chat/completions", {"model": "tiny", "messages": HELLO, "tools": [LIGHTS]}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_make_no_call(number: str) -> None:
    text = f'{OPENING}{{"name": "x", "arguments": {{"a": {number}}}}}{CLOSING}'
    assert ToolParser().add(text, last=True) == (text, [])


TEXT = (
    'Well. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\nand'
    " <tool_call>no</tool_call> <tool"
)


def test_calls_are_found_however_the_text_is_cut() -> None:
    for size in (1, 2, 3, 7, 100):
        parser, content, calls = ToolParser(), "", []
        for start in range(0, len(TEXT), size):
            text, found = parser.add(TEXT[start : start + size])
            content, calls = content + text, calls + found
        text, found = parser.add("", last=True)
        assert content + text == "Well. \nand <tool_call>no</tool_call> <tool"
        assert [*calls, *found] == [{"name": "f", "arguments": '{"x": 1}'}]


def test_a_model_that_may_choose_has_no_grammar() -> None:
    assert call_grammar([LIGHTS], "auto") is None
    assert takes_tools(TEMPLATE) and not takes_tools("{{ messages }}") and not takes_tools(None)
