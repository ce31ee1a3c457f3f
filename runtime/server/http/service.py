"""What every endpoint shares: the runtime, the scheduler, the operator's options, names of
models.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from edgetune.core.errors import AdapterError
from edgetune.core.settings import did_you_mean
from edgetune.runtime.rollout.aliases import Aliases
from edgetune.runtime.rollout.rollout import AliasRollout
from edgetune.runtime.scheduler.scheduler import Scheduler
from edgetune.runtime.server.http.errors import ApiError, not_found, overloaded, unavailable
from edgetune.runtime.server.http.exchange import Exchange, Mailroom
from edgetune.runtime.server.http.logs import LOGGER
from edgetune.runtime.server.http.metrics import Metrics
from edgetune.runtime.tasks.runtime import Runtime

T = TypeVar("T")
TROUBLE = ("refused", "rolled back", "lost", "failed")
"""Steps of a roll-out that are warnings."""
WAITS = 4
"""Unloads that wait for texts under way, at once."""


@dataclass(frozen=True)
class ServerOptions:
    """What the operator decides. Sizes in 10⁶ bytes, times in seconds."""

    model_name: str | None = None
    """the base model's name for clients; None: the end of the manifest's name"""
    adapter_folders: tuple[Path, ...] = ()
    """adapters load over HTTP only from inside these; none: not at all"""
    api_keys: tuple[str, ...] = ()
    """any of them opens the server; none: it is open to whoever reaches it"""
    deadline_s: float | None = 600.0
    """an answer takes at most this long, the wait in the queue included"""
    max_body_mb: float = 8.0
    max_prompt_tokens: int | None = None
    """None: the model's context"""
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    """names this server is called by; none: any"""
    drain_s: float = 30.0
    """on SIGTERM answers under way get this long"""


class Service:
    """One bundle being served. `started()` is called in the event loop, `stop()` when it ends."""

    def __init__(
        self,
        runtime: Runtime,
        scheduler: Scheduler,
        options: ServerOptions,
        aliases: Aliases | None = None,
    ) -> None:
        self.runtime, self.scheduler, self.options = runtime, scheduler, options
        self.aliases = Aliases() if aliases is None else aliases
        self.metrics = Metrics(scheduler, self.aliases)
        self.rollouts: dict[str, AliasRollout] = {}
        """alias → what follows a source and hears how its versions do"""
        self.base = options.model_name or short_name(runtime.manifest.base.name)
        self.created = int(time.time())
        self.draining = False
        self._mailroom: Mailroom | None = None
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="edgetune-http")
        self._submits = ThreadPoolExecutor(4, thread_name_prefix="edgetune-submit")
        self._waits = ThreadPoolExecutor(WAITS, thread_name_prefix="edgetune-unload")
        self._may_wait = threading.BoundedSemaphore(WAITS)
        if runtime.registry.knows(self.base):
            raise AdapterError(
                f"an adapter has the base model's name {self.base!r}",
                expected="different names",
                fix="Give the base another name with --model-name.",
            )

    @property
    def mailroom(self) -> Mailroom:
        """The way from the scheduler's thread into this event loop."""
        if self._mailroom is None:
            self._mailroom = Mailroom()
        return self._mailroom

    async def in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run what takes milliseconds (tokenizing, reading files) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def wait_in_thread(self, call: Callable[[], T]) -> T:
        """Run what waits for other requests, in threads that nothing else needs. ApiError 429 when
        WAITS of them wait.
        """
        if not self._may_wait.acquire(blocking=False):
            raise overloaded(
                f"{WAITS} requests wait for adapters to be free; ask again, or with 'in_use' refuse"
                " or forget.",
                retry_after=5,
            )
        work = self._waits.submit(call)
        work.add_done_callback(lambda _: self._may_wait.release())
        return await asyncio.wrap_future(work)

    async def submit(self, exchange: Exchange) -> None:
        """Queue an exchange's rows beside the event loop: reading an adapter or compiling a grammar
        may take seconds.

        These have threads of their own, so that nobody else's tokenizing waits behind them. A
        caller that is cancelled meanwhile leaves no row behind.
        """
        work = asyncio.get_running_loop().run_in_executor(self._submits, exchange.submit)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:

            def leave(done: asyncio.Future[None]) -> None:
                if not done.cancelled():
                    done.exception()  # nobody is left to hear of it
                exchange.cancel()

            work.add_done_callback(leave)
            raise

    def adapter_of(self, model: str) -> str | None:
        """The adapter behind a model's name, None for the base. ApiError 404 when there is no such
        model.
        """
        if model == self.base and self.runtime.manifest.mode != "merged":
            return None
        if self.runtime.registry.knows(model):
            return model
        raise no_such_model(model, self.models())

    def tell(self, alias: str, step: str, **facts: Any) -> None:
        """A step of a roll-out, into the log and the metrics."""
        self.metrics.rollout_steps.labels(alias, step).inc()
        level = logging.WARNING if step in TROUBLE else logging.INFO
        LOGGER.log(level, "rollout", extra={"fields": {"alias": alias, "step": step, **facts}})

    def models(self) -> list[str]:
        """Every name that can be asked for: the base (a merged bundle's is not there any more),
        adapters, aliases.
        """
        base = [] if self.runtime.manifest.mode == "merged" else [self.base]
        return list(dict.fromkeys([*base, *self.runtime.adapters, *self.aliases.all()]))

    def deadline(self, asked_s: float | None) -> float | None:
        """The moment of `time.monotonic()` by which an answer must be there: the caller's or the
        operator's.
        """
        limits = [limit for limit in (asked_s, self.options.deadline_s) if limit is not None]
        return time.monotonic() + min(limits) if limits else None

    def check_open(self) -> None:
        """ApiError 503 once the server is stopping."""
        if self.draining:
            raise unavailable("The server is stopping.")

    def stop(self) -> None:
        """Answer what is under way, then end the scheduler."""
        self.draining = True
        self.scheduler.close(drain=True, timeout_s=self.options.drain_s)
        for threads in (self._threads, self._submits, self._waits):
            threads.shutdown(wait=False, cancel_futures=True)


def no_such_model(model: str, known: Sequence[str]) -> ApiError:
    """404 for a name that no model has, with the nearest one that there is."""
    message = f"The model '{model}' does not exist. {did_you_mean(model, known)}".rstrip()
    return not_found(message, code="model_not_found", param="model")


def short_name(name: str) -> str:
    """`builtin:smollm2-135m-instruct` → its last part; a folder's path is nobody's business."""
    return PurePosixPath(name.replace("\\", "/").rpartition(":")[2].rstrip("/")).name or "base"
