"""The bytes of a request → a checked JSON object; everything wrong with them is one clear 4xx."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from edgetune.runtime.server.errors import ApiError, bad_request
from edgetune.runtime.server.exchange import ClientGone
from edgetune.runtime.server.schema import Schema, check

LARGE = 65536
"""A body above this many bytes is read beside the event loop: running streams go on."""
BODY_SECONDS = 30.0
"""A client that takes longer to send its body is holding a place for nothing."""


async def read_json(request: Request, schema: Schema, *, limit_mb: float) -> dict[str, Any]:
    """The request's body, parsed and checked. ApiError: 415 no JSON, 413 too large, 408 too slow, 400 not fitting."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps other sites' pages out: a form or plain text needs no leave of ours, JSON does (CORS).
        message = f"Content-Type must be application/json, but got {kind or 'none'!r}."
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        raw = await asyncio.wait_for(_body(request, int(limit_mb * 1e6)), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, "The request's body did not arrive in time.", code="body_timeout") from None
    except ClientDisconnect:
        raise ClientGone from None
    value = await asyncio.to_thread(_checked, raw, schema) if len(raw) > LARGE else _checked(raw, schema)
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
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise bad_request(f"The body is not valid JSON: {reason}.", code="invalid_json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
