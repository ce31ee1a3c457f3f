"""Shadowed requests: some that clients send to an alias on trial are asked once more of both
versions, beside the queue, and the two answers compared.

Greedily and not streamed, so that only the versions differ. Nobody waits for it, and none is
asked while requests wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from edgetune.runtime.rollout.gate import is_alike
from edgetune.runtime.rollout.rollout import AliasRollout
from edgetune.runtime.server.http.asked import AS_NAMED
from edgetune.runtime.server.http.logs import begin_request, log_error, request_id_of
from edgetune.runtime.server.http.service import Service

GREEDY = {"temperature": 0, "stream": False}
GENERATES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
BUSY = (429, 503)
"""Statuses that say nothing of a version: the server has too much to do, or ends."""
COMPARED = (*GENERATES, "/classify", "/tag", "/score", "/pooling")


class Shadow:
    """Asks again, one request at a time."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._task: asyncio.Task[None] | None = None

    def look(self, scope: Scope, body: Mapping[str, Any], rollout: AliasRollout) -> None:
        """Ask again for the request of `scope`, if it is one of the chosen ones."""
        trial, busy = rollout.on_trial, self._task is not None and not self._task.done()
        if trial is None or busy or scope["path"] not in COMPARED or self._service.draining:
            return
        if _point(request_id_of(scope)) >= rollout.rules.bounds.shadow:
            return
        if self._service.scheduler.stats().waiting:
            return
        self._task = asyncio.create_task(self._compare(scope, body, rollout, trial))

    async def _compare(
        self, scope: Scope, body: Mapping[str, Any], rollout: AliasRollout, trial: tuple[str, str]
    ) -> None:
        (status, new), (_, old) = [await self._ask(scope, body, version) for version in trial]
        # what the old one cannot answer says nothing
        if old is None or status in BUSY or rollout.on_trial != trial:
            return
        alike = new is not None and len(new) == len(old)
        rollout.shadowed(alike=alike and all(map(is_alike, old, new or ())))

    async def _ask(
        self, scope: Scope, body: Mapping[str, Any], version: str
    ) -> tuple[int, list[dict[str, Any]] | None]:
        """The status, and what a version says to a request, an entry an answer; None where it
        fails.
        """
        greedy = GREEDY if scope["path"] in GENERATES else {}
        plain = {key: value for key, value in body.items() if key != "stream_options"}
        asked = json.dumps({**plain, **greedy, "model": version}).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        own = {
            **{key: scope[key] for key in ("type", "app", "method", "path", "scheme")},
            **{
                key: scope.get(key)
                for key in ("asgi", "http_version", "raw_path", "client", "server")
            },
            AS_NAMED: True,
            "query_string": b"",
            "root_path": scope.get("root_path", ""),
            "headers": [*headers, (b"content-length", str(len(asked)).encode())],
        }
        begin_request(own, None)
        status, content, given = 0, b"", False

        async def receive() -> Message:
            nonlocal given
            if given:  # a client that stays
                await asyncio.Event().wait()
            given = True
            return {"type": "http.request", "body": asked, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, content
            status = message.get("status", status)
            content += message.get("body", b"")

        try:
            await self._app(own, receive, send)
            return status, said(json.loads(content)) if status == 200 else None
        except Exception as error:  # as a failed answer
            log_error(own, error)
            return 500, None


def said(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An answer's content in the words of answered rows, without ids, times and probabilities."""
    if "choices" in answer:
        return [{"completion": _text(choice)} for choice in answer["choices"]]
    if "output" in answer:
        return [{"completion": [_without_ids(item) for item in answer["output"]]}]
    rows = []
    for one in answer["data"]:
        row = {key: one[key] for key in ("label", "labels", "value", "score") if key in one}
        if "words" in one:
            row["tags"] = [word["tag"] for word in one["words"]]
        if "data" in one:
            row["score"] = float(one["data"][0])
        rows.append(row)
    return rows


def _text(choice: Mapping[str, Any]) -> Any:
    message = choice.get("message")
    return choice.get("text") if message is None else _without_ids(message)


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("id", "call_id", "logprobs")
        return {key: _without_ids(one) for key, one in value.items() if key not in left_out}
    return [_without_ids(one) for one in value] if isinstance(value, list) else value


def _point(key: str) -> float:
    """A number from 0 to 1 that only the key decides."""
    return int.from_bytes(hashlib.sha256(f"shadow {key}".encode()).digest()[:8], "big") / 2**64
