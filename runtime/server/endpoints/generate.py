"""`/v1/chat/completions`, `/v1/completions` and `/v1/responses`: OpenAI's endpoints, streamed or
whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgetune.runtime.scheduler.requests import Event, FailedEvent, FinishedEvent, TokenEvent
from edgetune.runtime.server.http.asked import read_asked
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
from edgetune.runtime.server.http.json_body import Schema
from edgetune.runtime.server.http.logs import log_error, note, request_id_of
from edgetune.runtime.server.http.requests import Plan, error_of, plan_chat, plan_completion
from edgetune.runtime.server.http.responses import ChatAnswer, Envelope, TextAnswer, ToolAnswer
from edgetune.runtime.server.http.responses_answer import ResponseEnvelope
from edgetune.runtime.server.http.responses_request import RESPONSES, plan_response
from edgetune.runtime.server.http.service import Service
from edgetune.runtime.tasks.answers import Completion

Planner = Callable[[Service, Mapping[str, Any], str], Plan]
AnyEnvelope = Envelope | ResponseEnvelope
Enveloped = Callable[[Plan, str, Mapping[str, Any]], AnyEnvelope]


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""

    def envelope(plan: Plan, request_id: str, body: Mapping[str, Any]) -> Envelope:
        return Envelope(ToolAnswer() if plan.tools else ChatAnswer(), plan, request_id)

    return await _generate(request, CHAT, plan_chat, envelope)


async def completions(request: Request) -> Response:
    """POST /v1/completions."""

    def envelope(plan: Plan, request_id: str, body: Mapping[str, Any]) -> Envelope:
        return Envelope(TextAnswer(), plan, request_id)

    return await _generate(request, COMPLETIONS, plan_completion, envelope)


async def responses(request: Request) -> Response:
    """POST /v1/responses."""
    return await _generate(request, RESPONSES, plan_response, ResponseEnvelope)


async def _generate(
    request: Request, schema: Schema, planner: Planner, enveloped: Enveloped
) -> Response:
    service, body = await read_asked(request, schema)
    request_id = request_id_of(request.scope)
    plan = await service.in_thread(planner, service, body, request_id)
    note(request.scope, prompt_tokens=plan.prompt_tokens, rows=len(plan.rows), stream=plan.stream)
    exchange = Exchange(service.scheduler, service.mailroom, plan.rows)
    envelope = enveloped(plan, request_id, body)
    await service.submit(exchange)
    if plan.stream:
        return EventStream(service, exchange, envelope)
    return AsciiJson(
        await unless_gone(request.receive, _whole(request.scope, service, exchange, envelope))
    )


async def _whole(
    scope: Scope, service: Service, exchange: Exchange, envelope: AnyEnvelope
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

    def __init__(self, service: Service, exchange: Exchange, envelope: AnyEnvelope) -> None:
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
                await send(self._body(part))
        except (Exception, asyncio.CancelledError) as error:
            gone = isinstance(error, asyncio.CancelledError) and not self._service.draining
            if gone or not started:
                raise
            failure = _failure(scope, error)
            note(scope, error=failure.code)
            for part in self._envelope.failed(failure):
                await send(self._body(part))
        note(scope, **_facts(list(self._done.values())))
        await send({"type": "http.response.body", "body": self._envelope.end, "more_body": False})

    def _body(self, part: Mapping[str, Any]) -> dict[str, Any]:
        frame = self._envelope.frame(part)
        return {"type": "http.response.body", "body": frame, "more_body": True}

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        envelope, opened = self._envelope, set[int]()
        async for row, event in self._exchange.events():
            if not isinstance(event, TokenEvent):
                self._done[row] = _completion_of(event)
            if row not in opened:
                opened.add(row)
                for part in envelope.begun(row):
                    yield part
            if isinstance(event, TokenEvent):
                if event.text or event.logprobs:
                    for part in envelope.more(row, event.text, event.logprobs):
                        yield part
            else:
                completion = self._done[row]
                self._service.metrics.completed(
                    completion, rows=self._service.scheduler.stats().running + 1
                )
                for part in envelope.ended(row, completion):
                    yield part
        for part in envelope.last([self._done[row] for row in sorted(self._done)]):
            yield part


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
