"""A request's fields → generation settings and prompts: OpenAI's words on one side, the runtime's
on the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgetune.core.errors import AdapterError, InputError, SignatureError
from edgetune.core.tasks import CLASSIFICATION, REWARD
from edgetune.runtime.generation.settings import SAMPLING_NUMBERS, GenerationSettings
from edgetune.runtime.scheduler.requests import GenerationRequest
from edgetune.runtime.server.http.errors import ApiError, bad_request, not_found
from edgetune.runtime.server.http.service import Service
from edgetune.runtime.server.http.tools import call_grammar, chosen_tools, plain_tool_messages

SAME_NAME = (
    *SAMPLING_NUMBERS,
    "seed",
    "stop",
    "confidence",
)


@dataclass(frozen=True)
class Plan:
    """A checked request: its rows (prompts × n), in the order of the answer's choices."""

    model: str
    adapter: str | None
    rows: list[GenerationRequest]
    prompt_tokens: int
    """of every prompt once"""
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    """None without log-probabilities"""
    tools: bool = False
    """whether the model may call tools"""


def plan_chat(service: Service, body: Mapping[str, Any], request_id: str) -> Plan:
    """The rows of a chat request. InputError and ApiError say what does not fit."""
    _check_task(service)
    top = body.get("top_logprobs")
    if top is not None and not body.get("logprobs"):
        raise bad_request(
            "'top_logprobs' needs 'logprobs' to be true.",
            param="top_logprobs",
            code="invalid_value",
        )
    logprobs = (top or 0) if body.get("logprobs") else None
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        message = "'max_tokens' and 'max_completion_tokens' say the same: give one of them."
        raise bad_request(message, param="max_tokens", code="invalid_value")
    adapter = service.adapter_of(body["model"])
    _check_text(service, adapter)
    tools = chosen_tools(body, service.runtime.tokenizer.tool_template)
    messages = [plain_message(message) for message in body["messages"]]
    grammar = call_grammar(tools, body.get("tool_choice"))
    if grammar is not None:
        constrained = [
            name for name in ("response_format", "guided_regex", "guided_grammar") if body.get(name)
        ]
        if constrained:
            message = (
                f"A 'tool_choice' that demands a call and '{constrained[0]}' exclude each other."
            )
            raise bad_request(message, param="tool_choice", code="invalid_value")
        body = {**body, "guided_grammar": grammar}
    prompt = _prompt_ids(
        service,
        messages,
        adapter,
        tools=tools or None,
        control_tokens=body.get("control_tokens"),
    )
    return replace(_plan(service, body, [prompt], adapter, logprobs, request_id), tools=bool(tools))


def plan_completion(service: Service, body: Mapping[str, Any], request_id: str) -> Plan:
    """The rows of a completions request: prompts are taken as they are, without template."""
    _check_task(service)
    adapter, given = service.adapter_of(body["model"]), body["prompt"]
    _check_text(service, adapter)
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    special = body.get("add_special_tokens", True)
    encode = service.runtime.opened.tokenizer_of(adapter, body.get("control_tokens")).encode
    ids = [
        encode(p, add_special_tokens=special) if isinstance(p, str) else list(p) for p in prompts
    ]
    vocabulary = service.runtime.manifest.graph.vocab_size
    if any(token >= vocabulary for row in ids for token in row):
        raise bad_request(
            f"'prompt' holds a token id that is not below {vocabulary}.", param="prompt"
        )
    return _plan(service, body, ids, adapter, body.get("logprobs"), request_id)


def settings_of(
    service: Service, body: Mapping[str, Any], adapter: str | None, logprobs: int | None
) -> GenerationSettings:
    """What the request says, else the adapter's own defaults, else the runtime's."""
    given = {name: body.get(name) for name in SAME_NAME}
    top_k = body.get("top_k")
    given |= {
        "top_k": None if top_k is None else max(top_k, 0),
        "max_new_tokens": body.get("max_completion_tokens", body.get("max_tokens")),
        "logprobs": logprobs,
        "logit_bias": _bias(service, body.get("logit_bias")),
        "regex": body.get("guided_regex"),
        "grammar": body.get("guided_grammar"),
        "schema": _json_schema(body.get("response_format")),
        "response_format": (
            {"type": "text"} if (body.get("response_format") or {}).get("type") == "text" else None
        ),
    }
    constraints = [name for name in ("schema", "regex", "grammar") if given[name] is not None]
    if len(constraints) > 1:
        message = "Give one of 'response_format', 'guided_regex' and 'guided_grammar', not several."
        raise bad_request(message, param="response_format", code="invalid_value")
    return service.runtime.settings(adapter, **given)


