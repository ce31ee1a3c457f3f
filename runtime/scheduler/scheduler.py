"""Continuous batching: requests join and leave between steps, on a worker thread of the scheduler's
own.

Callers submit from any thread and hear of their tokens by events, which the worker thread delivers:
a callback must return quickly and must not call `close`. Reading an adapter and compiling a grammar
happen in the thread that submits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import InputError
from edgetune.core.text import Text
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.engine.kv_cache import plan_cache
from edgetune.runtime.scheduler.counters import Counters
from edgetune.runtime.scheduler.decode_loop import DecodeLoop, Seq2SeqLoop
from edgetune.runtime.scheduler.encode_queue import (
    EncodeJob,
    EncodeQueue,
    FairQueue,
    Finish,
    ScoreQueue,
)
from edgetune.runtime.scheduler.requests import (
    Event,
    GenerationRequest,
    QueueFull,
    Running,
    SchedulerClosed,
    SchedulerStats,
    Ticket,
)
from edgetune.runtime.tasks.answers import Classification, classification_of, unit_length
from edgetune.runtime.tasks.runtime import Runtime
from edgetune.runtime.tasks.scoring import Answered, AnswerReader
from edgetune.runtime.tasks.tagging import Tagging, Words, read_words

log = logging.getLogger("edgetune.runtime")


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
        lookup: int = 0,
        max_context: int | None = None,
    ) -> None:
        """`max_rows`: rows of one decode step; `max_queue`: requests that may wait;
        `prefill_chunk`: tokens of a prompt between two decode steps; `cache_mb` (10⁶ bytes): memory
        for keys and values, a quarter of it for shared prefixes (None: see `plan_cache`); `lookup`:
        tokens guessed by prompt lookup while one greedy request runs alone, which pays where
        answers repeat their prompts (0: none); `max_context`: tokens of prompt and answer together
        (None: the graph's, or what the memory holds). InputError for a value that is out of range.
        """
        for name, value in (
            ("max_rows", max_rows),
            ("max_queue", max_queue),
            ("prefill_chunk", prefill_chunk),
            ("max_context", max_context),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} is out of range", expected="1 or more", got=str(value))
        self.runtime, self.max_rows, self.max_queue = runtime, max_rows, max_queue
        self.counters = Counters()
        self._waiting: FairQueue[Running] = FairQueue()
        self._encodes = EncodeQueue(runtime) if runtime.decoder is None else ScoreQueue(runtime)
        self._loop: DecodeLoop | None = None
        if runtime.decoder is not None:
            apart = (
                runtime.manifest.graph.encoder is not None
            )  # a row is then two texts, each as long as the context at most
            plan = plan_cache(
                runtime.manifest.graph, rows=max_rows * (2 if apart else 1), cache_mb=cache_mb
            )
            self._loop = (Seq2SeqLoop if apart else DecodeLoop)(
                runtime.decoder,
                self.counters,
                rows=max_rows,
                tokens=plan.tokens,
                prefix_blocks=plan.prefix_blocks,
                chunk=prefill_chunk,
                lookup=lookup,
                max_context=max_context,
            )
        self._wake = threading.Condition()
        self._closing = self._abort = False
        self._thread: threading.Thread | None = None

    @property
    def context(self) -> int:
        """Tokens that prompt and answer of one request may have together."""
        if self._loop is None:
            return self.runtime.manifest.graph.max_length
        return self._loop.batch.arena.capacity

    def start(self) -> Scheduler:
        """Start the worker thread."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name="edgetune-scheduler", daemon=True
            )
            self._thread.start()
        return self

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=error is None)

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> Ticket:
        """Queue a request; its events come from the worker thread, the last one is Finished or
        Failed.

        May read an adapter from disk and compile a grammar: milliseconds, so not on an event loop.
        QueueFull when `max_queue` requests wait, SchedulerClosed after `close`, AdapterError for an
        adapter that is unknown or does not fit, InputError for a prompt or settings that cannot be
        used.
        """
        if self._loop is None:
            raise InputError("this bundle generates no text", expected="classify or embed")
        with self._wake:
            self._check_open(len(self._waiting))
        self._check_prompt(request.prompt_ids)
        name = self.runtime.chosen(request.adapter)
        self.runtime.need_text(name)
        lease = None if name is None else self.runtime.registry.acquire(name)
        try:
            sequence = self.runtime.sequence(
                request.prompt_ids, request.settings, choice=request.choice, context=self.context
            )
            running = Running(Ticket(request), on_event, sequence, lease)
            with self._wake:
                self._check_open(len(self._waiting))
                self._waiting.put(running, key=request.adapter, cost=running.tokens_needed)
                self._wake.notify()
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return running.ticket

    def classify(
        self, texts: Sequence[Text], adapter: str | None = None, *, truncate: bool = False
    ) -> Future[list[Classification]]:
        """As `Runtime.classify`, in batches with everyone else's texts. Errors of the input are
        raised here.
        """
        name = self.runtime.chosen(adapter)
        self.runtime.need_labels(name)
        ids = [self.runtime.text_ids(text, name, truncate=truncate) for text in texts]

        def finish_with(packed: PackedAdapter | None) -> Finish:
            assert packed is not None
            return lambda logits, _: [classification_of(row, packed) for row in logits]

        return self._encode(ids, name, finish_with)

    def embed(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        normalize: bool = True,
        truncate: bool = False,
    ) -> Future[npt.NDArray[np.float32]]:
        """As `Runtime.embed`, in batches with everyone else's texts. Errors of the input are raised
        here.
        """
        name = self.runtime.chosen(adapter)
        ids = [self.runtime.text_ids(text, name, truncate=truncate) for text in texts]
        return self._encode(
            ids, name, lambda _: lambda _, pooled: unit_length(pooled) if normalize else pooled
        )

    def tag(
        self, rows: Sequence[Words], adapter: str | None = None, *, truncate: bool = False
    ) -> Future[list[Tagging]]:
        """As `Runtime.tag`, in batches with everyone else's rows. Errors of the input are raised
        here.
        """
        name = self.runtime.chosen(adapter)
        self.runtime.need_tags(name)
        readings = [read_words(self.runtime, row, name, truncate=truncate) for row in rows]

        def finish_with(packed: PackedAdapter | None) -> Finish:
            assert packed is not None
            labels = packed.labels or ()

            def finish(logits: list[npt.NDArray[np.float32]], _: Any) -> list[Tagging]:
                found = iter(logits)
                return [
                    r.tagging(next(found), labels) if r.ids else Tagging(r.text, ())
                    for r in readings
                ]

            return finish

        return self._encode(
            [reading.ids for reading in readings if reading.ids], name, finish_with, words=True
        )

    def score(
        self, answers: Sequence[Answered], adapter: str | None = None, *, truncate: bool = False
    ) -> Future[list[float]]:
        """As `Runtime.score`, in batches with everyone else's answers; no longer than `context`,
        which bounds the memory. Errors of the input are raised here."""
        name = self.runtime.chosen(adapter)
        self.runtime.need_scores(name)
        reader = AnswerReader(self.runtime, name, truncate=truncate, limit=self.context)
        return self.score_ids([reader.ids(answered) for answered in answers], name)

    def score_ids(
        self, ids: Sequence[list[int]], adapter: str | None = None
    ) -> Future[list[float]]:
        """The same for answers that an `AnswerReader` has read, whose limit was `context` or
        less.
        """
        name = self.runtime.chosen(adapter)
        self.runtime.need_scores(name)
        if (longest := max(map(len, ids), default=0)) > self.context:
            raise InputError(
                "prompt and answer are longer than the context",
                expected=f"at most {self.context} tokens",
                got=f"{longest} tokens",
            )
        return self._encode(
            ids,
            name,
            lambda _: lambda scores, _: [float(score[0]) for score in scores],
            words=True,
            scores=True,
        )

    def stats(self) -> SchedulerStats:
        """A picture of this moment."""
        loop, counters, registry = self._loop, self.counters, self.runtime.registry
        with self._wake, counters.lock:
            rows = 0 if loop is None else loop.batch.rows
            return SchedulerStats(
                running=rows,
                waiting=len(self._waiting) + self._encodes.jobs,
                batch_rows=counters.batch_rows,
                cache_slots_used=rows,
                cache_slots_total=0 if loop is None else self.max_rows,
                requests_total=dict(counters.requests),
                prompt_tokens_total=counters.prompt_tokens,
                tokens_generated_total=counters.tokens,
                steps_total=counters.steps,
                step_seconds_total=counters.step_seconds,
                prefill_seconds_total=counters.prefill_seconds,
                queue_wait_seconds_total=counters.queue_wait_seconds,
                adapters=counters.by_adapter(),
                cache_bytes=0 if loop is None else loop.cache_bytes,
                cache_bytes_total=0 if loop is None else loop.cache_bytes_total,
                prefix_hit_tokens_total=0 if loop is None else loop.prefixes.hit_tokens,
                prefix_evictions_total=0 if loop is None else loop.prefixes.evictions,
                adapter_evictions_total=registry.evictions,
                adapter_bytes=registry.nbytes,
                encoded_rows_total=counters.encoded_rows,
                guessed_tokens_total=counters.guesses,
                right_guesses_total=counters.right_guesses,
            )

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests; answer those under way (`drain`) for at most `timeout_s`, then
        cancel the rest.
        """
        with self._wake:
            self._closing, self._abort = True, self._abort or not drain or self._thread is None
            self._wake.notify_all()
        if self._thread is None:
            self._turn()  # nobody else will tell those who wait
            return
        self._thread.join(timeout_s)
        with self._wake:
            self._abort = True
            self._wake.notify_all()
        self._thread.join()

    def _check_open(self, waiting: int) -> None:
        """SchedulerClosed or QueueFull; the lock is held."""
        if self._closing:
            raise SchedulerClosed("the scheduler is closed", expected="requests before close()")
        if waiting >= self.max_queue:
            self.counters.ended("refused")
            expected = f"at most {self.max_queue} waiting"
            retry = self.counters.retry_after()
            raise QueueFull(
                "the queue is full", retry_after_s=retry, expected=expected, got="one more"
            )

    def _check_prompt(self, ids: list[int]) -> None:
        assert self.runtime.decoder is not None
        self.runtime.decoder.check([ids])
        if len(ids) >= self.context:
            expected = f"at most {self.context - 1} tokens, so that one can follow"
            raise InputError(
                "the prompt is longer than the context", expected=expected, got=f"{len(ids)} tokens"
            )

    def _encode(
        self,
        ids: Sequence[list[int]],
        name: str | None,
        finish_with: Callable[[PackedAdapter | None], Finish],
        *,
        words: bool = False,
        scores: bool = False,
    ) -> Future[Any]:
        """`finish_with` gets the very adapter whose tensors the texts meet: its labels, not a
        successor's.
        """
        if self.runtime.encoder is None and not scores:
            raise InputError("this bundle generates text", expected="submit")
        lease = None if name is None else self.runtime.registry.acquire(name)
        finish = finish_with(None if lease is None else lease.resident.packed)
        job = EncodeJob(ids, lease, self.runtime.manifest.graph.hidden_size, finish, words=words)
        try:
            with self._wake:
                self._check_open(self._encodes.jobs)
                self._encodes.put(job)
                self._wake.notify()
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        self.counters.encoded(name, len(ids))
        if not ids:
            job.end()
        return job.future

    def _busy(self) -> bool:
        return bool(
            len(self._waiting)
            or len(self._encodes)
            or (self._loop is not None and self._loop.running)
        )

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._busy() or self._closing)
                if self._closing and not self._busy():
                    return
            try:
                self._turn()
            except Exception:
                log.exception("the scheduler's worker met an error that belongs to no request")

    def _turn(self) -> None:
        """End what is overdue, then one batch of texts, one piece of a prompt, one step of all
        rows.
        """
        now = time.monotonic()
        with self._wake:
            abort = self._abort
            late = self._waiting.remove(lambda running: abort or running.overdue(now) is not None)
            if abort:
                self._encodes.abandon(
                    SchedulerClosed("the scheduler was closed before this was answered")
                )
            texts = self._encodes.take()
        for running in late:
            reason = "cancelled" if abort else running.overdue(now) or "cancelled"
            self.counters.ended(reason)
            running.finish(reason)
        if texts:
            self._encodes.run(texts)
        if self._loop is not None:
            self._loop.batch.arena.lent = self._encodes.cache_tokens
            if abort:
                self._loop.sweep(cancel_all=True)
            self._loop.turn(self._next)

    def _next(self, fits: Callable[[Running], bool]) -> Running | None:
        """The request whose turn it is, when there is room for it."""
        with self._wake:
            waiting = self._waiting.peek()
            return self._waiting.pop() if waiting is not None and fits(waiting) else None
