"""The scheduler's thread on one side, coroutines on the other: requests in, events out, and
cancelling.

The worker thread must not wait for the network, so it only appends to a queue; one wake-up of the
event loop carries whatever has gathered since the last.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from starlette.types import Receive

from edgetune.runtime.scheduler.requests import (
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    Ticket,
)
from edgetune.runtime.scheduler.scheduler import Scheduler

T = TypeVar("T")
Numbered = tuple[int, Event]


class ClientGone(Exception):  # noqa: N818  (nobody is left to be told of an error)
    """The client closed its connection."""


class Mailroom:
    """Carries events from the scheduler's thread to the event loop, many with one wake-up."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._letters: deque[tuple[asyncio.Queue[Numbered], Numbered]] = deque()
        self._woken = False

    def post(self, box: asyncio.Queue[Numbered], letter: Numbered) -> None:
        """Called by the worker thread; never blocks. A closed loop has no readers left, so nothing
        is lost.
        """
        self._letters.append((box, letter))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # before emptying: what comes from here on wakes again
        while self._letters:
            box, letter = self._letters.popleft()
            box.put_nowait(letter)


class Exchange:
    """The rows of one HTTP request: `submit` them, read `events` inside the context; leaving it
    cancels what runs.
    """

    def __init__(
        self, scheduler: Scheduler, mailroom: Mailroom, requests: Sequence[GenerationRequest]
    ) -> None:
        self._scheduler, self._mailroom, self._requests = scheduler, mailroom, requests
        self._box: asyncio.Queue[Numbered] = asyncio.Queue()
        self._open: dict[int, Ticket] = {}

    def submit(self) -> None:
        """Queue every row, or none: QueueFull takes back those before it."""
        try:
            for i, request in enumerate(self._requests):
                self._open[i] = self._scheduler.submit(request, self._receiver(i))
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Free the rows that are still running."""
        for ticket in self._open.values():
            ticket.cancel()
        self._open.clear()

    async def events(self) -> AsyncIterator[Numbered]:
        """(row, event) as they come, until every row has ended."""
        while self._open:
            row, event = await self._box.get()
            if isinstance(event, (FinishedEvent, FailedEvent)):
                self._open.pop(row, None)
            yield row, event

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def _receiver(self, row: int) -> Callable[[Event], None]:
        post, box = self._mailroom.post, self._box
        return lambda event: post(box, (row, event))


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await the work, but stop it and raise ClientGone when the client goes away first. The body
    must be read.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        both: set[asyncio.Future[Any]] = {task, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError, ClientGone):
                    await each


async def _gone(receive: Receive) -> None:
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await receive()
