"""What `POST /v1/responses` may hold, and its words in those of a chat request, which plans it.

OpenAI's newer interface says the same in other words: `input` and `instructions` for messages,
`text.format` for `response_format`, functions without a layer around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgetune.runtime.server.http.bodies import (
    CONTROL_TOKENS,
    DEADLINE,
    FUNCTION_NAME,
    MODEL_NAME,
    NO_STORE,
    SAMPLING,
    SCHEMA_NAME,
    TEXT,
    USER,
)
from edgetune.runtime.server.http.errors import ApiError, bad_request
from edgetune.runtime.server.http.json_body import Schema, either, obj, optional, unsupported
from edgetune.runtime.server.http.requests import Plan, plan_chat
from edgetune.runtime.server.http.service import Service

LOGPROBS = "message.output_text.logprobs"
ITEM_ID = optional("string", maxLength=128)
STATUS = optional("string", enum=["in_progress", "completed", "incomplete"])
PART = either(
    obj(("type", "text"), type={"type": "string", "enum": ["input_text"]}, text=TEXT),
    obj(
        ("type", "text"),
        type={"type": "string", "enum": ["output_text"]},
        text=TEXT,
        annotations=optional("array", maxItems=0),
        logprobs=optional("array", description="As an answer had them; not read."),
    ),
)
PARTS = {"type": "array", "items": PART, "minItems": 1, "maxItems": 256}
MESSAGE_FIELDS: dict[str, Schema] = {
    "role": {"type": "string", "enum": ["user", "assistant", "system", "developer"]},
    "content": either(TEXT, PARTS),
    "id": ITEM_ID,
    "status": STATUS,
    "phase": optional("string", enum=["commentary", "final_answer"]),
}


def _item(required: Sequence[str], **properties: Schema) -> dict[str, Any]:
    """An item as an answer had it: clients send what their library adds along, as null."""
    unknown = unsupported("an item has no such field here.")
    return obj(required, **properties) | {"additionalProperties": unknown}


ITEM = either(
    _item(
        ("type", "role", "content"),
        type={"type": "string", "enum": ["message"]},
        **MESSAGE_FIELDS,
    ),
    _item(("role", "content"), **MESSAGE_FIELDS),
    _item(
        ("type", "call_id", "name", "arguments"),
        type={"type": "string", "enum": ["function_call"]},
        call_id={"type": "string", "maxLength": 128},
        name=FUNCTION_NAME,
        arguments=TEXT,
        id=ITEM_ID,
        status=STATUS,
    ),
    _item(
        ("type", "call_id", "output"),
        type={"type": "string", "enum": ["function_call_output"]},
        call_id={"type": "string", "maxLength": 128},
        output=either(TEXT, PARTS),
        id=ITEM_ID,
        status=STATUS,
    ),
)
FUNCTION = obj(
    ("type", "name"),
    type={"type": "string", "enum": ["function"]},
    name=FUNCTION_NAME,
    description=optional("string"),
    parameters=optional("object"),
    strict=optional("boolean", description="Arguments are held to the schema in any case."),
)
FORMAT = either(
    {"type": "null"},
    obj(("type",), type={"type": "string", "enum": ["text"]}),
    obj(("type",), type={"type": "string", "enum": ["json_object"]}),
    obj(
        ("type", "name", "schema"),
        type={"type": "string", "enum": ["json_schema"]},
        name=SCHEMA_NAME,
        schema={"type": "object"},
        description=optional("string"),
        strict=optional("boolean", description="Always kept, whether asked for or not."),
    ),
)
SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "confidence",
)
RESPONSES = obj(
    ("model", "input"),
    model=MODEL_NAME,
    input=either(
        {**TEXT, "minLength": 1}, {"type": "array", "items": ITEM, "minItems": 1, "maxItems": 1024}
    ),
    instructions=optional("string", maxLength=TEXT["maxLength"]),
    **{name: SAMPLING[name] for name in SHARED},
    max_output_tokens=optional("integer", minimum=1, maximum=2**31 - 1),
    text={
        "type": ["object", "null"],
        "properties": {"format": FORMAT, "verbosity": unsupported("ask for it in the prompt.")},
        "additionalProperties": False,
    },
    tools=optional(
        "array",
        items=FUNCTION,
        maxItems=128,
        description="Where the bundle's chat template has tools.",
    ),
    tool_choice=either(
        optional("string", enum=["none", "auto", "required"]),
        obj(("type", "name"), type={"type": "string", "enum": ["function"]}, name=FUNCTION_NAME),
    ),
    parallel_tool_calls=optional(
        "boolean", enum=[True], description="Only true: a model may call several at once."
    ),
    stream=optional("boolean"),
    stream_options={
        "type": ["object", "null"],
        "properties": {"include_obfuscation": optional("boolean", enum=[False])},
        "additionalProperties": False,
    },
    include=optional("array", items={"type": "string", "enum": [LOGPROBS]}, maxItems=16),
    top_logprobs=optional("integer", minimum=0, maximum=20),
    metadata=optional(
        "object",
        additionalProperties={"type": "string", "maxLength": 512},
        maxProperties=16,
        description="Given back with the answer.",
    ),
    user=USER,
    safety_identifier=USER,
    prompt_cache_key=optional(
        "string", maxLength=256, description="Not needed: equal beginnings are found by themselves."
    ),
    service_tier=optional("string", enum=["auto", "default"]),
    truncation=optional("string", enum=["disabled"], description="Only disabled."),
    background=optional("boolean", enum=[False], description="Only false."),
    store=optional("boolean", enum=[False], description=f"Only false: {NO_STORE}"),
    previous_response_id=unsupported(f"{NO_STORE} Send the earlier items in 'input'."),
    conversation=unsupported(f"{NO_STORE} Send the earlier items in 'input'."),
    prompt=unsupported("prompts are kept by the client."),
    reasoning=unsupported("there is no reasoning to set."),
    max_tool_calls=unsupported("there are no built-in tools."),
    control_tokens=CONTROL_TOKENS,
    deadline_s=DEADLINE,
)
PARAMS = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
}
"""A chat request's names of what can be at fault → those of a response's."""


def plan_response(service: Service, body: Mapping[str, Any], request_id: str) -> Plan:
    """The one row of a response. ApiError says what does not fit, in the words of this endpoint."""
    try:
        return plan_chat(service, chat_body(body), request_id)
    except ApiError as error:
        error.param = PARAMS.get(error.param or "", error.param)
        raise


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that asks for the same."""
    same = (*SHARED, "model", "stream", "user", "safety_identifier", "control_tokens", "deadline_s")
    chat = {name: body[name] for name in same if name in body}
    chat["messages"] = list(_messages(body))
    wanted = {
        "max_completion_tokens": body.get("max_output_tokens"),
        "response_format": _response_format((body.get("text") or {}).get("format")),
        "tools": [_tool(tool) for tool in body["tools"]] if body.get("tools") else None,
        "tool_choice": _tool_choice(body.get("tool_choice")),
    }
    chat |= {name: value for name, value in wanted.items() if value is not None}
    if LOGPROBS in (body.get("include") or ()):
        if chat.get("tools"):
            message = f"'{LOGPROBS}' and 'tools' exclude each other."
            raise bad_request(message, param="include", code="invalid_value")
        chat |= {"logprobs": True, "top_logprobs": body.get("top_logprobs", 0)}
    elif body.get("top_logprobs") is not None:
        message = f"'top_logprobs' needs '{LOGPROBS}' in 'include'."
        raise bad_request(message, param="top_logprobs", code="invalid_value")
    return chat


def _messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The conversation: calls that follow each other are of one message, as a model writes them."""
    if body.get("instructions"):
        yield {"role": "system", "content": body["instructions"]}
    given = body["input"]
    calls: list[dict[str, Any]] = []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        kind = item.get("type", "message")
        if kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append({"id": item["call_id"], "type": "function", "function": function})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if kind == "message":
            yield {"role": item["role"], "content": _joined(item["content"])}
        else:
            output = _joined(item["output"])
            yield {"role": "tool", "tool_call_id": item["call_id"], "content": output}
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


def _joined(content: str | list[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping):
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _response_format(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if form is None or form["type"] != "json_schema":
        return None if form is None else dict(form)
    return {
        "type": "json_schema",
        "json_schema": {name: value for name, value in form.items() if name != "type"},
    }
