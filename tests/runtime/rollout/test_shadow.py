"""What a request that is asked again counts for."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from edgetune.runtime.rollout.trial import RolloutBounds, VersionTrial
from edgetune.runtime.server.shadow import Shadow

SCOPE = {
    "type": "http", "app": None, "method": "POST", "path": "/classify", "scheme": "http",
    "headers": [],
}  # fmt: skip
CALM, UPSET = (json.dumps({"data": [{"label": label}]}).encode() for label in ("calm", "upset"))


def count(**answers: tuple[int, bytes]) -> tuple[int, int]:
    """(compared, alike) after one request whose answers are (status, body) of `new` and `old`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        status, body = answers[json.loads((await receive())["body"])["model"]]
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    trial = VersionTrial("new", "old", RolloutBounds(), 0.0)
    rollout: Any = SimpleNamespace(on_trial=("new", "old"), shadowed=trial.shadowed)
    shadow: Any = Shadow(app, None)  # type: ignore[arg-type]
    asyncio.run(shadow._compare(dict(SCOPE), {"input": "x"}, rollout, ("new", "old")))
    return trial.compared, trial.alike


@pytest.mark.parametrize(
    ("new", "old", "counted"),
    [
        ((200, CALM), (200, CALM), (1, 1)),
        ((200, UPSET), (200, CALM), (1, 0)),
        ((500, b"{}"), (200, CALM), (1, 0)),
        ((200, b"no JSON"), (200, CALM), (1, 0)),
        ((200, b"[]"), (200, CALM), (1, 0)),
        ((200, CALM), (200, b"no JSON"), (0, 0)),
        ((429, b"{}"), (200, CALM), (0, 0)),
        ((503, b"{}"), (200, CALM), (0, 0)),
        ((200, CALM), (429, b"{}"), (0, 0)),
    ],
)
def test_only_an_answer_of_the_old_one_and_a_say_of_the_new_one_count(
    new: tuple[int, bytes], old: tuple[int, bytes], counted: tuple[int, int]
) -> None:
    assert count(new=new, old=old) == counted
