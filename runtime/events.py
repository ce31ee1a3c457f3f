"""What goes into the scheduler and what comes out of it: requests, events, tickets, counters."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgetune.errors import EdgetuneError
from edgetune.runtime.answers import Completion
from edgetune.runtime.generation import GenerationSettings, TokenLogprob


class QueueFull(EdgetuneError):  # noqa: N818  (as `queue.Full`: the request is fine, the moment is not)
    """The bounded queue has no room: try again in `retry_after_s` seconds."""

    def __init__(self, what: str, *, retry_after_s: float, expected: str = "", got: str = "") -> None:
        self.retry_after_s = retry_after_s
        super().__init__(what, expected=expected, got=got, fix="Send it again later.")


class SchedulerClosed(EdgetuneError):  # noqa: N818
    """The scheduler drains or has stopped: it takes no request."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued. `deadline` is a moment of `time.monotonic()`, in seconds.

    A deadline that passes, in the queue or while the row runs, is no error: the completion ends with finish reason
    "deadline" and the text so far. `choice` numbers the answers to one prompt, so that equal seeds give different ones.
    """

    prompt_ids: list[int]
    adapter: str | None
    settings: GenerationSettings
    deadline: float | None = None
    request_id: str = ""
    choice: int = 0


@dataclass(frozen=True)
class TokenEvent:
    """Text that became certain (it may be empty: half a character, the beginning of a stop text) and its tokens."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class FinishedEvent:
    """The last event of a request that ended: "stop", "length", "cancelled" or "deadline"."""

    completion: Completion


@dataclass(frozen=True)
class FailedEvent:
    """The last event of a request that could not be answered: an EdgetuneError where it was the request's doing."""

    error: Exception


Event = TokenEvent | FinishedEvent | FailedEvent


class Ticket:
    """A request that is under way."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._cancelled = threading.Event()
        self._done = threading.Event()

    def cancel(self) -> None:
        """Free the row before the next step; the last event then has finish reason "cancelled". Never blocks."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the last event; False when it has not come in time."""
        return self._done.wait(timeout_s)


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
