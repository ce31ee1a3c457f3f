"""The beginning of every request for a model: its body read and checked, an alias resolved."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from edgetune.runtime.server.http.json_body import Schema, read_body
from edgetune.runtime.server.http.logs import note, request_id_of
from edgetune.runtime.server.http.service import Service

BODY = "edgetune.body"
"""of a request for an alias, in its scope: what is asked again of two versions is found there"""


AS_NAMED = "edgetune.as_named"
"""in the scope of a request whose model is no alias, whatever its name"""


async def read_asked(request: Request, schema: Schema) -> tuple[Service, dict[str, Any]]:
    """The service, and the body with the version in place of an alias: it stands in the answer, in
    the log and in the metrics. A user's requests meet the same version; those of nobody are spread.
    """
    service: Service = request.app.state.service
    service.check_open()
    body = await read_body(request, schema, limit_mb=service.options.max_body_mb)
    asked, user = body["model"], body.get("user") or body.get("safety_identifier")
    note(request.scope, model=asked, user=user)
    version = service.aliases.choose(asked, user or request_id_of(request.scope))
    if version is None or AS_NAMED in request.scope:
        return service, body
    note(request.scope, version=version)
    request.scope[BODY] = body
    return service, {**body, "model": version}
