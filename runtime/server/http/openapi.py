"""`/openapi.json`: the endpoints, with the request tables that validation itself uses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from edgetune import __version__
from edgetune.runtime.server.http.bodies import BODIES
from edgetune.runtime.server.http.responses_request import RESPONSES

STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
OBJECT = {"type": "object"}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": STRING,
                "type": STRING,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
MODEL_CARD = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "parent"],
    "properties": {
        "id": STRING,
        "object": {"const": "model"},
        "created": INTEGER,
        "owned_by": STRING,
        "root": STRING,
        "parent": {"type": ["string", "null"], "description": "An adapter's base model."},
        "max_model_len": INTEGER,
        "task": STRING,
        "rank": {"type": ["integer", "null"]},
        "labels": {"type": ["array", "null"], "items": STRING},
        "prompt_template": {"enum": ["chat", "plain"]},
    },
}
ANSWERS: dict[str, Any] = {
    "Error": ERROR,
    "Model": MODEL_CARD,
    "ModelList": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": MODEL_CARD}},
    },
    "Generated": {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": STRING,
            "object": STRING,
            "created": INTEGER,
            "model": STRING,
            "choices": {"type": "array", "items": OBJECT},
            "usage": OBJECT,
            "timings": OBJECT,
        },
    },
    "Response": {
        "type": "object",
        "required": ["id", "object", "created_at", "model", "status", "output", "usage"],
        "properties": {
            "id": STRING,
            "object": {"const": "response"},
            "created_at": INTEGER,
            "model": STRING,
            "status": {"enum": ["completed", "incomplete"]},
            "incomplete_details": {"type": ["object", "null"]},
            "output": {"type": "array", "items": OBJECT},
            "usage": OBJECT,
            "timings": OBJECT,
        },
    },
    "Listed": {
        "type": "object",
        "required": ["object", "data", "model", "usage"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": OBJECT},
            "model": STRING,
            "usage": OBJECT,
        },
    },
    "Status": {"type": "object", "required": ["status"], "properties": {"status": STRING}},
}
GENERATE_ERRORS = {
    "400": "The request is at fault.",
    "404": "There is no such model.",
    "408": "The deadline passed, or the body came too slowly.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; see Retry-After.",
    "503": "The server is stopping.",
}
EVENTS = {"text/event-stream": {"schema": STRING}}


@functools.lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths = {
        "/v1/models": {"get": _get("List the base model and its adapters.", "ModelList")},
        "/v1/models/{model}": {"get": _show_model()},
        "/v1/chat/completions": {
            "post": _post("Answer a conversation.", "ChatRequest", "Generated", EVENTS)
        },
        "/v1/completions": {
            "post": _post("Continue a text.", "CompletionRequest", "Generated", EVENTS)
        },
        "/v1/responses": {
            "post": _post(
                "Answer items, in OpenAI's newer words.", "ResponseRequest", "Response", EVENTS
            )
        },
        "/classify": {"post": _post("Classify texts.", "ClassifyRequest", "Listed", {})},
        "/tag": {"post": _post("Tag the words of texts.", "TagRequest", "Listed", {})},
        "/score": {"post": _post("Score answers to prompts.", "ScoreRequest", "Listed", {})},
        "/pooling": {
            "post": _post("Score a conversation or texts.", "PoolingRequest", "Listed", {})
        },
        "/v1/embeddings": {"post": _post("Embed texts.", "EmbeddingRequest", "Listed", {})},
        "/v1/load_lora_adapter": {
            "post": _adapters("Load an adapter from an allowed folder.", "LoadAdapterRequest")
        },
        "/v1/unload_lora_adapter": {
            "post": _adapters("Unload an adapter.", "UnloadAdapterRequest")
        },
        "/health": {"get": _get("Whether the process lives.", "Status", open_to_all=True)},
        "/ready": {"get": _ready()},
        "/metrics": {"get": _text("Prometheus metrics.", "text/plain")},
    }
    schemes = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "Only when the operator set keys.",
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edgetune",
            "version": __version__,
            "description": "One base model, many adapters.",
        },
        "paths": paths,
        "components": {
            "schemas": {**ANSWERS, **BODIES, "ResponseRequest": RESPONSES},
            "securitySchemes": schemes,
        },
        "security": [{"key": []}, {}],
    }


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(name)}}}


def _errors(errors: Mapping[str, str]) -> dict[str, Any]:
    known = {"401": "The key is missing or wrong.", "421": "The host name is not this server's."}
    return {status: _json("Error", text) for status, text in {**known, **errors}.items()}


def _get(summary: str, answer: str, *, open_to_all: bool = False) -> dict[str, Any]:
    operation = {"summary": summary, "responses": {"200": _json(answer, "OK"), **_errors({})}}
    return operation | ({"security": []} if open_to_all else {})


def _show_model() -> dict[str, Any]:
    name = {"name": "model", "in": "path", "required": True, "schema": STRING}
    responses = {"200": _json("Model", "OK"), **_errors({"404": "There is no such model."})}
    return {"summary": "One model.", "parameters": [name], "responses": responses}


def _ready() -> dict[str, Any]:
    responses = {"200": _json("Status", "OK"), **_errors({"503": "The server is draining."})}
    return {"summary": "Whether new requests are taken.", "responses": responses, "security": []}


def _text(summary: str, media: str) -> dict[str, Any]:
    okay = {"description": "OK", "content": {media: {"schema": STRING}}}
    return {"summary": summary, "responses": {"200": okay, **_errors({})}}


def _post(summary: str, body: str, answer: str, more: Mapping[str, Any]) -> dict[str, Any]:
    okay = _json(answer, "OK")
    okay["content"] |= more
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {"200": okay, **_errors(GENERATE_ERRORS)},
    }


def _adapters(summary: str, body: str) -> dict[str, Any]:
    okay = {"description": "OK", "content": {"text/plain": {"schema": STRING}}}
    errors = {
        **GENERATE_ERRORS,
        "403": "The operator allows no adapters over HTTP, or not from there.",
        "409": "The adapter is in use.",
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
        "responses": {"200": okay, **_errors(errors)},
    }