def error_of(error: Exception, *, param: str | None = None) -> ApiError | None:
    """An error of the runtime that is the request's doing, as an answer; None for what is not."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        long = "longer than" in error.what
        return bad_request(
            str(error), param=param, code="context_length_exceeded" if long else None
        )
    if isinstance(error, AdapterError) and error.what.startswith("unknown adapter"):
        message = f"The model '{error.got}' does not exist. {error.fix}".rstrip()
        return not_found(message, code="model_not_found", param="model")
    if isinstance(error, AdapterError):
        return bad_request(str(error), param=param, code="adapter_error")
    if isinstance(error, SignatureError):
        return bad_request(str(error), param=param, code="signature_error")
    return None


def _plan(
    service: Service,
    body: Mapping[str, Any],
    prompts: list[list[int]],
    adapter: str | None,
    logprobs: int | None,
    request_id: str,
) -> Plan:
    options, stream = body.get("stream_options"), bool(body.get("stream"))
    if options is not None and not stream:
        message = "'stream_options' is only allowed when 'stream' is true."
        raise bad_request(message, param="stream_options", code="invalid_value")
    for ids in prompts:
        _check_length(service, len(ids), param="messages" if "messages" in body else "prompt")
    count = body.get("n", 1)
    _check_rows(service, len(prompts) * count)
    settings, deadline = (
        settings_of(service, body, adapter, logprobs),
        service.deadline(body.get("deadline_s")),
    )
    rows = [
        GenerationRequest(
            ids, adapter, settings, deadline=deadline, request_id=request_id, choice=choice
        )
        for ids in prompts
        for choice in range(count)
    ]
    usage = bool((options or {}).get("include_usage"))
    return Plan(body["model"], adapter, rows, sum(map(len, prompts)), stream, usage, logprobs)


def _check_task(service: Service) -> None:
    if not service.runtime.manifest.is_decoder:
        what = "This bundle classifies and embeds; it generates no text."
        raise bad_request(what, param="model", code="wrong_task")


def _check_text(service: Service, adapter: str | None) -> None:
    task = service.runtime.task(adapter)
    if task in (CLASSIFICATION, REWARD):
        does, ask = (
            ("scores answers", "/score or /pooling")
            if task == REWARD
            else ("classifies texts", "/classify")
        )
        what = (
            f"The model '{service.runtime.chosen(adapter)}' {does}; it generates no text."
            f" Ask {ask}."
        )
        raise bad_request(what, param="model", code="wrong_task")


def _check_length(service: Service, tokens: int, *, param: str) -> None:
    room = service.runtime.manifest.graph.max_length - 1
    limit = min(room, service.options.max_prompt_tokens or room)
    if tokens == 0:
        raise bad_request(
            "The prompt is empty: expected one token at least.", param=param, code="empty_prompt"
        )
    if tokens > limit:
        message = (
            f"The prompt has {tokens} tokens, but at most {limit} are allowed, so that one can"
            " follow."
        )
        raise bad_request(message, param=param, code="context_length_exceeded")


def _check_rows(service: Service, rows: int) -> None:
    limit = service.scheduler.max_queue
    if rows > limit:
        raise bad_request(
            f"The request asks for {rows} texts, but at most {limit} fit the queue.", param="n"
        )


def _prompt_ids(
    service: Service,
    messages: list[dict[str, Any]],
    adapter: str | None,
    **how: Any,
) -> list[int]:
    try:
        return service.runtime.prompt_ids(messages, adapter, **how)
    except InputError as error:
        raise error_of(error, param="messages") or error from error


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Text parts joined; `developer` is OpenAI's newer word for `system`. What is null does not
    reach the template.
    """
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise bad_request(
            "A message without 'content' must have 'tool_calls'.",
            param="messages",
            code="invalid_value",
        )
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    role = "system" if message["role"] == "developer" else message["role"]
    name = {"name": message["name"]} if message.get("name") else {}
    return {"role": role, "content": text, **name, **plain_tool_messages(message)}


def _bias(
    service: Service, bias: Mapping[str, float] | None
) -> tuple[tuple[int, float], ...] | None:
    if bias is None:
        return None
    vocabulary, pairs = service.runtime.manifest.graph.vocab_size, []
    for token, value in bias.items():
        if not token.isdecimal() or len(token) > 9 or int(token) >= vocabulary:
            message = f"'logit_bias' names {token[:20]!r}: expected a token id below {vocabulary}."
            raise bad_request(message, param="logit_bias", code="invalid_value")
        pairs.append((int(token), float(value)))
    return tuple(pairs)


def _json_schema(form: Mapping[str, Any] | None) -> str | None:
    """The JSON schema that an answer must fit, as text; None when it is free text."""
    kind = (form or {}).get("type", "text")
    if kind == "json_object":
        return '{"type": "object"}'
    return json.dumps(form["json_schema"]["schema"]) if form and kind == "json_schema" else None
