"""`/classify` (vLLM's shape) and `/v1/embeddings` (OpenAI's), for encoder bundles."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edgetune.errors import InputError
from edgetune.runtime.server.errors import bad_request, deadline_exceeded
from edgetune.runtime.server.exchange import unless_gone
from edgetune.runtime.server.logs import note, request_id_of
from edgetune.runtime.server.reading import read_json
from edgetune.runtime.server.sampling import error_of
from edgetune.runtime.server.schema import Schema
from edgetune.runtime.server.service import Service
from edgetune.runtime.server.tables import CLASSIFY, EMBEDDINGS

T = TypeVar("T")


async def classify(request: Request) -> Response:
    """POST /classify: the probability of every label, in the order of the adapter's labels."""
    service, body, texts, adapter, tokens = await _read(request, CLASSIFY)
    if service.runtime.labels(adapter) is None:
        message = f"The model '{body['model']}' has no labels to classify into; name an adapter that has."
        raise bad_request(message, param="model", code="no_labels")
    work = service.scheduler.classify(texts, adapter, truncate=_truncate(body))
    found = await _in_time(request, service, body, work)
    data = [
        {"index": i, "label": c.label, "probs": list(c.scores.values()), "num_classes": len(c.scores)}
        for i, c in enumerate(found)
    ]
    head = {"id": f"classify-{request_id_of(request.scope)}", "object": "list", "created": int(time.time())}
    return JSONResponse({**head, "model": body["model"], "data": data, "usage": _usage(tokens)})


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: pooled states of length 1, as numbers or as base64 of little-endian float32."""
    service, body, texts, adapter, tokens = await _read(request, EMBEDDINGS)
    work = service.scheduler.embed(texts, adapter, truncate=_truncate(body))
    vectors = await _in_time(request, service, body, work)
    packed = body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(row) if packed else row.tolist()}
        for i, row in enumerate(vectors)
    ]
    return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": _usage(tokens)})


async def _read(
    request: Request, schema: Schema
) -> tuple[Service, dict[str, Any], list[str], str | None, int]:
    """Service, body, texts, adapter, number of tokens; every text is checked before the first is computed."""
    service: Service = request.app.state.service
    service.check_open()
    body = await read_json(request, schema, limit_mb=service.options.max_body_mb)
    note(request.scope, model=body["model"], user=body.get("user"))
    if service.runtime.manifest.is_decoder:
        what = "This bundle generates text; it neither classifies nor embeds."
        raise bad_request(what, param="model", code="wrong_task")
    adapter = service.adapter_of(body["model"])
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    tokens = await service.in_thread(_count, service, texts, adapter, _truncate(body))
    note(request.scope, rows=len(texts), prompt_tokens=tokens)
    return service, body, texts, adapter, tokens


def _count(service: Service, texts: Sequence[str], adapter: str | None, truncate: bool) -> int:
    try:
        return sum(len(service.runtime.text_ids(text, adapter, truncate=truncate)) for text in texts)
    except InputError as error:
        fix = " Set 'truncate_prompt_tokens' to -1 to cut it." if "longer" in error.what else ""
        plain = InputError(error.what, expected=error.expected, got=error.got)
        failure = error_of(plain, param="input")
        raise bad_request(f"{plain}.{fix}", param="input", code=failure.code if failure else None) from error


async def _in_time(request: Request, service: Service, body: Mapping[str, Any], work: Future[T]) -> T:
    """The scheduler's answer, unless the deadline or the client's patience ends first."""
    deadline = service.deadline(body.get("deadline_s"))
    seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        return await unless_gone(request.receive, asyncio.wait_for(asyncio.wrap_future(work), seconds))
    except asyncio.TimeoutError:
        raise deadline_exceeded("The deadline passed before the answer was there.") from None
    finally:
        work.cancel()  # of use only while it still waits in the queue


def _truncate(body: Mapping[str, Any]) -> bool:
    return body.get("truncate_prompt_tokens") == -1


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}


def _base64(row: Any) -> str:
    return base64.b64encode(np.asarray(row, "<f4").tobytes()).decode()
