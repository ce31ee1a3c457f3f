"""Requests that share the engine get the answers they would get alone, in time, and exactly one last event."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime_helpers import decoder_bundle

from edgetune.runtime import Runtime
from edgetune.runtime.scheduler import (
    Event,
    FinishedEvent,
    GenerationRequest,
    Scheduler,
    TokenEvent,
)


@pytest.fixture(scope="module")
def runtime(tiny_decoder: Path) -> Iterator[Runtime]:
    with Runtime.open(decoder_bundle(tiny_decoder), threads=1) as opened:
        yield opened


def request(runtime: Runtime, prompt: str, adapter: str | None = None, **settings: object) -> GenerationRequest:
    return GenerationRequest(runtime.prompt_ids(prompt, adapter), adapter, runtime.settings(adapter, **settings))


def collect(events: queue.Queue[Event]) -> list[Event]:
    found = [events.get(timeout=30)]
    while isinstance(found[-1], TokenEvent):
        found.append(events.get(timeout=30))
    return found


def test_a_scheduled_answer_is_the_runtimes(runtime: Runtime) -> None:
    with Scheduler(runtime) as scheduler:
        events: queue.Queue[Event] = queue.Queue()
        scheduler.submit(request(runtime, "hello there", "a", max_new_tokens=6), events.put)
        *tokens, last = collect(events)
    alone = runtime.generate(["hello there"], "a", max_new_tokens=6)[0]
    assert isinstance(last, FinishedEvent)
    assert (last.completion.text, last.completion.finish_reason) == (alone.text, alone.finish_reason)
    assert "".join(event.text for event in tokens if isinstance(event, TokenEvent)) == alone.text
