"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters come and go while the base
runs.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from edgetune.core.settings import did_you_mean
from edgetune.runtime.adapters.registry import AdapterInUseError, InUse
from edgetune.runtime.server.http.bodies import LOAD_ADAPTER, UNLOAD_ADAPTER
from edgetune.runtime.server.http.errors import ApiError, bad_request, not_found
from edgetune.runtime.server.http.json_body import Schema, read_body
from edgetune.runtime.server.http.logs import note
from edgetune.runtime.server.http.service import Service

WAIT_S = 30.0
"""How long an unload waits for the texts under way, where the request does not say."""


async def load_lora_adapter(request: Request) -> Response:
    """POST /v1/load_lora_adapter: 200 and a line of text, as vLLM; a line more for each thing that
    could not be checked.
    """
    service, body = await _allowed(request, LOAD_ADAPTER)
    async with _one_at_a_time(request):
        notes = await service.in_thread(
            _load, service, body["lora_name"], body["lora_path"], bool(body.get("load_inplace"))
        )
    lines = [f"Success: LoRA adapter '{body['lora_name']}' added successfully."]
    return PlainTextResponse("\n".join([*lines, *(f"Note: {line}." for line in notes)]))


async def unload_lora_adapter(request: Request) -> Response:
    """POST /v1/unload_lora_adapter: 200 and a line of text; texts that are being generated with it
    go on, or see `in_use`.
    """
    service, body = await _allowed(request, UNLOAD_ADAPTER)
    name: str = body["lora_name"]
    in_use: InUse = body.get("in_use") or "forget"
    async with _one_at_a_time(request):
        if not service.runtime.registry.knows(name):
            near = did_you_mean(name, service.runtime.adapters)
            message = f"The lora adapter '{name}' cannot be found. {near}".rstrip()
            raise not_found(message, code="adapter_not_found", param="lora_name")
        _check_free(service, name)
        if (alias := service.aliases.using(name)) is not None:
            message = f"The lora adapter '{name}' answers for the alias '{alias}'."
            raise ApiError(409, message, param="lora_name", code="adapter_in_use")
        if in_use != "wait":
            await service.in_thread(_unload, service, name, in_use)
    if in_use == "wait":  # not under the lock, and not in a thread that others need
        await service.wait_in_thread(
            lambda: _unload(service, name, "wait", timeout_s=body.get("timeout_s") or WAIT_S)
        )
    return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")


async def _allowed(request: Request, schema: Schema) -> tuple[Service, dict[str, Any]]:
    service: Service = request.app.state.service
    service.check_open()
    body = await read_body(request, schema, limit_mb=service.options.max_body_mb)
    note(request.scope, adapter=body["lora_name"])
    if not service.options.adapter_folders:
        message = (
            "Adapters do not load over HTTP here; the operator can allow a folder with"
            " --adapter-folder."
        )
        raise ApiError(403, message, code="adapter_loading_disabled")
    return service, body


def _unload(service: Service, name: str, in_use: InUse, *, timeout_s: float | None = None) -> None:
    try:
        service.runtime.unload_adapter(name, in_use=in_use, timeout_s=timeout_s)
    except AdapterInUseError as error:
        message = (
            f"The lora adapter '{name}' is in use by {error.got} requests; unload it later, or with"
            " 'in_use' wait or forget."
        )
        raise ApiError(409, message, param="in_use", code="adapter_in_use") from error


def _one_at_a_time(request: Request) -> asyncio.Lock:
    lock: asyncio.Lock = request.app.state.adapter_lock
    return lock


def _check_free(service: Service, name: str) -> None:
    """409 for a version that a followed alias has, or may come to have."""
    for alias, rollout in service.rollouts.items():
        if rollout.holds(name):
            message = f"The lora adapter '{name}' belongs to the followed alias '{alias}'."
            raise ApiError(409, message, param="lora_name", code="adapter_in_use")


def _load(service: Service, name: str, path: str, in_place: bool) -> tuple[str, ...]:
    """What is to be noted of it. Every check first; with `in_place` the old adapter of that name
    goes only when the new one is known to fit.
    """
    runtime = service.runtime
    folder = allowed_folder(path, service.options.adapter_folders)
    if not _is_unicode(name):
        raise bad_request(
            "'lora_name' is not valid Unicode.", param="lora_name", code="invalid_value"
        )
    if name == service.base:
        raise bad_request(
            f"'{name}' is the base model's name.", param="lora_name", code="invalid_value"
        )
    _check_free(service, name)
    if not runtime.registry.knows(name):
        return runtime.load_adapter(name, folder).notes
    if not in_place:
        message = (
            f"The lora adapter '{name}' has already been loaded. To replace it, set 'load_inplace'"
            " to true."
        )
        raise bad_request(message, param="lora_name", code="adapter_exists")
    return runtime.registry.replace(name, folder).notes


def _is_unicode(text: str) -> bool:
    """Whether a text has an UTF-8 form: half a surrogate pair, which JSON can spell, has none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def allowed_folder(given: str, roots: Sequence[Path]) -> Path:
    """The adapter folder of a request's `lora_path`: absolute inside a root, or relative to one.

    ApiError: 403 outside every root (also by a link or `..`), 404 not there, 400 no folder. What
    lies outside is not looked at, so the answer says nothing about it.
    """
    outside = ApiError(
        403, "'lora_path' is outside the folders the operator allowed.", code="forbidden_path"
    )
    path = PurePath(given)
    if "\0" in given or ".." in path.parts:
        raise outside
    places = [(root, _below(path, root)) for root in roots]
    inside = [(root, parts) for root, parts in places if parts is not None]
    if not inside:
        raise outside
    for root, parts in inside:
        if (folder := _walk(root, parts, outside)) is not None:
            return folder
    message = f"No adapter found at '{path.name[:60]}' inside the allowed folders."
    raise not_found(message, code="adapter_not_found", param="lora_path")


def _below(path: PurePath, root: Path) -> tuple[str, ...] | None:
    """The path's parts under a root; None when it is not under it, or is the root itself."""
    if path.is_absolute():
        return path.relative_to(root).parts or None if path.is_relative_to(root) else None
    return path.parts or None


def _walk(root: Path, parts: Sequence[str], outside: ApiError) -> Path | None:
    """Follow the parts one by one; a link, of a folder or of a file in the last one, is refused."""
    folder = root
    for part in parts:
        folder = folder / part
        mode = _mode(folder)
        if mode is None:
            return None
        if stat.S_ISLNK(mode):
            raise outside
        if not stat.S_ISDIR(mode):
            raise bad_request("'lora_path' is no folder.", param="lora_path", code="invalid_value")
    for entry in folder.iterdir():
        mode = _mode(entry)
        if mode is None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise outside
    return folder


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except (OSError, ValueError):
        return None
