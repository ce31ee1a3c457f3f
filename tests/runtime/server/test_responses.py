"""`/v1/responses` seen by OpenAI's official client: items in, items and events out."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from server_helpers import Running, in_background, paced

from edgetune.runtime.server.http.responses_request import chat_body

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}answer in"
    " <tool_call></tool_call>\n{% endif %}{% for message in messages %}{{ message.role }}: {{"
    " message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function |"
    " tojson }}</tool_call>{% endfor %}\n{% endfor %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
LIGHTS: Any = {"type": "function", "name": "lights", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module", autouse=True)
def template(server: Running) -> None:
    """One that has a place for tools."""
    server.runtime.tokenizer.chat_template = server.runtime.tokenizer.tool_template = TEMPLATE


def asked(server: Running, given: Any = "hello", **more: Any) -> Any:
    more = {"model": "tiny", "max_output_tokens": 8, **more}
    return server.client().responses.create(input=given, **more)


@pytest.mark.parametrize("model", ["tiny", "a", "b"])
def test_a_text_is_answered_as_by_the_runtime(server: Running, model: str) -> None:
    answer = asked(server, model=model)
    adapter = None if model == "tiny" else model
    messages = [{"role": "user", "content": "hello"}]
    (expected,) = server.runtime.generate([messages], adapter, max_new_tokens=8)
    assert answer.output_text == expected.text and answer.model == model
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        expected.prompt_tokens,
        expected.completion_tokens,
    )
    length = expected.finish_reason == "length"
    assert answer.status == ("incomplete" if length else "completed")
    reason = "max_output_tokens" if length else None
    assert getattr(answer.incomplete_details, "reason", None) == reason
    assert (answer.error, answer.store) == (None, False)


def test_instructions_and_items_make_the_conversation(server: Running) -> None:
    items = [
        {"role": "user", "content": "on"},
        {
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "id": "msg_1",
            "content": [{"type": "output_text", "text": "is it?", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "lights", "arguments": '{"on": true}'},
        {"type": "function_call", "call_id": "c2", "name": "lights", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {"role": "user", "content": [{"type": "input_text", "text": "and "}] * 2},
    ]
    body = {"model": "tiny", "instructions": "Be brief.", "input": items, "tools": [LIGHTS]}
    answer = asked(server, items, instructions="Be brief.", tools=[LIGHTS])
    text = (
        "lights answer in <tool_call></tool_call>\nsystem: Be brief.user: onassistant: is it?"
        'assistant: <tool_call>{"name": "lights", "arguments": {"on": true}}</tool_call><tool_call>'
        '{"name": "lights", "arguments": {}}</tool_call>tool: doneuser: and and '
    )
    tokenizer = server.runtime.tokenizer
    chat = [m | {"content": m["content"] or ""} for m in chat_body(body)["messages"]]
    assert [m["role"] for m in chat] == ["system", "user", "assistant", "assistant", "tool", "user"]
    assert answer.usage.input_tokens == len(tokenizer.encode(text, add_special_tokens=False))
    assert (answer.instructions, answer.tools[0].name) == ("Be brief.", "lights")


def test_events_come_in_order_and_join_to_the_whole_answer(server: Running) -> None:
    whole, events = asked(server), list(asked(server, stream=True))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    end = ["output_text.done", "content_part.done", "output_item.done", whole.status]
    assert names[-4:] == end
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events[4:-4])
    assert deltas == whole.output_text == events[-4].text
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    last = events[-1].response
    assert (last.output_text, last.usage) == (whole.output_text, whole.usage)
    assert last.output[0].id == events[2].item.id == events[4].item_id


def test_the_clients_own_stream_collects_the_same(server: Running) -> None:
    stop = {"max_output_tokens": 90, "text": {"format": json_format()}}
    with server.client().responses.stream(model="tiny", input="hello", **stop) as stream:  # type: ignore[arg-type]
        collected = stream.get_final_response()
    assert collected.output_text == asked(server, **stop).output_text


def json_format() -> dict[str, Any]:
    return {"type": "json_schema", "name": "switch", "strict": True, "schema": SCHEMA}


def test_structured_output_fits_its_schema(server: Running) -> None:
    answer = asked(server, text={"format": json_format()}, max_output_tokens=90)
    assert list(json.loads(answer.output_text)) == ["on"] and answer.status == "completed"
    assert answer.text.format.schema_ == SCHEMA


def test_a_required_call_is_an_item_of_its_own(server: Running) -> None:
    more = {"tools": [LIGHTS], "tool_choice": "required", "max_output_tokens": 250}
    (call,) = asked(server, **more).output
    assert (call.type, call.name, list(json.loads(call.arguments))) == (
        "function_call",
        "lights",
        ["on"],
    )
    events = list(asked(server, stream=True, **more))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert events[4].arguments == call.arguments == events[5].item.arguments
    assert events[-1].response.output[0].call_id == events[2].item.call_id
    again = [{"role": "user", "content": "on"}, events[-1].response.output[0].to_dict()]
    again.append({**again[1], "namespace": None, "caller": None})  # as the client's model_dump has
    done = {"type": "function_call_output", "call_id": events[2].item.call_id, "output": "done"}
    assert asked(server, [*again, done], tools=[LIGHTS]).status in ("completed", "incomplete")


def test_a_named_function_is_called(server: Running) -> None:
    doors = {**LIGHTS, "name": "doors"}
    choice = {"type": "function", "name": "doors"}
    (call,) = asked(server, tools=[LIGHTS, doors], tool_choice=choice, max_output_tokens=250).output
    assert call.name == "doors"


def test_text_before_a_call_is_a_message_before_it(server: Running) -> None:
    from edgetune.runtime.server.http.requests import plan_chat
    from edgetune.runtime.server.http.responses_answer import ResponseEnvelope

    body = {"model": "tiny", "input": "on", "tools": [LIGHTS]}
    plan = plan_chat(server.service, chat_body(body), "r")
    envelope = ResponseEnvelope(plan, "r", body)
    (completion,) = server.runtime.generate(["x"], max_new_tokens=1)
    call = '<tool_call>{"name": "lights", "arguments": {}}</tool_call>'
    events = [
        event
        for piece in ("\n ", "Sure", ".\n", call, "\n")
        for event in envelope.more(0, piece, None)
    ]
    events += [*envelope.ended(0, completion), *envelope.last([completion])]
    items = events[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["message", "function_call"]
    assert items[0]["content"][0]["text"] == "\n Sure.\n"
    assert [e["item"]["status"] for e in events if e["type"].endswith("item.done")] == [
        "completed"
    ] * 2


def test_log_probabilities_come_where_they_are_included(server: Running) -> None:
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = asked(server, max_output_tokens=3, **more)
    told = answer.output[0].content[0].logprobs
    assert len(told) == 3 and all(len(token.top_logprobs) == 2 for token in told)
    assert "".join(token.token for token in told) == answer.output_text
    deltas = [
        e for e in asked(server, stream=True, max_output_tokens=3, **more) if hasattr(e, "delta")
    ]
    assert sum(len(delta.logprobs) for delta in deltas) == 3


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "x", "name": "me"}]}, "input[0].name"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": "x" * 100_000}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "tools": [LIGHTS]}, "include"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_not_to_be_had_is_refused_by_name(
    change: dict[str, Any], param: str, server: Running
) -> None:
    answer = server.post("/v1/responses", {"model": "tiny", "input": "hello", **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.json()


def test_an_unknown_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        asked(server, model="nobody")


def test_a_stream_whose_time_is_over_ends_with_a_failed_response(server: Running) -> None:
    body: dict[str, Any] = {"model": "a", "input": "hello", "stream": True, "deadline_s": 0.5}
    body["max_output_tokens"] = 200
    with paced(server) as pace:
        late = in_background(lambda: server.post("/v1/responses", body))
        while not late.done():
            pace.step()
            time.sleep(0.05)
    *_, last = late.result().text.strip().split("\n\n")
    assert last.startswith("event: response.failed\ndata: ")
    response = json.loads(last.partition("data: ")[2])["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "deadline_exceeded")


def test_the_metrics_count_it(server: Running) -> None:
    asked(server)
    page = server.get("/metrics").text
    assert 'edgetune_http_requests_total{route="/v1/responses",status="200"}' in page
