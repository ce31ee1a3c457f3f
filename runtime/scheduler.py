"""Continuous batching: requests join and leave between steps, on a worker thread of the scheduler's own.

Callers submit from any thread and hear of their tokens by events, which the worker thread delivers: a callback must
return quickly and must not call `close`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.errors import InputError
from edgetune.runtime.engine import DecodeState
from edgetune.runtime.events import (
    AdapterCounters,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    QueueFull,
    SchedulerClosed,
    SchedulerStats,
    Ticket,
    TokenEvent,
)
from edgetune.runtime.generation import TokenSequence
from edgetune.runtime.runtime import Classification, Completion, Runtime

__all__ = [
    "Event",
    "FailedEvent",
    "FinishedEvent",
    "GenerationRequest",
    "QueueFull",
    "Scheduler",
    "SchedulerClosed",
    "SchedulerStats",
    "Ticket",
    "TokenEvent",
]


class _Row:
    """A submitted request and what has become of it."""

    def __init__(self, ticket: Ticket, on_event: Callable[[Event], None]) -> None:
        self.ticket, self.request, self.on_event = ticket, ticket.request, on_event
        self.submitted = time.monotonic()
        self.started = self.first = 0.0
        self.state: DecodeState | None = None
        self.sequence: TokenSequence | None = None
        self.logits: npt.NDArray[np.float32] | None = None

    def overdue(self) -> str | None:
        """Why this row ends now although nothing more was computed: "cancelled", "deadline" or None."""
        if self.ticket.cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and time.monotonic() >= deadline else None


class Scheduler:
    """Many callers, one engine. `start()` it or use it as a context manager."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        max_rows: int = 16,
        max_queue: int = 64,
        cache_mb: float | None = None,
        prefill_chunk: int = 128,
    ) -> None:
        """`max_rows`: rows of one decode step; `max_queue`: requests that may wait; `prefill_chunk`: tokens of a
        prompt between two decode steps; `cache_mb`: memory for keys and values (10⁶ bytes)."""
        self.runtime = runtime
        self.max_rows, self.max_queue, self.cache_mb, self.prefill_chunk = (
            max_rows,
            max_queue,
            cache_mb,
            prefill_chunk,
        )
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._encodes: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = self._abort = False
        self._thread: threading.Thread | None = None
        self._finished: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._adapters: dict[str, Counter[str]] = {}

    def start(self) -> Scheduler:
        """Start the worker thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="edgetune-scheduler", daemon=True)
            self._thread.start()
        return self

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request; its events come from the worker thread, the last one is Finished or Failed.

        QueueFull when `max_queue` requests wait, SchedulerClosed after `close`, InputError for an encoder's bundle.
        """
        if self.runtime.decoder is None:
            raise InputError("this bundle generates no text", expected="classify or embed")
        ticket = Ticket(request)
        with self._wake:
            self._check_open()
            if len(self._waiting) >= self.max_queue:
                self._finished["refused"] += 1
                raise QueueFull(
                    "the queue is full",
                    retry_after_s=1.0,
                    expected=f"at most {self.max_queue} waiting",
                    got="one more",
                )
            self._waiting.append(_Row(ticket, on_event))
            self._wake.notify()
        return ticket

    def classify(
        self, texts: Sequence[str], adapter: str | None = None, *, truncate: bool = False
    ) -> Future[list[Classification]]:
        """`Runtime.classify` in turn with everyone else's."""
        return self._encode(lambda: self.runtime.classify(texts, adapter, truncate=truncate))

    def embed(
        self,
        texts: Sequence[str],
        adapter: str | None = None,
        *,
        normalize: bool = True,
        truncate: bool = False,
    ) -> Future[npt.NDArray[np.float32]]:
        """`Runtime.embed` in turn with everyone else's."""
        return self._encode(
            lambda: self.runtime.embed(texts, adapter, normalize=normalize, truncate=truncate)
        )

    def stats(self) -> SchedulerStats:
        """A picture of this moment."""
        with self._wake:
            return SchedulerStats(
                running=len(self._running),
                waiting=len(self._waiting),
                batch_rows=self._totals["batch_rows"],
                cache_slots_used=len(self._running),
                cache_slots_total=self.max_rows,
                requests_total=dict(self._finished),
                prompt_tokens_total=self._totals["prompt_tokens"],
                tokens_generated_total=self._totals["tokens"],
                steps_total=self._totals["steps"],
                step_seconds_total=self._totals["step_us"] / 1e6,
                prefill_seconds_total=self._totals["prefill_us"] / 1e6,
                queue_wait_seconds_total=self._totals["wait_us"] / 1e6,
                adapters={name: AdapterCounters(**counts) for name, counts in self._adapters.items()},
            )

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests; answer those under way (`drain`) for at most `timeout_s`, then cancel the rest."""
        with self._wake:
            self._closing, self._abort = True, self._abort or not drain
            self._wake.notify_all()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        with self._wake:
            self._abort = True
            self._wake.notify_all()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closing:
            raise SchedulerClosed("the scheduler is closed", expected="requests before close()")

    def _encode(self, call: Callable[[], Any]) -> Future[Any]:
        if self.runtime.encoder is None:
            raise InputError("this bundle generates text", expected="submit")
        future: Future[Any] = Future()
        with self._wake:
            self._check_open()
            if len(self._encodes) >= self.max_queue:
                raise QueueFull("the queue is full", retry_after_s=1.0)
            self._encodes.append((future, call))
            self._wake.notify()
        return future

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._encodes or self._closing):
                    self._wake.wait()
                if self._closing and not (self._waiting or self._running or self._encodes):
                    return
                while self._waiting and len(self._running) < self.max_rows:
                    self._running.append(self._waiting.popleft())
                encode = self._encodes.popleft() if self._encodes else None
            if encode is not None and encode[0].set_running_or_notify_cancel():
                try:
                    encode[0].set_result(encode[1]())
                except Exception as error:  # whatever it is, the caller gets it, and the worker goes on
                    encode[0].set_exception(error)
            for row in list(self._running):
                self._advance(row)

    def _advance(self, row: _Row) -> None:
        try:
            reason = "cancelled" if self._abort else row.overdue()
            if reason is not None:
                self._finish(row, reason)
            elif row.state is None:
                self._prefill(row)
            else:
                self._step(row)
        except Exception as error:  # one row's trouble is not the others'
            self._end(row, "failed", FailedEvent(error))

    def _prefill(self, row: _Row) -> None:
        request = row.request
        row.started = time.monotonic()
        engine = self.runtime._need(self.runtime.decoder)
        limit = self.runtime.manifest.graph.max_length - len(request.prompt_ids)
        row.sequence = TokenSequence(
            self.runtime.tokenizer, request.settings, row=request.choice, limit=limit
        )
        capacity = len(request.prompt_ids) + row.sequence.limit
        row.state, row.logits = engine.start(
            [request.prompt_ids], [self.runtime.bound(request.adapter)], capacity=capacity
        )
        self._totals["wait_us"] += int((row.started - row.submitted) * 1e6)
        self._totals["prefill_us"] += int((time.monotonic() - row.started) * 1e6)
        self._totals["prompt_tokens"] += len(request.prompt_ids)
        counts = self._adapters.setdefault(request.adapter or "", Counter())
        counts["requests"] += 1
        counts["prompt_tokens"] += len(request.prompt_ids)

    def _step(self, row: _Row) -> None:
        assert row.sequence is not None and row.state is not None and row.logits is not None
        token = row.sequence.choose(row.logits[0])
        piece = row.sequence.add(token)
        row.first = row.first or time.monotonic()
        self._totals["tokens"] += 1
        self._adapters[row.request.adapter or ""]["tokens"] += 1
        row.on_event(TokenEvent(piece, (token,)))
        if row.sequence.finish_reason is not None:
            self._finish(row, row.sequence.finish_reason)
            return
        start = time.monotonic()
        row.logits = row.state.step([token])
        self._totals["steps"] += 1
        self._totals["step_us"] += int((time.monotonic() - start) * 1e6)

    def _finish(self, row: _Row, reason: str) -> None:
        now, tokens = time.monotonic(), row.sequence.tokens if row.sequence else []
        first = row.first or now
        self._end(
            row,
            reason,
            FinishedEvent(
                Completion(
                    text=row.sequence.text if row.sequence else "",
                    finish_reason=reason,
                    prompt_tokens=len(row.request.prompt_ids),
                    completion_tokens=len(tokens),
                    ttft_ms=(first - row.submitted) * 1e3,
                    tpot_ms=(now - first) * 1e3 / (len(tokens) - 1) if len(tokens) > 1 else None,
                    token_ids=tuple(tokens),
                    queue_ms=((row.started or now) - row.submitted) * 1e3,
                )
            ),
        )

    def _end(self, row: _Row, reason: str, event: Event) -> None:
        with self._wake:
            self._running.remove(row)
            self._finished[reason] += 1
        row.state = row.logits = None
        try:
            row.on_event(event)
        finally:
            row.ticket._done.set()
