"""Around every request: its id, its log line, its counters, who may call, and a JSON answer
whatever happens.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgetune.runtime.scheduler.requests import QueueFull, SchedulerClosed
from edgetune.runtime.server.http.asked import BODY
from edgetune.runtime.server.http.errors import (
    STOPPED,
    ApiError,
    AsciiJson,
    internal,
    overloaded,
    unavailable,
)
from edgetune.runtime.server.http.exchange import ClientGone
from edgetune.runtime.server.http.logs import LOGGER, begin_request, log_error, note, notes
from edgetune.runtime.server.http.requests import error_of
from edgetune.runtime.server.http.service import Service
from edgetune.runtime.server.shadow import Shadow

OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json")
"""Reachable without a key: they show nothing of the models."""
QUIET_PATHS = ("/health", "/ready", "/metrics")
"""Asked every few seconds by machines: logged at debug level."""
FAILURES = ("adapter_error", "internal_error", "deadline_exceeded")
"""What counts against a version that is on trial."""
CLIENT_GONE = 499
"""nginx's status for a client that closed its connection; only the log and the counters ever see
it.
"""


class RequestScope:
    """The outermost layer: request id, log line, counters, and errors in OpenAI's form."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self.app, self.service = app, service
        self._shadow = Shadow(app, service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        request_id = begin_request(scope, Headers(scope=scope).get("x-request-id"))

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        self.service.metrics.open.inc()
        try:
            await self._answer(scope, receive, tell)
        except ClientGone:
            status = CLIENT_GONE
        except asyncio.CancelledError:  # the drain's time is over: uvicorn ends what is left
            note(scope, error="server_stopping")
            if not status:
                await error_response(unavailable(STOPPED))(scope, receive, tell)
        except Exception as error:  # nothing may reach the client as anything but our own form
            failure = answer_to(error)
            if failure is None:
                log_error(scope, error)
                failure = internal(request_id)
            note(scope, error=failure.code or failure.kind)
            if status:  # the answer had begun; it ends here, unfinished
                raise
            await error_response(failure)(scope, receive, tell)
        finally:
            self.service.metrics.open.dec()
            self._record(scope, status or CLIENT_GONE, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.metrics.seconds.labels(route).observe(seconds)
        if "version" in notes(scope):
            self._record_version(scope, status, seconds)
        quiet = scope["path"] in QUIET_PATHS and status < 400
        if not LOGGER.isEnabledFor(logging.DEBUG if quiet else logging.INFO):
            return
        client = scope.get("client")
        fields = {
            "request_id": notes(scope)["request_id"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1e3, 2),
            "client": client[0] if client else None,
            **notes(scope),
        }
        LOGGER.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})

    def _record_version(self, scope: Scope, status: int, seconds: float) -> None:
        """How a version did that answered for an alias. What the client did wrong says nothing."""
        alias, version = notes(scope)["model"], notes(scope)["version"]
        self.service.metrics.versions.labels(alias, version, str(status)).inc()
        self.service.metrics.version_seconds.labels(alias, version).observe(seconds)
        rollout = self.service.rollouts.get(alias)
        error = notes(scope).get("error")
        failed = error is not None and (status == 200 or error in FAILURES)
        asked = error == "deadline_exceeded" and scope[BODY].get("deadline_s") is not None
        if rollout is None or asked or self.service.draining or not (failed or status == 200):
            return
        tokens = notes(scope).get("completion_tokens") or 1
        rollout.answered(version, seconds / tokens, failed=failed)
        if not failed:
            self._shadow.look(scope, scope[BODY], rollout)


class KeyCheck:
    """`Authorization: Bearer KEY`, compared in constant time."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self.app = app
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with a key, or one that needs none."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            self._check(Headers(scope=scope).get("authorization", ""))
        await self.app(scope, receive, send)

    def _check(self, header: str) -> None:
        scheme, _, key = header.partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        # Every key is compared, and digests have one length: the time says nothing about the keys.
        fits = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(fits):
            what = (
                "Incorrect API key provided."
                if key
                else "No API key: give 'Authorization: Bearer KEY'."
            )
            raise ApiError(401, what, code="invalid_api_key")


class HostCheck:
    """Refuse requests for another host: a web page that points its own name at 127.0.0.1 gets
    nothing.
    """

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str]) -> None:
        self.app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what names one of the hosts."""
        if (
            scope["type"] == "http"
            and _host(Headers(scope=scope).get("host", "")) not in self._hosts
        ):
            raise ApiError(
                421, "This server does not answer for that host name.", code="unknown_host"
            )
        await self.app(scope, receive, send)


def answer_to(error: Exception) -> ApiError | None:
    """Any error that has an answer of its own; None for a defect of ours."""
    if isinstance(error, QueueFull):
        return overloaded(
            "The queue is full. Try again later.", retry_after=max(1, round(error.retry_after_s))
        )
    if isinstance(error, SchedulerClosed):
        return unavailable("The server is stopping.")
    return error_of(error)


def error_response(error: ApiError) -> AsciiJson:
    """An error's answer."""
    return AsciiJson(error.body(), status_code=error.status, headers=error.headers())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _host(header: str) -> str:
    """`[::1]:8000` and `localhost:8000` without port."""
    name: Any = header.strip().lower()
    return str(name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0])
