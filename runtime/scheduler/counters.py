"""The scheduler's counters: written by its worker, read by anyone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetune.runtime.scheduler.requests import Running


class Counters:
    """Sums since the start; each method is one kind of happening."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.adapters: dict[str, Counter[str]] = {}
        self.prompt_tokens = self.tokens = self.steps = self.batch_rows = self.encoded_rows = 0
        self.guesses = self.right_guesses = 0
        self.step_seconds = self.prefill_seconds = self.queue_wait_seconds = 0.0

    def started(self, running: Running) -> None:
        """A request left the queue."""
        prompt = len(running.request.prompt_ids)
        with self.lock:
            self.prompt_tokens += prompt
            self.queue_wait_seconds += (running.started or running.submitted) - running.submitted
            counts = self.adapters.setdefault(running.request.adapter or "", Counter())
            counts["requests"] += 1
            counts["prompt_tokens"] += prompt

    def prefilled(self, seconds: float) -> None:
        """A piece of a prompt went through."""
        with self.lock:
            self.prefill_seconds += seconds

    def stepped(self, rows: int, seconds: float) -> None:
        """A decode step of so many rows."""
        with self.lock:
            self.steps += 1
            self.batch_rows = rows
            self.step_seconds += seconds

    def guessed(self, tokens: int, right: int) -> None:
        """So many tokens were guessed, and so many of them were right."""
        with self.lock:
            self.guesses += tokens
            self.right_guesses += right

    def generated(self, running: Running) -> None:
        """One more token of a request."""
        with self.lock:
            self.tokens += 1
            self.adapters[running.request.adapter or ""]["tokens"] += 1

    def ended(self, reason: str) -> None:
        """A request ended, for this reason."""
        with self.lock:
            self.requests[reason] += 1

    def encoded(self, adapter: str | None, texts: int) -> None:
        """Texts of one caller went through the encoder."""
        with self.lock:
            self.encoded_rows += texts
            self.adapters.setdefault(adapter or "", Counter())["requests"] += 1

    def retry_after(self) -> float:
        """A guess at how long it takes until the queue has room: the mean wait so far, 1 to 60
        seconds.
        """
        with self.lock:
            started = sum(counts["requests"] for counts in self.adapters.values())
            mean = self.queue_wait_seconds / started if started else 1.0
        return min(max(mean, 1.0), 60.0)

    def stats(self, **levels: int) -> SchedulerStats:
        """These counters together with the `levels` of the moment, fields of SchedulerStats."""
        with self.lock:
            return SchedulerStats(
                batch_rows=self.batch_rows,
                requests_total=dict(self.requests),
                prompt_tokens_total=self.prompt_tokens,
                tokens_generated_total=self.tokens,
                steps_total=self.steps,
                step_seconds_total=self.step_seconds,
                prefill_seconds_total=self.prefill_seconds,
                queue_wait_seconds_total=self.queue_wait_seconds,
                adapters=self.by_adapter(),
                encoded_rows_total=self.encoded_rows,
                guessed_tokens_total=self.guesses,
                right_guesses_total=self.right_guesses,
                **levels,
            )

    def by_adapter(self) -> dict[str, AdapterCounters]:
        """The counters of each adapter."""
        return {name: AdapterCounters(**counts) for name, counts in self.adapters.items()}


@dataclass(frozen=True)
class AdapterCounters:
    """Since the start, of one adapter ("" is the base model)."""

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class SchedulerStats:
    """A moment's picture. Counters (…_total, sums) only grow; the rest are levels."""

    running: int
    """rows in prefill or decode"""
    waiting: int
    """requests in the queue"""
    batch_rows: int
    """rows of the last decode step"""
    cache_slots_used: int
    cache_slots_total: int
    requests_total: Mapping[str, int]
    """finish reason → requests; also "failed" and "refused" (queue full)"""
    prompt_tokens_total: int
    tokens_generated_total: int
    steps_total: int
    step_seconds_total: float
    """time inside decode steps"""
    prefill_seconds_total: float
    queue_wait_seconds_total: float
    """from submission to the first piece of prefill, over all started requests"""
    adapters: Mapping[str, AdapterCounters] = field(default_factory=dict)
    cache_bytes: int = 0
    """memory of the key-value cache in use"""
    cache_bytes_total: int = 0
    prefix_hit_tokens_total: int = 0
    """prompt tokens that were copied instead of computed"""
    prefix_evictions_total: int = 0
    adapter_evictions_total: int = 0
    adapter_bytes: int = 0
    encoded_rows_total: int = 0
    """texts classified or embedded"""
    guessed_tokens_total: int = 0
    """tokens guessed by prompt lookup"""
    right_guesses_total: int = 0
    """of them, those that were right: each saved a step"""
