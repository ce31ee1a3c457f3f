"""`/v1/chat/completions` and `/v1/completions`: OpenAI's endpoints, streamed or whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgetune.runtime.scheduler.requests import Event, FailedEvent, FinishedEvent, TokenEvent
from edgetune.runtime.server.http.bodies import CHAT, COMPLETIONS
from edgetune.runtime.server.http.errors import (
    STOPPED,
    ApiError,
    AsciiJson,
    deadline_exceeded,
    internal,
    unavailable,
)
from edgetune.runtime.server.http.exchange import Exchange, unless_gone
from edgetune.runtime.server.http.json_body import Schema, read_body
from edgetune.runtime.server.http.logs import log_error, note, request_id_of
from edgetune.runtime.server.http.requests import Plan, error_of, plan_chat, plan_completion
from edgetune.runtime.server.http.responses import ChatAnswer, Envelope, TextAnswer, ToolAnswer
from edgetune.runtime.server.http.service import Service
from edgetune.runtime.tasks.answers import Completion

Planner = Callable[[Service, Mapping[str, Any], str], Plan]


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await _generate(request, CHAT, plan_chat, ChatAnswer())


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    return await _generate(request, COMPLETIONS, plan_completion, TextAnswer())


async def _generate(
    request: Request, schema: Schema, planner: Planner, answer: ChatAnswer | TextAnswer
) -> Response:
    service: Service = request.app.state.service
    service.check_open()
    body = await read_body(request, schema, limit_mb=service.options.max_body_mb)
    request_id = request_id_of(request.scope)
    note(request.scope, model=body["model"], user=body.get("user") or body.get("safety_identifier"))
    plan = await service.in_thread(planner, service, body, request_id)
    if plan.tools:
        answer = ToolAnswer()
    note(request.scope, prompt_tokens=plan.prompt_tokens, rows=len(plan.rows), stream=plan.stream)
    exchange = Exchange(service.scheduler, service.mailroom, plan.rows)
    envelope = Envelope(answer, plan, request_id)
    await service.submit(exchange)
    if plan.stream:
        return EventStream(service, exchange, envelope)
    return AsciiJson(
        await unless_gone(request.receive, _whole(request.scope, service, exchange, envelope))
    )


async def _whole(
    scope: Scope, service: Service, exchange: Exchange, envelope: Envelope
) -> dict[str, Any]:
    done: dict[int, Completion] = {}
    with exchange:
        async for row, event in exchange.events():
            if not isinstance(event, TokenEvent):
                done[row] = _completion_of(event)
                service.metrics.completed(done[row], rows=service.scheduler.stats().running + 1)
    finished = [done[row] for row in sorted(done)]
    note(scope, **_facts(finished))
    return envelope.whole(finished)


class EventStream(Response):
    """Server-sent events. Nothing is sent before the first event, so what fails at once has its own
    status.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, exchange: Exchange, envelope: Envelope) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service, self._exchange, self._envelope = service, exchange, envelope
        self._done: dict[int, Completion] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client goes away."""
        with self._exchange:
            await unless_gone(receive, self._send(scope, send))

    async def _send(self, scope: Scope, send: Send) -> None:
        started = False
        try:
            async for part in self._parts():
                if not started:
                    await send(
                        {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                    )
                    started = True
                await send({"type": "http.response.body", "body": _event(part), "more_body": True})
        except (Exception, asyncio.CancelledError) as error:
            gone = isinstance(error, asyncio.CancelledError) and not self._service.draining
            if gone or not started:
                raise
            failure = _failure(scope, error)
            note(scope, error=failure.code)
            await send(
                {"type": "http.response.body", "body": _event(failure.body()), "more_body": True}
            )
        note(scope, **_facts(list(self._done.values())))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        envelope, answer, opened = self._envelope, self._envelope.answer, set[int]()
        top = envelope.plan.top_logprobs
        async for row, event in self._exchange.events():
            if not isinstance(event, TokenEvent):
                self._done[row] = _completion_of(event)
            if row not in opened:
                opened.add(row)
                if (first := answer.opening(row)) is not None:
                    yield envelope.part(first)
            if isinstance(event, TokenEvent):
                if not (event.text or event.logprobs):
                    continue
                if (piece := answer.piece(row, event.text, event.logprobs, top)) is not None:
                    yield envelope.part(piece)
            else:
                completion = self._done[row]
                self._service.metrics.completed(
                    completion, rows=self._service.scheduler.stats().running + 1
                )
                yield envelope.part(answer.closing(row, completion.finish_reason))
        if envelope.plan.include_usage:
            yield envelope.usage([self._done[row] for row in sorted(self._done)])


def _completion_of(event: Event) -> Completion:
    """The completion of a last event; an ApiError where there is none to show."""
    if isinstance(event, FailedEvent):
        raise error_of(event.error) or event.error
    assert isinstance(event, FinishedEvent)
    if event.completion.finish_reason == "deadline":
        made = event.completion.completion_tokens
        raise deadline_exceeded(f"The deadline passed after {made} tokens of the answer.")
    if event.completion.finish_reason == "cancelled":
        raise unavailable("The server is stopping.")
    return event.completion


def _failure(scope: Scope, error: BaseException) -> ApiError:
    """What a stream that had begun says last; cancelled is what the drain had no time for."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return unavailable(STOPPED)
    log_error(scope, error)
    return internal(request_id_of(scope))


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _facts(completions: list[Completion]) -> dict[str, Any]:
    """What the log says about an answer."""
    if not completions:
        return {}
    return {
        "completion_tokens": sum(c.completion_tokens for c in completions),
        "finish_reason": ",".join(sorted({c.finish_reason for c in completions})),
        "ttft_ms": round(min(c.ttft_ms for c in completions), 2),
        "queue_ms": round(min(c.queue_ms for c in completions), 2),
    }
