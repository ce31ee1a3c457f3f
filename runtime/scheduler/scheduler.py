"""Continuous batching: requests join and leave between steps, on a worker thread of the scheduler's
own.

Callers submit from any thread and hear of their tokens by events, which the worker thread delivers:
a callback must return quickly and must not call `close`. Reading an adapter and compiling a grammar
happen in the thread that submits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.core.errors import InputError
from edgetune.core.text import Text
from edgetune.runtime.adapters.packing import PackedAdapter
from edgetune.runtime.scheduler.counters import Counters, SchedulerStats
from edgetune.runtime.scheduler.decode_loop import DecodeLoop
from edgetune.runtime.scheduler.encode_queue import EncodeQueue
from edgetune.runtime.scheduler.jobs import EncodeJob, Finish, JobQueue
from edgetune.runtime.scheduler.requests import Event, GenerationRequest, Running, Ticket
from edgetune.runtime.scheduler.score_queue import ScoreQueue
from edgetune.runtime.scheduler.worker import Worker
from edgetune.runtime.tasks.answers import (
    Classification,
    check_threshold,
    classification_of,
    need_finite,
    unit_length,
)
from edgetune.runtime.tasks.encoder import head_logits
from edgetune.runtime.tasks.runtime import Runtime
from edgetune.runtime.tasks.scoring import Answered, AnswerReader
from edgetune.runtime.tasks.tagging import Tagging, Words, read_words


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
        for keys and values, a quarter of it for shared prefixes (None: what so many rows usually
        need); `lookup`:
        tokens guessed by prompt lookup while one greedy request runs alone, which pays where
        answers repeat their prompts (0: none); `max_context`: tokens of prompt and answer together
        (None: the graph's, or what the memory holds). InputError for a value that is out of range.
        """
        sizes = {"max_rows": max_rows, "max_queue": max_queue, "prefill_chunk": prefill_chunk}
        for name, value in (sizes | {"max_context": max_context}).items():
            if value is not None and value < 1:
                raise InputError(f"{name} is out of range", expected="1 or more", got=str(value))
        self.runtime, self.max_rows, self.max_queue = runtime, max_rows, max_queue
        self.counters = Counters()
        loop: DecodeLoop | None = None
        texts: JobQueue
        if runtime.decoder is None:
            encoder = runtime.opened.need_encoder()
            texts = EncodeQueue(encoder, pad_token_id=runtime.tokenizer.pad_token_id)
        else:
            texts = ScoreQueue(runtime.decoder)
            batch = runtime.decoder.new_batch(
                rows=max_rows, cache_mb=cache_mb, max_context=max_context
            )
            loop = DecodeLoop(batch, self.counters, chunk=prefill_chunk, lookup=lookup)
        self.worker = Worker(texts, loop, self.counters, max_queue=max_queue)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer of one request may have together."""
        loop = self.worker.loop
        return self.runtime.manifest.graph.max_length if loop is None else loop.batch.context

    def start(self) -> Scheduler:
        """Start the worker thread."""
        self.worker.start()
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
        if self.worker.loop is None:
            raise InputError("this bundle generates no text", expected="classify or embed")
        self.worker.check_room()
        self._check_prompt(request.prompt_ids)
        name = self.runtime.chosen(request.adapter)
        self.runtime.need_text(name)
        lease = None if name is None else self.runtime.registry.acquire(name)
        try:
            sequence = self.runtime.sequence(
                request.prompt_ids, request.settings, choice=request.choice, context=self.context
            )
            running = Running(Ticket(request), on_event, sequence, lease)
            self.worker.put(running)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return running.ticket

    def classify(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        truncate: bool = False,
        control_tokens: str | None = None,
        threshold: float | None = None,
    ) -> Future[list[Classification]]:
        """As `Runtime.classify`, in batches with everyone else's texts. Errors of the input are
        raised here.
        """
        check_threshold(threshold)
        name = self.runtime.chosen(adapter)
        self.runtime.need_labels(name)
        how: dict[str, Any] = {"truncate": truncate, "control_tokens": control_tokens}
        ids = [self.runtime.text_ids(text, name, **how) for text in texts]

        def finish_with(packed: PackedAdapter | None) -> Finish:
            assert packed is not None
            if self.runtime.decoder is None:
                return lambda logits, _: [
                    classification_of(row, packed, threshold) for row in logits
                ]
            manifest = self.runtime.manifest
            return lambda _, states: [
                classification_of(head_logits(manifest, packed, state), packed, threshold)
                for state in states
            ]

        if self.runtime.decoder is not None:
            self._check_length(ids)
        return self._encode(ids, name, finish_with, scores=True)

    def embed(
        self,
        texts: Sequence[Text],
        adapter: str | None = None,
        *,
        normalize: bool = True,
        truncate: bool = False,
        control_tokens: str | None = None,
    ) -> Future[npt.NDArray[np.float32]]:
        """As `Runtime.embed`, in batches with everyone else's texts. Errors of the input are raised
        here.
        """
        name = self.runtime.chosen(adapter)
        how: dict[str, Any] = {"truncate": truncate, "control_tokens": control_tokens}
        ids = [self.runtime.text_ids(text, name, **how) for text in texts]

        def finish_with(packed: PackedAdapter | None) -> Finish:
            def finish(_: Any, pooled: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
                need_finite(pooled, name)
                return unit_length(pooled) if normalize else pooled

            return finish

        return self._encode(ids, name, finish_with)

    def tag(
        self,
        rows: Sequence[Words],
        adapter: str | None = None,
        *,
        truncate: bool = False,
        control_tokens: str | None = None,
    ) -> Future[list[Tagging]]:
        """As `Runtime.tag`, in batches with everyone else's rows. Errors of the input are raised
        here.
        """
        name = self.runtime.chosen(adapter)
        self.runtime.need_tags(name)
        how: dict[str, Any] = {"truncate": truncate, "control_tokens": control_tokens}
        readings = [read_words(self.runtime.opened, row, name, **how) for row in rows]

        def finish_with(packed: PackedAdapter | None) -> Finish:
            assert packed is not None

            def finish(logits: list[npt.NDArray[np.float32]], _: Any) -> list[Tagging]:
                for row in logits:
                    need_finite(row, name)
                found = iter(logits)
                return [
                    r.tagging(next(found), packed) if r.ids else Tagging(r.text, ())
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
        reader = AnswerReader(self.runtime.opened, name, truncate=truncate, limit=self.context)
        return self.score_ids([reader.ids(answered) for answered in answers], name)

    def score_ids(
        self, ids: Sequence[list[int]], adapter: str | None = None
    ) -> Future[list[float]]:
        """The same for answers that an `AnswerReader` has read, whose limit was `context` or
        less.
        """
        name = self.runtime.chosen(adapter)
        self.runtime.need_scores(name)
        self._check_length(ids)

        def finish(scores: list[npt.NDArray[np.float32]], _: Any) -> list[float]:
            for score in scores:
                need_finite(score, name)
            return [float(score[0]) for score in scores]

        return self._encode(ids, name, lambda _: finish, words=True, scores=True)

    def stats(self) -> SchedulerStats:
        """A picture of this moment."""
        batch = None if self.worker.loop is None else self.worker.loop.batch
        registry = self.runtime.registry
        with self.worker.lock:
            rows = 0 if batch is None else batch.rows
            return self.counters.stats(
                running=rows,
                waiting=self.worker.waiting,
                cache_slots_used=rows,
                cache_slots_total=0 if batch is None else self.max_rows,
                cache_bytes=0 if batch is None else batch.cache_bytes,
                cache_bytes_total=0 if batch is None else batch.cache_bytes_total,
                prefix_hit_tokens_total=0 if batch is None else batch.prefix_hit_tokens,
                prefix_evictions_total=0 if batch is None else batch.prefix_evictions,
                adapter_evictions_total=registry.evictions,
                adapter_bytes=registry.nbytes,
            )

    def close(self, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests; answer those under way (`drain`) for at most `timeout_s`, then
        cancel the rest.
        """
        self.worker.close(drain=drain, timeout_s=timeout_s)

    def _check_prompt(self, ids: list[int]) -> None:
        self.runtime.opened.need_decoder().check([ids])
        if len(ids) >= self.context:
            expected = f"at most {self.context - 1} tokens, so that one can follow"
            raise InputError(
                "the prompt is longer than the context", expected=expected, got=f"{len(ids)} tokens"
            )

    def _check_length(self, ids: Sequence[list[int]]) -> None:
        """InputError for a text, or a prompt with its answer, that the memory does not hold."""
        if (longest := max(map(len, ids), default=0)) > self.context:
            raise InputError(
                "the text is longer than the context",
                expected=f"at most {self.context} tokens",
                got=f"{longest} tokens",
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
            self.worker.put_texts(job)
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        self.counters.encoded(name, len(ids))
        if not ids:
            job.end()
        return job.future
