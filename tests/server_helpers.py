"""A real server in a thread, on a free port, for one bundle; and the official client for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from edgetune.runtime import Runtime
from edgetune.runtime.scheduler import Scheduler
from edgetune.runtime.server.run import DrainingServer, listen
from edgetune.runtime.server.service import ServerOptions, Service


class Running:
    """A server that answers: its parts and its address."""

    def __init__(self, service: Service, server: DrainingServer, port: int) -> None:
        self.service, self.server, self.url = service, server, f"http://127.0.0.1:{port}"

    @property
    def runtime(self) -> Runtime:
        return self.service.runtime

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 30, **options})

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30, **options)

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


def until(condition: Any, *, seconds: float = 20.0) -> None:
    """Wait for something that must come; AssertionError when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
