"""uvicorn around the application: one process, a socket bound before anything is loaded, a drain on
SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from edgetune.core.errors import OutputError
from edgetune.runtime.server.app import build_app
from edgetune.runtime.server.http.logs import LOGGER
from edgetune.runtime.server.http.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: no new connections, answers under way go on, a second signal ends
    them.
    """

    def __init__(self, service: Service) -> None:
        options = service.options
        config = uvicorn.Config(
            build_app(service),
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            server_header=False,
            h11_max_incomplete_event_size=65536,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(options.drain_s)),
        )
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a drained server has ended well: the signal is not raised again
        afterwards.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: end now."""
        LOGGER.info("draining", extra={"fields": {"signal": signal.Signals(sig).name}})
        self._service.draining = True
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OutputError when the place is taken. Port 0 takes a free one."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        found.listen(128)
    except OSError as error:
        fix = "Choose another with --host and --port."
        raise OutputError(
            f"cannot listen: {error.strerror or error}", where=f"{host}:{port}", fix=fix
        ) from error
    return found


def hosts_of(host: str, also: tuple[str, ...]) -> tuple[str, ...]:
    """Host names a server on this address answers for: on loopback only its own, elsewhere any,
    unless some are given.
    """
    if host in LOOPBACK:
        return (*LOOPBACK, "[::1]", *also)
    return (host, *LOOPBACK, "[::1]", *also) if also else ()
