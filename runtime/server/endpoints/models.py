"""`/v1/models`: the base model and its adapters, described without reading a weight."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgetune.core.errors import AdapterError
from edgetune.core.files import read_json
from edgetune.core.layout import ADAPTER_CONFIG, ADAPTER_METADATA
from edgetune.runtime.adapters.lora import wrong_types
from edgetune.runtime.adapters.registry import AdapterStatus
from edgetune.runtime.server.http.errors import AsciiJson, not_found
from edgetune.runtime.server.http.service import Service


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    service: Service = request.app.state.service
    return AsciiJson({"object": "list", "data": await service.in_thread(model_cards, service)})


async def show_model(request: Request) -> Response:
    """GET /v1/models/{model}."""
    service: Service = request.app.state.service
    name = request.path_params["model"]
    cards = await service.in_thread(model_cards, service)
    for card in cards:
        if card["id"] == name:
            return AsciiJson(card)
    raise not_found(f"The model '{name}' does not exist.", code="model_not_found", param="model")


def model_cards(service: Service) -> list[dict[str, Any]]:
    """Every model as OpenAI lists it, with vLLM's `parent`, `root` and `max_model_len`; the base
    first.

    A merged bundle's base is not there any more, so only what was merged is listed.
    """
    base = (
        []
        if service.runtime.manifest.mode == "merged"
        else [_card(service, service.base, parent=None)]
    )
    cards = base + [
        _adapter_card(service, status) for status in service.runtime.registry.statuses()
    ]
    return _with_aliases(service, cards)


def _with_aliases(service: Service, cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An alias is described by the version that answers most; `versions` has each one's share. It
    hides an adapter of its name.
    """
    known = {card["id"]: card for card in cards}
    for alias, shares in service.aliases.all().items():
        most = max(shares, key=lambda version: shares[version])
        own = known.get(most) or _card(service, alias, parent=service.base)
        known[alias] = {**own, "id": alias, "versions": shares}
    return list(known.values())


def _adapter_card(service: Service, status: AdapterStatus) -> dict[str, Any]:
    facts = dict(_facts(service, status))
    template = service.runtime.tokenizer.template_of(facts.pop("prompt_format", None))
    card = _card(service, status.name, parent=service.base)
    return {
        **card,
        **facts,
        "prompt_template": template,
        "resident": status.resident,
        "bytes": status.nbytes,
        **({"notes": list(status.notes)} if status.notes else {}),
    }


def _card(service: Service, name: str, *, parent: str | None) -> dict[str, Any]:
    manifest, tokenizer = service.runtime.manifest, service.runtime.tokenizer
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "edgetune",
        "root": service.base,
        "parent": parent,
        "max_model_len": service.scheduler.context,
        "task": manifest.task,
        "prompt_template": tokenizer.template_of(None),
    }


def _facts(service: Service, status: AdapterStatus) -> dict[str, Any]:
    entry = service.runtime.manifest.adapter(status.name)
    if status.folder is None:
        return (
            {}
            if entry is None
            else {
                "rank": entry.rank,
                "task": entry.task,
                "labels": entry.labels,
                "prompt_format": entry.prompt_format,
            }
        )
    folder = Path(status.folder)
    try:
        changed = (folder / ADAPTER_CONFIG).stat().st_mtime_ns
    except OSError:  # the folder went away; a resident adapter still answers
        return {}
    return _described(folder, changed)


@functools.lru_cache(maxsize=1024)
def _described(folder: Path, changed: int) -> dict[str, Any]:
    """Rank, labels and prompt format out of a PEFT folder's JSON files; `changed` makes the cache
    notice a new one.
    """
    config, own = _read(folder / ADAPTER_CONFIG), _read(folder / ADAPTER_METADATA)
    if wrong_types(config, own):  # it cannot be used, and the others' cards must not suffer
        return {}
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    rank = max((rank for rank in ranks if isinstance(rank, int)), default=None)
    facts = {"rank": rank, "labels": own.get("labels"), "prompt_format": own.get("prompt_format")}
    return facts | ({"task": own["task"]} if isinstance(own.get("task"), str) else {})


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, error=AdapterError)
    except AdapterError:
        return {}
    return value if isinstance(value, dict) else {}
