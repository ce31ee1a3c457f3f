"""A request's bytes → a checked JSON object: one table of JSON Schema checks a body and stands in
`/openapi.json`.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from edgetune.core.settings import did_you_mean
from edgetune.runtime.server.http.errors import ApiError, bad_request
from edgetune.runtime.server.http.exchange import ClientGone

Schema = Mapping[str, Any]
WORDS = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def optional(kind: str, **limits: Any) -> dict[str, Any]:
    """A property that may be left out or null."""
    if "enum" in limits:
        limits["enum"] = [*limits["enum"], None]
    return {"type": [kind, "null"], **limits}


def either(*schemas: Schema, **notes: Any) -> dict[str, Any]:
    """A value that fits one of several schemas."""
    return {"anyOf": list(schemas), **notes}


def obj(required: Sequence[str] = (), /, **properties: Schema) -> dict[str, Any]:
    """An object whose properties are all known."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def unsupported(reason: str) -> dict[str, Any]:
    """A property of OpenAI's API that only null fits: it is refused by name, never ignored."""
    return {"type": "null", "description": f"Not supported: {reason}"}


def check(value: Any, schema: Schema, param: str = "") -> None:
    """Raise an ApiError (400) at the first place where a parsed JSON value does not fit."""
    if "anyOf" in schema:
        _check_any(value, schema, param)
        return
    kinds = _kinds(schema)
    if (
        kinds
        and kind_of(value) not in kinds
        and not (kind_of(value) == "integer" and "number" in kinds)
    ):
        raise _wrong_type(value, schema, kinds, param)
    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(repr(choice) for choice in schema["enum"] if choice is not None)
        message = f"Invalid value for '{param}': {_shown(value)}. Supported values are: {allowed}."
        raise bad_request(message, param=param, code="invalid_value")
    if isinstance(value, str):
        _check_size(len(value), schema, param, "string", "characters", "minLength", "maxLength")
        if "pattern" in schema and not re.fullmatch(schema["pattern"].strip("^$"), value):
            message = f"Invalid '{param}': {_shown(value)}. Expected {schema['description']}."
            raise bad_request(message, param=param, code="invalid_value")
    elif isinstance(value, list):
        _check_size(len(value), schema, param, "array", "items", "minItems", "maxItems")
        for i, item in enumerate(value):
            check(item, schema.get("items", {}), f"{param}[{i}]")
    elif isinstance(value, dict):
        _check_object(value, schema, param)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(value, schema, param)


def kind_of(value: Any) -> str:
    """JSON's name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names[type(value)]


def _kinds(schema: Schema) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _check_any(value: Any, schema: Schema, param: str) -> None:
    """The first alternative that fits; else the complaint of the alternative that comes closest."""
    choices = schema["anyOf"]
    if isinstance(value, dict) and (tagged := [choice for choice in choices if _tags(choice)]):
        others = [] if "type" in value else [choice for choice in choices if choice not in tagged]
        choices = [choice for choice in tagged if value.get("type") in _tags(choice)] or [
            choice for choice in others if "object" in _kinds(choice)
        ]
        if not choices:
            tags = {"type": "string", "enum": [tag for choice in tagged for tag in _tags(choice)]}
            check(value, obj(("type",), type=tags), param)
    errors = []
    for choice in choices:
        try:
            check(value, choice, param)
        except ApiError as error:
            errors += [error] if _right_kind(value, choice) else []
        else:
            return
    if errors:
        raise max(errors, key=_progress)
    kinds = [kind for choice in schema["anyOf"] for kind in _kinds(choice)]
    raise _wrong_type(value, schema, list(dict.fromkeys(kinds)), param)


def _tags(schema: Schema) -> list[Any]:
    """What an object's `type` may be, where that tells it from the other alternatives."""
    tags: list[Any] = schema.get("properties", {}).get("type", {}).get("enum", [])
    return tags if "type" in schema.get("required", ()) else []


def _progress(error: ApiError) -> tuple[list[int], bool, int]:
    """How far a check came: which items it passed, that the type fits at least, how deep it is."""
    param = error.param or ""
    items = [int(place) for place in re.findall(r"\[(\d+)\]", param)]
    return items, error.code != "invalid_type", len(param)


def _right_kind(value: Any, schema: Schema) -> bool:
    kinds = _kinds(schema)
    return not kinds or kind_of(value) in kinds


