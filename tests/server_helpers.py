"""A real server in a thread, on a free port, for one bundle; and the official client for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from openai import OpenAI

from edgetune.runtime import Runtime
from edgetune.runtime.generation import GenerationSettings
from edgetune.runtime.scheduler import Event, GenerationRequest, Scheduler
from edgetune.runtime.server.run import DrainingServer, listen
from edgetune.runtime.server.service import ServerOptions, Service


T = TypeVar("T")
NEVER_EOS = 2
"""The tiny decoder's end token."""


class Running:
    """A server that answers: its parts and its address."""

    def __init__(self, service: Service, server: DrainingServer, port: int) -> None:
        self.service, self.server, self.url = service, server, f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30, verify=False)

    @property
    def runtime(self) -> Runtime:
        return self.service.runtime

    def client(self, **options: Any) -> OpenAI:
        http = httpx.Client(timeout=30, verify=False)
        return OpenAI(base_url=f"{self.url}/v1", http_client=http, **{"api_key": "none", "max_retries": 0, **options})

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def running(self) -> int:
        stats = self.service.scheduler.stats()
        return stats.running + stats.waiting


@contextmanager
def serve(bundle: Path, *, scheduler: dict[str, Any] | None = None, **options: Any) -> Iterator[Running]:
    """Serve a bundle until the block ends."""
    with Runtime.open(bundle, threads=1) as runtime, listen("127.0.0.1", 0) as place:
        engine = Scheduler(runtime, **(scheduler or {}))
        with engine:
            options = {"model_name": "tiny", "drain_s": 5.0, **options}
            server = DrainingServer(Service(runtime, engine, ServerOptions(**options)))
            port = place.getsockname()[1]
            thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])), daemon=True)
            thread.start()
            until(lambda: server.started)
            try:
                yield Running(server._service, server, port)
            finally:
                server.should_exit = True
                thread.join(20)


class Pace:
    """A row of the scheduler that lets it make one step for each `step()`: what else runs is at the same pace."""

    def __init__(self, running: Running) -> None:
        self._permits, self._reached = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        settings = GenerationSettings(max_new_tokens=10_000, logit_bias=((NEVER_EOS, -100.0),))
        scheduler = running.service.scheduler
        self._ticket = scheduler.submit(GenerationRequest([5, 6, 7], None, settings), self._wait)
        assert self._reached.acquire(timeout=20)

    def _wait(self, event: Event) -> None:
        self._reached.release()
        if not self._over:
            self._permits.acquire(timeout=20)

    def step(self) -> None:
        """One step of every row; returns when the next one waits."""
        self._permits.release()
        assert self._reached.acquire(timeout=20)

    def end(self) -> None:
        """From here on everything runs freely."""
        self._over = True
        self._ticket.cancel()
        self._permits.release()


@contextmanager
def paced(running: Running) -> Iterator[Pace]:
    """Hold the scheduler for the length of a with statement."""
    pace = Pace(running)
    try:
        yield pace
    finally:
        pace.end()


def in_background(call: Callable[[], T]) -> Future[T]:
    """Run a blocking client call beside the test."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def until(condition: Any, *, seconds: float = 20.0) -> None:
    """Wait for something that must come; AssertionError when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
