"""Structured logs: one JSON object a line on stderr, one line a request, each with its
request id.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
import uuid
from typing import Any, TextIO

from starlette.types import Scope

LOGGER = logging.getLogger("edgetune.server")
OWN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = "edgetune.request"


class JsonLines(logging.Formatter):
    """A log record as one JSON object: time, level, event, and the fields of
    `extra={"fields": …}`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the values hold."""
        moment = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z"
        )
        line = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= {
            name: value
            for name, value in getattr(record, "fields", {}).items()
            if value is not None
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line, default=str)


class Stderr(logging.StreamHandler[TextIO]):
    """Whatever standard error is when a line is written."""

    @property
    def stream(self) -> TextIO:
        """Standard error as it is now."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """The base class sets it once; it is looked up instead."""


def set_up_logging(level: str = "info") -> None:
    """Send this server's, the runtime's and uvicorn's log lines to standard error, in one form."""
    handler = Stderr()
    handler.setFormatter(JsonLines())
    for name, least in (
        ("edgetune.server", level.upper()),
        ("edgetune.runtime", "WARNING"),
        ("uvicorn.error", "WARNING"),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)


def begin_request(scope: Scope, given: str | None) -> str:
    """Give a request its id: the client's own where it is a plain word, else a new one."""
    request_id = given if given and OWN_ID.fullmatch(given) else uuid.uuid4().hex
    scope[KEY] = {"request_id": request_id}
    return request_id


def request_id_of(scope: Scope) -> str:
    """The id that the request's answer and log line carry."""
    value: str = scope[KEY]["request_id"]
    return value


def note(scope: Scope, **fields: Any) -> None:
    """Add to the request's log line."""
    scope[KEY].update(fields)


def notes(scope: Scope) -> dict[str, Any]:
    """What the request's log line says so far."""
    found: dict[str, Any] = scope[KEY]
    return found


def log_error(scope: Scope, error: BaseException) -> None:
    """A defect of ours: the whole story, under the request's id."""
    fields = {"request_id": request_id_of(scope), "path": scope.get("path")}
    LOGGER.error("error", exc_info=error, extra={"fields": fields})