def _wrong_type(value: Any, schema: Schema, kinds: Sequence[str], param: str) -> ApiError:
    if kinds == ["null"]:
        message = f"Unsupported parameter: '{param}'. {schema.get('description', '')}".strip()
        return bad_request(message, param=param, code="unsupported_parameter")
    wanted = [WORDS[kind] for kind in kinds if kind != "null"]
    expected = wanted[0] if len(wanted) == 1 else f"one of {', '.join(wanted[:-1])} or {wanted[-1]}"
    place = f"'{param}'" if param else "the request body"
    message = (
        f"Invalid type for {place}: expected {expected}, but got {WORDS[kind_of(value)]} instead."
    )
    return bad_request(message, param=param or None, code="invalid_type")


def _check_object(value: Mapping[str, Any], schema: Schema, param: str) -> None:
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    prefix = f"{param}." if param else ""
    for name, one in properties.items():
        if name in value and "enum" in one:  # what kind of object it is, before what that one needs
            check(value[name], one, f"{prefix}{name}")
    for name in schema.get("required", ()):
        if name not in value:
            message = f"Missing required parameter: '{prefix}{name}'."
            raise bad_request(message, param=f"{prefix}{name}", code="missing_required_parameter")
    _check_size(len(value), schema, param, "object", "properties", "minProperties", "maxProperties")
    for name, item in value.items():
        if name in properties:
            check(item, properties[name], f"{prefix}{name}")
        elif rest is False:
            near = did_you_mean(name[:60], properties)
            message = f"Unknown parameter: '{prefix}{name[:60]}'. {near}".rstrip()
            raise bad_request(message, param=f"{prefix}{name[:60]}", code="unknown_parameter")
        elif rest is not True:
            check(item, rest, f"{prefix}{name[:60]}")


def _check_size(
    size: int, schema: Schema, param: str, kind: str, unit: str, low: str, high: str
) -> None:
    if size < schema.get(low, 0):
        message = (
            f"Invalid '{param}': {kind} too short. Expected at least {schema[low]} {unit}, but got"
            f" {size}."
        )
        raise bad_request(message, param=param, code=f"{kind}_below_min_length")
    if size > schema.get(high, math.inf):
        message = (
            f"Invalid '{param}': {kind} too long. Expected at most {schema[high]} {unit}, but got"
            f" {size}."
        )
        raise bad_request(message, param=param, code=f"{kind}_above_max_length")


def _check_number(value: float, schema: Schema, param: str) -> None:
    kind = "integer" if isinstance(value, int) else "decimal"
    limits = {
        "minimum": (lambda limit: value >= limit, "below minimum value", ">=", "below_min_value"),
        "exclusiveMinimum": (
            lambda limit: value > limit,
            "below minimum value",
            ">",
            "below_min_value",
        ),
        "maximum": (lambda limit: value <= limit, "above maximum value", "<=", "above_max_value"),
    }
    for word, (fits, what, sign, code) in limits.items():
        if word in schema and not fits(schema[word]):
            wanted = f"Expected a value {sign} {schema[word]}, but got {_shown(value)} instead."
            raise bad_request(
                f"Invalid '{param}': {kind} {what}. {wanted}", param=param, code=f"{kind}_{code}"
            )


def _shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    text = (
        repr(value)
        if not isinstance(value, int) or abs(value) < 10**20
        else f"a number of over {10**20:.0e}"
    )
    return text if len(text) <= 60 else f"{text[:57]}..."


LARGE = 65536
"""A body above this many bytes is read beside the event loop: running streams go on."""
BODY_SECONDS = 30.0
"""A client that takes longer to send its body is holding a place for nothing."""


async def read_body(request: Request, schema: Schema, *, limit_mb: float) -> dict[str, Any]:
    """The request's body, parsed and checked. ApiError: 415 no JSON, 413 too large, 408 too slow,
    400 not fitting.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps other sites' pages out: a form or plain text needs no leave of ours, JSON
        # does (CORS).
        message = f"Content-Type must be application/json, but got {kind or 'none'!r}."
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        raw = await asyncio.wait_for(_body(request, int(limit_mb * 1e6)), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(
            408, "The request's body did not arrive in time.", code="body_timeout"
        ) from None
    except ClientDisconnect:
        raise ClientGone from None
    value = (
        await asyncio.to_thread(_checked, raw, schema)
        if len(raw) > LARGE
        else _checked(raw, schema)
    )
    return {name: item for name, item in value.items() if item is not None}


def _checked(raw: bytes, schema: Schema) -> Any:
    value = _parse(raw)
    check(value, schema)
    return value


async def _body(request: Request, limit: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > limit:
            raise too_large
    return b"".join(parts)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw, parse_constant=_no_constant)
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise bad_request(f"The body is not valid JSON: {reason}.", code="invalid_json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
