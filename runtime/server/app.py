"""The ASGI application: routes, and the layers around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgetune.core.errors import EdgetuneError
from edgetune.runtime.server.endpoints import adapters, encode, generate, models, pages
from edgetune.runtime.server.http.errors import ApiError
from edgetune.runtime.server.http.logs import note
from edgetune.runtime.server.http.service import Service
from edgetune.runtime.server.middleware import (
    HostCheck,
    KeyCheck,
    RequestScope,
    answer_to,
    error_response,
)

ROUTES = {
    "/": ("GET", pages.playground),
    "/health": ("GET", pages.health),
    "/ready": ("GET", pages.ready),
    "/metrics": ("GET", pages.metrics),
    "/openapi.json": ("GET", pages.openapi),
    "/v1/models": ("GET", models.list_models),
    "/v1/models/{model:path}": ("GET", models.show_model),
    "/v1/chat/completions": ("POST", generate.chat_completions),
    "/v1/completions": ("POST", generate.completions),
    "/v1/responses": ("POST", generate.responses),
    "/v1/embeddings": ("POST", encode.embeddings),
    "/score": ("POST", encode.score),
    "/pooling": ("POST", encode.pooling),
    "/tag": ("POST", encode.tag),
    "/classify": ("POST", encode.classify),
    "/v1/load_lora_adapter": ("POST", adapters.load_lora_adapter),
    "/v1/unload_lora_adapter": ("POST", adapters.unload_lora_adapter),
}


def build_app(service: Service) -> Starlette:
    """The application around one service. The service is stopped (drained) when the application
    shuts down.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.stop)

    options = service.options
    layers = [Middleware(RequestScope, service=service)]
    if options.allowed_hosts:
        layers.append(Middleware(HostCheck, hosts=options.allowed_hosts))
    if options.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-request-id"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    if options.api_keys:
        layers.append(Middleware(KeyCheck, keys=options.api_keys))
    app = Starlette(
        routes=[
            Route(path, endpoint, methods=[method]) for path, (method, endpoint) in ROUTES.items()
        ],
        middleware=layers,
        exception_handlers={
            HTTPException: _http_error,
            ApiError: _known_error,
            EdgetuneError: _known_error,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service, app.state.adapter_lock = service, asyncio.Lock()
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own 404 and 405, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    words = {404: "There is nothing at this path.", 405: "This path does not take that method."}
    answer = ApiError(
        error.status_code, words.get(error.status_code, error.detail), code="unknown_url"
    )
    return JSONResponse(answer.body(), error.status_code, headers=dict(error.headers or {}))


async def _known_error(request: Request, error: Exception) -> Response:
    """What has an answer of its own gets it here, inside the CORS layer; a defect of ours goes
    further out.
    """
    failure = answer_to(error)
    if failure is None:
        raise error
    note(request.scope, error=failure.code or failure.kind)
    return error_response(failure)
