"""`/health`, `/ready`, `/metrics`, `/openapi.json` and the playground at `/`."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from edgetune.runtime.server.http.errors import unavailable
from edgetune.runtime.server.http.openapi import document
from edgetune.runtime.server.http.service import Service
from edgetune.runtime.server.playground import page, security_policy


async def health(request: Request) -> Response:
    """GET /health: the process lives; a restart would not help."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """GET /ready: 200 while new requests are taken, 503 while the server drains."""
    service: Service = request.app.state.service
    if service.draining:
        raise unavailable("The server is draining.")
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """GET /metrics: Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)


async def openapi(request: Request) -> Response:
    """GET /openapi.json: this API, from the tables that check the requests."""
    return JSONResponse(document())


async def playground(request: Request) -> Response:
    """GET /: a page to try the models, without outside resources."""
    headers = {
        "Content-Security-Policy": security_policy(),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(page(), headers=headers)
