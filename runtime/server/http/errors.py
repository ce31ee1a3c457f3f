"""Errors as OpenAI's clients expect them: a status, and `{"error": {"message", "type", "param",
"code"}}`.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse


class AsciiJson(JSONResponse):
    """JSON with every other character escaped: half a surrogate pair, which a client may spell, has
    no UTF-8.
    """

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class ApiError(Exception):
    """An answer that is an error. `retry_after`: seconds after which another try makes sense."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.code, self.param, self.retry_after = code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is at fault."""
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, *, code: str, param: str | None = None) -> ApiError:
    """404: what the request names is not here."""
    return ApiError(404, message, code=code, param=param)


def overloaded(message: str, *, retry_after: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429, message, kind="rate_limit_error", code="queue_full", retry_after=retry_after
    )


def deadline_exceeded(message: str) -> ApiError:
    """408: the request's own time, or the operator's, is over."""
    return ApiError(408, message, kind="timeout_error", code="deadline_exceeded")


STOPPED = "The server stopped before the answer was done."


def unavailable(message: str, *, retry_after: int = 5) -> ApiError:
    """503: the server is stopping."""
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after=retry_after)


def internal(request_id: str) -> ApiError:
    """500: a defect of ours; the log has the story under the request's id."""
    message = (
        f"The server met an error of its own. Its log has the story under request id {request_id}."
    )
    return ApiError(500, message, kind="server_error", code="internal_error")
