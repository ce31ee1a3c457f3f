"""The scheduler's worker: the queues of those who wait, and the thread that runs the engine for
them.

One turn ends what is overdue, runs one batch of texts, one piece of a prompt and one step of all
rows. Everything but `turn` may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edgetune.runtime.scheduler.counters import Counters
from edgetune.runtime.scheduler.decode_loop import DecodeLoop
from edgetune.runtime.scheduler.fair_queue import FairQueue
from edgetune.runtime.scheduler.jobs import EncodeJob, JobQueue
from edgetune.runtime.scheduler.requests import QueueFull, Running, SchedulerClosed

log = logging.getLogger("edgetune.runtime")


class Worker:
    """Who waits, and who is being answered."""

    def __init__(
        self, texts: JobQueue, loop: DecodeLoop | None, counters: Counters, *, max_queue: int
    ) -> None:
        """`texts`: those to encode or to score; `loop`: None for a bundle that generates no
        text.
        """
        self.texts, self.loop, self.counters, self.max_queue = texts, loop, counters, max_queue
        self.lock = threading.Condition()
        self._waiting: FairQueue[Running] = FairQueue()
        self._closing = self._abort = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Callers whose request has not begun."""
        return len(self._waiting) + self.texts.jobs

    def start(self) -> None:
        """Start the thread; a second call does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name="edgetune-scheduler", daemon=True
            )
            self._thread.start()

    def close(self, *, drain: bool, timeout_s: float | None) -> None:
        """See `Scheduler.close`."""
        with self.lock:
            self._closing, self._abort = True, self._abort or not drain or self._thread is None
            self.lock.notify_all()
        if self._thread is None:
            self.turn()  # nobody else will tell those who wait
            return
        self._thread.join(timeout_s)
        with self.lock:
            self._abort = True
            self.lock.notify_all()
        self._thread.join()

    def check_room(self) -> None:
        """SchedulerClosed or QueueFull where a request to generate could not be queued now."""
        with self.lock:
            self._check_open(len(self._waiting))

    def put(self, running: Running) -> None:
        """Queue a request to generate. SchedulerClosed or QueueFull when that cannot be."""
        with self.lock:
            self._check_open(len(self._waiting))
            self._waiting.put(running, key=running.request.adapter, cost=running.tokens_needed)
            self.lock.notify()

    def put_texts(self, job: EncodeJob) -> None:
        """Queue a caller's texts. SchedulerClosed or QueueFull when that cannot be."""
        with self.lock:
            self._check_open(self.texts.jobs)
            self.texts.put(job)
            self.lock.notify()

    def turn(self) -> None:
        """End what is overdue, then one batch of texts, one piece of a prompt, one step of all
        rows.
        """
        now = time.monotonic()
        with self.lock:
            abort = self._abort
            late = self._waiting.remove(lambda running: abort or running.overdue(now) is not None)
            if abort:
                self.texts.abandon(
                    SchedulerClosed("the scheduler was closed before this was answered")
                )
            texts = self.texts.take()
        for running in late:
            reason = "cancelled" if abort else running.overdue(now) or "cancelled"
            self.counters.ended(reason)
            running.finish(reason)
        if texts:
            self.texts.run(texts)
        if self.loop is not None:
            self.loop.batch.lend(self.texts.cache_tokens)
            if abort:
                self.loop.sweep(cancel_all=True)
            self.loop.turn(self._next)

    def _check_open(self, waiting: int) -> None:
        """The lock is held."""
        if self._closing:
            raise SchedulerClosed("the scheduler is closed", expected="requests before close()")
        if waiting >= self.max_queue:
            self.counters.ended("refused")
            expected = f"at most {self.max_queue} waiting"
            retry = self.counters.retry_after()
            raise QueueFull(
                "the queue is full", retry_after_s=retry, expected=expected, got="one more"
            )

    def _busy(self) -> bool:
        return bool(
            len(self._waiting) or len(self.texts) or (self.loop is not None and self.loop.running)
        )

    def _work(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self._busy() or self._closing)
                if self._closing and not self._busy():
                    return
            try:
                self.turn()
            except Exception:
                log.exception("the scheduler's worker met an error that belongs to no request")

    def _next(self, fits: Callable[[Running], bool]) -> Running | None:
        """The request whose turn it is, when there is room for it."""
        with self.lock:
            waiting = self._waiting.peek()
            return self._waiting.pop() if waiting is not None and fits(waiting) else None
